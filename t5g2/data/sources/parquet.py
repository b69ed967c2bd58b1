"""Conversion of parquet files to JSON lines, which can be read row by row (pip install 't5g2[parquet]')."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from t5g2.core.errors import UserError
from t5g2.core.optional import require


def open_table(source: BinaryIO, **columns: str) -> Any:
    """Returns a pyarrow.parquet.ParquetFile that has these columns.

    Args:
      columns: the column that each setting names: field="text".

    Raises:
      UserError: a column is missing, or pyarrow is not installed.
    """
    table = require("pyarrow.parquet", "parquet").ParquetFile(source)
    names = table.schema_arrow.names
    for setting, column in columns.items():
        if column not in names:
            raise UserError(
                f"{getattr(source, 'name', source)} has no column {column!r}; it has {', '.join(names)}: set "
                f"`{setting}` to one of them"
            )
    return table


def write_named(source: BinaryIO, out: BinaryIO, *, columns: Mapping[str, str]) -> None:
    """Writes {column: value, …} of each row as a line of JSON.

    Args:
      columns: the columns by the settings that name them, as in open_table.
    """
    for batch in open_table(source, **columns).iter_batches(columns=[*columns.values()]):
        for row in batch.to_pylist():
            out.write(json_line({column: row[column] for column in columns.values()}))


def write_columns(source: BinaryIO, out: BinaryIO, *, columns: Sequence[str]) -> None:
    """Writes each row as a line of JSON, with those of the columns that the file has.

    Raises:
      UserError: the file has none of the columns, or pyarrow is not installed.
    """
    table = open_table(source)
    # files of one source may have different columns; the reader of a record checks that it has enough
    present = [column for column in columns if column in table.schema_arrow.names]
    if not present:
        names = ", ".join(table.schema_arrow.names)
        raise UserError(
            f"{getattr(source, 'name', source)} has the columns {names}, and none of {', '.join(columns)}; name the "
            f"columns to read"
        )
    for batch in table.iter_batches(columns=present):
        for row in batch.to_pylist():
            out.write(json_line(row))


def write_rows(source: BinaryIO, out: BinaryIO) -> None:
    """Writes each row as a line of JSON, with all of its columns."""
    for batch in open_table(source).iter_batches():
        for row in batch.to_pylist():
            out.write(json_line(row))


def json_line(record: dict[str, Any]) -> bytes:
    """Returns a record as a line of JSON.

    Bytes become text if they are UTF-8; any other value that JSON cannot hold becomes {its type: its str}.
    """
    return json.dumps(record, default=_to_json).encode() + b"\n"


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"bytes": len(value)}
    return {type(value).__name__: str(value)}
