"""The documents of a source that fit the rows of a run: dialogues and texts with images, which are never cut."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from typing_extensions import override

from t5g2.core.errors import UserError
from t5g2.data.sources.documents import Documents, OnBadRecord
from t5g2.data.sources.validation import MAX_PROBLEMS, LocatedDocuments
from t5g2.data.tokenizers.base import Tokenizer


@dataclass(frozen=True, eq=False)
class FilteredDocuments(Documents):
    """The documents that fit; the others are counted as skipped, like the bad records of the source.

    Attributes:
      documents: all valid documents of the source.
      numbers: int64[fitting], the numbers of those of `documents` that fit.
      lengths: int64[fitting], tokens of each.
      misfits: number of documents that do not fit.
      misfit_problems: the first few that do not fit, each with the reason.
    """

    documents: LocatedDocuments
    numbers: np.ndarray
    lengths: np.ndarray
    misfits: int
    misfit_problems: tuple[str, ...]

    @classmethod
    def select(
        cls,
        documents: LocatedDocuments,
        checks: Iterable[tuple[int, str]],
        *,
        on_bad_record: OnBadRecord,
        **fields: Any,
    ) -> Self:
        """Selects the documents that fit.

        Args:
          checks: each document's number of tokens, and the reason why it does not fit; "" = it fits.
          fields: fields of a subclass.

        Raises:
          UserError: a document does not fit, and such documents are not skipped.
        """
        # the documents that fit get new numbers, so that chunks and examples are numbered consecutively
        numbers, lengths, misfits, problems = [], [], 0, []
        for index, (length, problem) in enumerate(checks):
            if not problem:
                numbers.append(index)
                lengths.append(length)
                continue
            problem = f"{documents.location(index)}: {problem}"
            if on_bad_record == "stop":
                raise UserError(f"{problem}, or leave such records out: on_bad_record=skip")
            misfits += 1
            if len(problems) < MAX_PROBLEMS:
                problems.append(problem)
        arrays = np.array(numbers, np.int64), np.array(lengths, np.int64)
        return cls(documents, *arrays, misfits, tuple(problems), **fields)

    @property
    @override
    def fingerprint(self) -> str:
        """Fingerprint of all documents; which of them fit follows from the config."""
        return self.documents.fingerprint

    @property
    @override
    def characters(self) -> int:
        """Number of characters of all documents, those that do not fit included."""
        return self.documents.characters

    @property
    @override
    def skipped(self) -> int:
        """Number of records that could not be read, and of documents that do not fit."""
        return self.documents.skipped + self.misfits

    @property
    @override
    def problems(self) -> tuple[str, ...]:
        return (*self.documents.problems, *self.misfit_problems)[:MAX_PROBLEMS]

    @property
    @override
    def is_indivisible(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> str:
        return self.documents[int(self.numbers[index])]

    @override
    def token_lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        return self.lengths

    @override
    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        return self.documents.tokens(int(self.numbers[index]), tokenizer)
