"""Pairs of inputs and targets for the objective seq2seq: two fields of every record of another source.

    {"kind": "pairs", "records": {"kind": "jsonl", "path": "qa/*.jsonl"}, "inputs": "question", "targets": "answer"}

    {"question": "What is 2 + 2?", "answer": "4"}

becomes, with bytes as tokens (14 of the question) and EOS = 1, the pair (core/pairs.py)

    [14  ids of "What is 2 + 2?"  id of "4"  1]
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from t5g2.core import pairs
from t5g2.core.errors import UserError
from t5g2.data.sources.array_records import ArrayRecord, Tfds
from t5g2.data.sources.documents import Documents, OnBadRecord
from t5g2.data.sources.filtered_documents import FilteredDocuments
from t5g2.data.sources.hf_dataset import HfDataset
from t5g2.data.sources.text_files import Jsonl, Parquet
from t5g2.data.sources.validation import LocatedDocuments, fingerprint
from t5g2.data.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class TextPairs:
    """Records with a text for the encoder and one for the decoder, for the objective seq2seq.

    A pair is never cut: one that has more tokens than the objective's inputs_tokens or targets_tokens, or than
    chunk_tokens with the number of inputs, is a bad record, and so is one with an empty text.

    Attributes:
      records: where the records are; its `field` is left out.
      inputs, targets: the keys, columns or features of the two texts.
      eos: append EOS to the targets, without which no model learns to end. With it, the objective's own `eos` is off.
    """

    records: Jsonl | Parquet | ArrayRecord | Tfds | HfDataset
    inputs: str = "inputs"
    targets: str = "targets"
    eos: bool = True

    def __post_init__(self):
        if self.records.field != type(self.records).field:
            raise UserError(
                f"records.field = {self.records.field!r}: pairs have two fields; name them by inputs and targets, and "
                f"leave field out"
            )
        if self.inputs == self.targets:
            raise UserError(f"inputs and targets are both {self.inputs!r}; name two fields of the records")

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> "Pairs":
        """Returns the pairs, in the order of the records.

        Raises:
          UserError: as in the records' `open`; a record lacks one of the texts (unless such records are skipped).
        """
        return Pairs(self, self.records.open_fields((self.inputs, self.targets), on_bad_record=on_bad_record))


@dataclass(frozen=True, eq=False)
class Pairs(LocatedDocuments):
    """Pairs of a source.

    Attributes:
      records: its documents, each a JSON list of the two texts.
    """

    config: TextPairs
    records: LocatedDocuments

    @property
    @override
    def fingerprint(self) -> str:
        # EOS is among the tokens, and tokens are kept under this name
        return fingerprint([self.records.fingerprint.encode(), str(self.config.eos).encode()])

    @property
    @override
    def characters(self) -> int:
        return 0  # those of the lists, and not of the texts, are counted

    @property
    @override
    def skipped(self) -> int:
        return self.records.skipped

    @property
    @override
    def problems(self) -> tuple[str, ...]:
        return self.records.problems

    @property
    @override
    def has_pairs(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> str:
        return "\n".join(self.texts(index))

    @override
    def location(self, index: int) -> str:
        return self.records.location(index)

    def texts(self, index: int) -> tuple[str, str]:
        """Returns the inputs and the targets of a pair."""
        inputs, targets = json.loads(self.records[index])
        return inputs, targets

    @override
    def token_lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        return np.array([len(self.tokens(i, tokenizer)) for i in range(len(self))], np.int64)

    @override
    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        inputs, targets = map(tokenizer.encode_document, self.texts(index))
        return pairs.join(inputs, np.append(targets, [tokenizer.special_tokens.eos] * self.config.eos))


@dataclass(frozen=True)
class FilteredPairs:
    """A source of pairs, as a run reads it; it has the interface of the other sources.

    Attributes:
      chunk_tokens: the longest pair that is read, with the number of its inputs.
      inputs_tokens, targets_tokens: the longest inputs and targets; pairs with longer ones are bad records.
    """

    text: TextPairs
    tokenizer: Tokenizer
    chunk_tokens: int
    inputs_tokens: int
    targets_tokens: int

    def __str__(self) -> str:
        return str(self.text)

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """Returns the pairs that fit.

        Raises:
          UserError: as in TextPairs.open; or a pair is too long (unless such pairs are skipped).
        """
        documents = self.text.open(on_bad_record=on_bad_record)
        return _FittingPairs.select(documents, self._checks(documents), on_bad_record=on_bad_record)

    def _checks(self, documents: Pairs) -> Iterator[tuple[int, str]]:
        """Yields each pair's number of tokens, and the reason why it does not fit; "" = it fits."""
        most = min(self.inputs_tokens, pairs.MAX_INPUTS)
        for index in range(len(documents)):
            tokens = documents.tokens(index, self.tokenizer)
            inputs, targets = map(len, pairs.split(tokens))
            fits = inputs <= most and targets <= self.targets_tokens and len(tokens) <= self.chunk_tokens
            yield (
                len(tokens),
                ""
                if fits
                else f"a pair of {inputs} and {targets} tokens; up to {most} and {self.targets_tokens}, and "
                f"{self.chunk_tokens - 1} together, are read: raise the objective's inputs_tokens and targets_tokens, "
                f"and chunk_tokens",
            )


class _FittingPairs(FilteredDocuments):
    """The pairs that fit."""

    @property
    @override
    def has_pairs(self) -> bool:
        return True
