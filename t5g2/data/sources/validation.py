"""One pass over the records of a source: their validity, their totals, and the problems of the bad ones."""

import abc
import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from t5g2.core import files
from t5g2.core.errors import UserError
from t5g2.core.logs import log
from t5g2.data.sources.documents import Documents, OnBadRecord

# the key of a record's text; several, whose texts become a JSON list; None = the record is the text
Field = str | tuple[str, ...] | None

# number of skipped records that messages name; all are counted
MAX_PROBLEMS = 10


@dataclass(frozen=True)
class SourceSummary:
    """Result of reading all records once.

    Attributes:
      fingerprint: 16 hex digits, a hash of the texts in their order.
      characters: number of characters of all texts.
      skipped: number of records that are left out.
      problems: the first few of those, each with the reason.
    """

    fingerprint: str
    characters: int
    skipped: int
    problems: tuple[str, ...] = ()


class RecordValidator:
    """Accepts or refuses records one by one, and adds up a SourceSummary.

    A record is bad if its text cannot be read. `on_bad_record` = "stop" makes that an error, "skip" counts the record.
    """

    def __init__(self, on_bad_record: OnBadRecord):
        self._on_bad_record = on_bad_record
        self._digest = hashlib.sha256()
        self._records = self._characters = self._skipped = 0
        self._problems: list[str] = []

    def accept(self, location: str, read_text: Callable[[], str]) -> bool:
        """Counts a record and returns True if it is valid.

        Args:
          location: file and record, for messages.
          read_text: returns the record's text, or raises a ValueError with the problem.

        Raises:
          UserError: the record is bad, and bad records are not skipped.
        """
        self._records += 1
        try:
            text = read_text()
            data = _encode(text)
        except UserError:  # the problem is the whole file's, so no record of it can be skipped
            raise
        except ValueError as error:
            if self._on_bad_record == "stop":
                raise UserError(
                    f"{location}: {error}; mend it, or leave such records out with on_bad_record=skip"
                ) from None
            self._skipped += 1
            if self._skipped <= MAX_PROBLEMS:
                self._problems.append(f"{location}: {error}")
                log.warning("%s; left out", self._problems[-1])
            return False
        # each text is hashed with its length, so that moving text between two records changes the fingerprint
        self._digest.update(len(text).to_bytes(8, "little") + data)
        self._characters += len(text)
        return True

    def finish(self, source: str) -> SourceSummary:
        """Returns the summary of all records, and logs the number of those that are left out.

        Args:
          source: origin of the records in the log.
        """
        if self._skipped:
            log.warning("%s: %d of %d records are left out", source, self._skipped, self._records)
        return SourceSummary(self._digest.hexdigest()[:16], self._characters, self._skipped, tuple(self._problems))


class ValidatedDocuments(Documents):
    """Documents of which all records were read when they were opened."""

    summary: SourceSummary

    @property
    @override
    def fingerprint(self) -> str:
        return self.summary.fingerprint

    @property
    @override
    def characters(self) -> int:
        return self.summary.characters

    @property
    @override
    def skipped(self) -> int:
        return self.summary.skipped

    @property
    @override
    def problems(self) -> tuple[str, ...]:
        return self.summary.problems


class LocatedDocuments(ValidatedDocuments):
    """Documents that messages can name by file and record."""

    @abc.abstractmethod
    def location(self, index: int) -> str:
        """Returns the file and the record of a document, for messages."""


@dataclass(frozen=True, eq=False)
class JsonRecords(Sequence[Mapping[str, Any]]):
    """Documents that are JSON objects, as these.

    Attributes:
      documents: each the text of an object.
    """

    documents: LocatedDocuments

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: Any) -> Any:
        location = self.documents.location(index)
        try:
            record = decode_json(self.documents[index].encode())
        except ValueError as error:
            raise UserError(f"{location}: {error}; mend it") from None
        if not isinstance(record, dict):
            raise UserError(f"{location}: the record is of type {type(record).__name__}; it must be an object")
        return record


def fingerprint(parts: Iterable[bytes]) -> str:
    """Returns 16 hex digits, a hash of byte strings in their order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def text_under(record: object, field: str) -> str:
    """Returns the text of a record under a field.

    Raises:
      ValueError: there is no such text; the message has the record's fields or the value instead.
    """
    if not isinstance(record, dict):
        raise ValueError(f"no text under {field!r}: the record is not an object")
    if field not in record:
        raise ValueError(f"no text under {field!r}: the record is an object with {', '.join(record) or 'no keys'}")
    if not isinstance(record[field], str):
        raise ValueError(f"no text under {field!r}, but {json.dumps(record[field], default=str)[:40]}")
    return record[field]


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X} at place {error.start} of the text"
        raise ValueError(f"{half} is half of a character, which UTF-8 cannot hold") from None


def decode_json(data: bytes) -> object:
    """Returns the value of JSON in UTF-8.

    Raises:
      ValueError: the bytes are not UTF-8, not JSON, or too deeply nested.
    """
    text = decode_text(data)
    try:
        return files.parse_record(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None


def decode_text(data: bytes) -> str:
    """Returns the text of UTF-8, without the byte order mark that some editors write before it.

    Raises:
      ValueError: the bytes are not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and len(data) > 2
        hint = " (but begins as UTF-16 does: iconv -f UTF-16 -t UTF-8 converts it)" if is_utf16 else ""
        raise ValueError(f"byte {error.start} is not UTF-8{hint}") from None


def json_text(data: bytes, field: Field) -> str:
    """Returns the text under a field of a JSON object; with field None, the bytes as text.

    Raises:
      ValueError: the bytes are not an object with such a text, or not UTF-8; one of several texts is empty.
    """
    if isinstance(field, tuple):
        record = decode_json(data)
        return list_of_texts({name: text_under(record, name) for name in field})
    return decode_text(data) if field is None else text_under(decode_json(data), field)


def list_of_texts(texts: Mapping[str, str]) -> str:
    """Returns the texts of several fields as one: a JSON list.

    Raises:
      ValueError: a text is empty.
    """
    for name, text in texts.items():
        if not text:
            raise ValueError(f"the text under {name!r} is empty")
    return json.dumps([*texts.values()], ensure_ascii=False)
