"""Labelled texts for the objectives probe and probe_decoder: a text and a class, or a number, of every record.

    {"kind": "labelled", "records": {"kind": "jsonl", "path": "boolq.jsonl"}, "classes": ["no", "yes"],
     "template": "{passage}\\nQuestion: {question}?", "label": "{answer}"}

    {"passage": "Ice floats.", "question": "does ice sink", "answer": "no"}

A labelled text is stored and passed on as a pair (core/pairs.py) of the text's tokens and one entry, the label: the
number of its class, or the number itself, as the bits of a float32. The label "no" is 0.0, whose bits are 0; of the
label "yes", 1.0, they are 1065353216:

    [number of tokens  tokens of the text  0]
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import override

from t5g2.core import pairs
from t5g2.core.errors import UserError
from t5g2.data.sources.array_records import ArrayRecord, Tfds
from t5g2.data.sources.documents import OnBadRecord
from t5g2.data.sources.hf_dataset import HfDataset
from t5g2.data.sources.record_templates import Record, RecordList, Template, class_number
from t5g2.data.sources.text_files import Jsonl, Parquet
from t5g2.data.sources.validation import JsonRecords, LocatedDocuments, RecordValidator, SourceSummary
from t5g2.data.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class LabelledText:
    """Records with a text and a label, for the objectives probe and probe_decoder.

    A text is never cut; one that is longer than chunk_tokens is an error.

    Attributes:
      records: where the records are; the `field` of files is left out.
      template: the text, with fields of the record in braces: "{premise}\\n{hypothesis}".
      label: template of the label: the name of a class or its number from 0, or without classes a number. A boolean of
        JSON is the class true or yes, or false or no.
      classes: names of the classes, those of model.probe; () = labels are numbers (regression).
    """

    records: Jsonl | Parquet | ArrayRecord | Tfds | HfDataset | RecordList
    template: str = "{text}"
    label: str = "{label}"
    classes: tuple[str, ...] = ()

    def __post_init__(self):
        _ = Template(self.template), Template(self.label)  # raise where they are no formats
        if isinstance(self.records, RecordList):
            return
        if self.records.field != type(self.records).field:
            raise UserError(f"records.field = {self.records.field!r}: the template names the fields; leave field out")

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> "LabelledTexts":
        """Returns the labelled texts, in the order of the records.

        Raises:
          UserError: as in the records' `open_records`; a record lacks a field of a template, has an empty text, or a
            label that is no class or no number (unless such records are skipped); there are no records.
        """
        records = self.records.records if isinstance(self.records, RecordList) else self.records.open_records()
        validator, numbers = RecordValidator(on_bad_record), []
        for number in range(len(records)):
            if validator.accept(_location(records, number), lambda number=number: self._checked(records, number)):
                numbers.append(number)
        summary = validator.finish("labelled texts")
        if not numbers:
            raise UserError(f"{self}: no labelled text in {len(records)} records; give some")
        return LabelledTexts(self, records, np.array(numbers), summary)

    def example(self, record: Record) -> tuple[str, float]:
        """Returns the text and the label of a record.

        Raises:
          UserError: the record lacks a field, or its label is no class or no finite number.
        """
        return Template(self.template).fill(record), label_number(Template(self.label).fill(record), self.classes)

    def _checked(self, records: Sequence[Record], number: int) -> str:
        """Returns the text and the label as JSON; raises a plain ValueError, so that a record may be skipped."""
        try:
            text, label = self.example(records[number])
        except UserError as error:
            raise ValueError(str(error)) from None
        if not text:
            raise ValueError(f"the text of the template {self.template!r} is empty")
        return json.dumps([text, label], ensure_ascii=False)


def label_number(label: str, classes: Sequence[str]) -> float:
    """Returns a label as a number: that of its class, or without classes the number that it spells.

    Raises:
      UserError: it is no class, or no finite number.
    """
    if classes:
        return float(class_number(label, classes))
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"the label {label!r} is no number; name the classes (classes = …), or give numbers")
    return number


@dataclass(frozen=True, eq=False)
class LabelledTexts(LocatedDocuments):
    """Labelled texts of a source.

    Attributes:
      records: all records.
      numbers: int64[documents], the number of each document's record.
    """

    config: LabelledText
    records: Sequence[Any]
    numbers: np.ndarray
    summary: SourceSummary

    @property
    @override
    def has_pairs(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> str:
        return self.config.example(self.records[int(self.numbers[index])])[0]

    @override
    def location(self, index: int) -> str:
        return _location(self.records, int(self.numbers[index]))

    @override
    def token_lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        return np.array([len(self.tokens(i, tokenizer)) for i in range(len(self))], np.int64)

    @override
    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        text, label = self.config.example(self.records[int(self.numbers[index])])
        tokens = tokenizer.encode_document(text)
        if len(tokens) > pairs.MAX_INPUTS:
            raise UserError(
                f"{self.location(index)}: a text of {len(tokens)} tokens, and up to {pairs.MAX_INPUTS} are read; "
                f"shorten it"
            )
        return pairs.join(tokens, np.array([label], np.float32).view(np.int32))


def _location(records: Sequence[Any], number: int) -> str:
    return records.documents.location(number) if isinstance(records, JsonRecords) else f"record {number}"
