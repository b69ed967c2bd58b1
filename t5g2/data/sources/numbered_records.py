"""Records that are read by number: their interface, and the documents that they are."""

import abc
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import override

from t5g2.core.errors import UserError
from t5g2.data.sources.documents import SHORTEST_TOKENS, OnBadRecord
from t5g2.data.sources.validation import (
    LocatedDocuments,
    RecordValidator,
    SourceSummary,
    json_text,
    text_under,
)


class Records(abc.ABC):
    """Records by number, opened by one process."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def location(self, index: int) -> str:
        """Returns the file and the number of a record, for messages."""

    @abc.abstractmethod
    def text(self, index: int) -> str:
        """Returns the text of a record.

        Raises:
          ValueError: the record has no text; the message has its content instead.
          UserError: the record's file is damaged.
        """


def plain_features(value: Any) -> Any:
    """Returns features as Python's values: bytes in UTF-8 as text, arrays other than images as numbers and lists."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {key: plain_features(item) for key, item in value.items()}
    if isinstance(value, np.ndarray) and value.ndim > 2:
        return value
    if isinstance(value, np.ndarray | np.generic):
        return plain_features(value.tolist())
    return [plain_features(item) for item in value] if isinstance(value, list) else value


def feature_text(record: Any, field: str) -> str:
    """Returns the text of a feature; a dot leads into a nested one.

    Raises:
      ValueError: it is no text; the message has its value instead.
    """
    *parents, last = field.split(".")
    for key in parents:
        record = record[key]
    data = record[last]
    return json_text(data, None) if isinstance(data, bytes) else text_under({last: data}, last)


@dataclass(frozen=True, eq=False)
class ValidRecords(LocatedDocuments):
    """Documents of the valid records.

    Attributes:
      numbers: int64[documents], the number of each document's record.
    """

    records: Records
    numbers: np.ndarray
    summary: SourceSummary

    def __len__(self) -> int:
        return len(self.numbers)

    @override
    def location(self, index: int) -> str:
        return self.records.location(int(self.numbers[index]))

    def __getitem__(self, index: int) -> str:
        return self.records.text(int(self.numbers[index]))


def scan(records: Records, source: str, on_bad_record: OnBadRecord) -> ValidRecords:
    """Reads every record once and returns the documents; `source` is the records' origin in messages."""
    validator = RecordValidator(on_bad_record)
    numbers = [i for i in range(len(records)) if validator.accept(records.location(i), lambda i=i: records.text(i))]
    summary = validator.finish(source)
    if not summary.characters:
        raise UserError(
            f"{source}: {len(records)} records without text; give records of at least {SHORTEST_TOKENS} tokens"
        )
    return ValidRecords(records, np.array(numbers, np.int64), summary)
