"""Reading every record of a source once: which are sound, what they hold, and what is wrong with the others."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from t5g2.core.errors import UserError
from t5g2.data.sources.documents import Documents, OnBadRecord

log = logging.getLogger(__name__)

# Of the bad records that are skipped, so many are named, and all are counted.
MAX_PROBLEMS = 10


@dataclass(frozen=True)
class SourceSummary:
    """What reading all records once has told.

    Attributes:
      fingerprint: 16 hex digits of the texts and their order.
      characters: of all texts.
      skipped: records that are left out.
      problems: the first of those, and what is wrong with each.
    """

    fingerprint: str
    characters: int
    skipped: int
    problems: tuple[str, ...] = ()


class RecordValidator:
    """Takes records one by one; a record is bad if its text cannot be had, and `on_bad_record` says what follows."""

    def __init__(self, on_bad_record: OnBadRecord):
        self._on_bad_record = on_bad_record
        self._digest = hashlib.sha256()
        self._records = self._characters = self._skipped = 0
        self._problems: list[str] = []

    def accept(self, place: str, text_of: Callable[[], str]) -> bool:
        """Counts a record and returns whether it is sound.

        Args:
          place: of the record, in words.
          text_of: gives its text, or raises a ValueError that says what is wrong.

        Raises:
          UserError: it is bad, and bad records are not skipped.
        """
        self._records += 1
        try:
            text = text_of()
            data = text.encode()
        except UserError:  # no record of its own, but what holds it
            raise
        except ValueError as error:
            if self._on_bad_record == "stop":
                raise UserError(
                    f"{place}: {error}; mend it, or leave such records out with on_bad_record=skip"
                ) from None
            self._skipped += 1
            if self._skipped <= MAX_PROBLEMS:
                self._problems.append(f"{place}: {error}")
                log.warning("%s; left out", self._problems[-1])
            return False
        self._digest.update(len(text).to_bytes(8, "little") + data)
        self._characters += len(text)
        return True

    def finish(self, where: str) -> SourceSummary:
        """What was found in all; the log says how many records are left out.

        Args:
          where: the records came from.
        """
        if self._skipped:
            log.warning("%s: %d of %d records are left out", where, self._skipped, self._records)
        return SourceSummary(self._digest.hexdigest()[:16], self._characters, self._skipped, tuple(self._problems))


class ValidatedDocuments(Documents):
    """Documents whose records were read once when they were opened."""

    summary: SourceSummary

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the texts and their order."""
        return self.summary.fingerprint

    @property
    def characters(self) -> int:
        """Of all texts."""
        return self.summary.characters

    @property
    def skipped(self) -> int:
        """Records that could not be read and were left out."""
        return self.summary.skipped

    @property
    def problems(self) -> tuple[str, ...]:
        """The first of the records that were left out, and what is wrong with each."""
        return self.summary.problems


def fingerprint(parts: Iterable[bytes]) -> str:
    """16 hex digits of byte strings and their order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def text_under(record: object, field: str) -> str:
    """The text of a record under a field; ValueError says what there is instead."""
    if not isinstance(record, dict):
        raise ValueError(f"no text under {field!r}: the record is no object")
    if field not in record:
        raise ValueError(f"no text under {field!r}: the record is an object with {', '.join(record) or 'no keys'}")
    if not isinstance(record[field], str):
        raise ValueError(f"no text under {field!r}, but {json.dumps(record[field], default=str)[:40]}")
    return record[field]


def json_text(data: bytes, field: str | None) -> str:
    """The text under a field of a JSON object, or the bytes as text if there is no field.

    Raises:
      ValueError: says what is wrong with the bytes.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    if field is None:
        return text
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
    return text_under(record, field)
