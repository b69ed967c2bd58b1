"""Files of text, JSON lines and parquet: each document is a span of bytes of a local file."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import override

from t5g2.core.errors import UserError
from t5g2.data.sources import local_copies, parquet
from t5g2.data.sources.data_files import find_files
from t5g2.data.sources.documents import SHORTEST_TOKENS, Documents, OnBadRecord
from t5g2.data.sources.validation import (
    Field,
    JsonRecords,
    LocatedDocuments,
    RecordValidator,
    SourceSummary,
    json_text,
)

# a longer text file is read as several documents of about this size, so that reading a chunk reads little else
SPAN_BYTES = 1 << 16

LocatedRecord = tuple[str, int, bytes]  # location for messages, first byte, content
SpanReader = Callable[[str], Iterator[LocatedRecord]]


@dataclass(frozen=True)
class TextFiles:
    """UTF-8 text files, one document each; larger ones are several documents, cut at ends of lines.

    Attributes:
      path: a file, a folder (the data files below it, data_files.py) or a pattern such as "corpus/**/*.txt"; local or
        at a URL (gs://…, s3://…); plain, or compressed if the name ends in .gz or .zst.
    """

    path: str

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """Returns the documents, files in the order of their names.

        Raises:
          UserError: no file is found, all are empty, or one is not UTF-8 (unless such files are skipped).
        """
        return _scan(self.path, _file_spans, None, on_bad_record)


@dataclass(frozen=True)
class Jsonl:
    """Files with a JSON object per line, one document each.

    Attributes:
      path: a file, a folder (the data files below it, data_files.py) or a pattern such as "corpus/*.jsonl"; local or at
        a URL; plain, or compressed if the name ends in .gz or .zst.
      field: the key of the text.
    """

    path: str
    field: str = "text"

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """Returns the documents, files in the order of their names; empty lines are ignored.

        Raises:
          UserError: no file is found, all are empty, or a line is not an object with a text under `field` (unless
            such lines are skipped).
        """
        return _scan(self.path, line_spans, self.field, on_bad_record)

    def open_fields(self, fields: tuple[str, str], *, on_bad_record: OnBadRecord = "stop") -> LocatedDocuments:
        """Returns the documents as in `open`, each a JSON list of the texts under these keys, none of them empty."""
        return _scan(self.path, line_spans, fields, on_bad_record)

    def open_records(self, *, on_bad_record: OnBadRecord = "stop") -> JsonRecords:
        """Returns the whole records, of all fields."""
        return JsonRecords(_scan(self.path, line_spans, None, on_bad_record))


@dataclass(frozen=True)
class Parquet:
    """Parquet files with one document per row (pip install 't5g2[parquet]').

    Attributes:
      path: a file, a folder (the data files below it, data_files.py) or a pattern such as "corpus/*.parquet".
      field: the column of the text.
    """

    path: str
    field: str = "text"

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """Returns the documents, files in the order of their names.

        Raises:
          UserError: no file is found, all are empty, one is damaged or has no such column, or a row has no text there
            (unless such rows are skipped).
        """
        return _scan(self.path, _row_spans, self.field, on_bad_record, columns={"field": self.field})

    def open_fields(self, fields: tuple[str, str], *, on_bad_record: OnBadRecord = "stop") -> LocatedDocuments:
        """Returns the documents as in `open`, each a JSON list of the texts in these columns, none of them empty."""
        columns = {"inputs": fields[0], "targets": fields[1]}
        return _scan(self.path, _row_spans, fields, on_bad_record, columns=columns)

    def open_records(self, *, on_bad_record: OnBadRecord = "stop") -> "ParquetRecords":
        """Returns the whole records, of all columns; bytes are text where they are UTF-8, and stay bytes elsewhere."""
        return ParquetRecords(_scan(self.path, _row_spans, None, on_bad_record, columns={}))


class ParquetRecords(JsonRecords):
    """Rows of parquet files."""

    @override
    def __getitem__(self, index: Any) -> Any:
        return {name: parquet.with_bytes(value) for name, value in super().__getitem__(index).items()}


@dataclass(frozen=True, eq=False)
class _Spans(LocatedDocuments):
    """Parts of files.

    Attributes:
      names, files, sizes: each file's name as the user wrote it, the path of its local copy, and the bytes of that.
      spans: int64[documents, 3]: number of the file, first byte, bytes.
      field: key of the text, or keys of the texts; None = the part is the text.
    """

    names: tuple[str, ...]
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    spans: np.ndarray
    field: Field
    summary: SourceSummary

    def __len__(self) -> int:
        return len(self.spans)

    @override
    def location(self, index: int) -> str:
        file, offset, _ = self.spans[index].tolist()
        return f"{self.names[file]}, the record at byte {offset}"

    def __getitem__(self, index: int) -> str:
        file, offset, size = self.spans[index].tolist()
        with open(self.files[file], "rb") as data:
            # After a change of the file the span may hold other text. Only the size is checked, which costs nothing.
            if os.fstat(data.fileno()).st_size != self.sizes[file]:
                raise UserError(
                    f"{self.files[file]} has changed since it was opened: it had {self.sizes[file]} bytes; restore it, "
                    f"or start again with the text as it is"
                )
            data.seek(offset)
            return json_text(data.read(size), self.field)


def _scan(
    path: str,
    read_spans: SpanReader,
    field: Field,
    on_bad_record: OnBadRecord,
    *,
    columns: Mapping[str, str] | None = None,
) -> _Spans:
    """Reads every record once, for its offset, its validity and the fingerprint, and returns the valid ones.

    Args:
      columns: the columns to read of parquet files, by the settings that name them, {} = all; None = other files.
    """
    files = find_files(path)
    readable = tuple(local_copies.plain_copy(file, columns) for file in files)
    # local copies are read, and messages have the paths of the user
    spans, validator = [], RecordValidator(on_bad_record)
    for number, file in enumerate(files):
        for location, offset, data in read_spans(readable[number]):
            if validator.accept(f"{file}, {location}", functools.partial(json_text, data, field)):
                spans.append((number, offset, len(data)))
    summary = validator.finish(path)
    if not summary.characters:
        raise UserError(
            f"{path}: no text in {len(files)} file{'s' * (len(files) > 1)}; give files with texts of at least "
            f"{SHORTEST_TOKENS} tokens"
        )
    sizes = tuple(os.path.getsize(file) for file in readable)
    return _Spans(tuple(files), readable, sizes, np.array(spans, np.int64).reshape(-1, 3), field, summary)


def _file_spans(path: str) -> Iterator[LocatedRecord]:
    """Yields the documents of a text file, each of whole lines."""
    with open(path, "rb") as file:
        offset = 0
        while data := file.read(SPAN_BYTES) + file.readline():
            yield f"from byte {offset}", offset, data
            offset += len(data)


def line_spans(path: str, unit: str = "line") -> Iterator[LocatedRecord]:
    """Yields the lines that are not empty."""
    with open(path, "rb") as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            if record := line.rstrip():
                # mentioned, because a file that was cut off often ends in the middle of a line
                end = "" if line.endswith(b"\n") else ", the last one and without a line end (is the file whole?)"
                yield f"{unit} {number}{end}", offset, record
            offset += len(line)


# the copy of a parquet file (local_copies.py) has a line for each row
_row_spans = functools.partial(line_spans, unit="row")
