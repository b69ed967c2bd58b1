"""Conversion of parquet files to JSON lines, which can be read row by row (pip install 't5g2[parquet]')."""

import base64
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

from t5g2.core.errors import UserError
from t5g2.core.optional import require

BASE64 = "base64"  # the one key of an object that stands for bytes


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
    """Writes each row as a line of JSON, with all of its columns; bytes that are no text as `with_bytes` reads them."""
    for batch in open_table(source).iter_batches():
        for row in batch.to_pylist():
            out.write(json_line(row, keep_bytes=True))


def with_bytes(value: Any) -> Any:
    """Returns a value of a line of `write_rows` with its bytes; Hugging Face's image, {"bytes", "path"}, is its bytes.

    {"base64": "iVA="} is the two bytes 0x89 0x50.
    """
    if isinstance(value, list):
        return [with_bytes(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {BASE64}:
        return base64.b64decode(value[BASE64])
    fields = {name: with_bytes(item) for name, item in value.items()}
    is_image = fields.keys() == {"bytes", "path"} and isinstance(fields["bytes"], bytes)
    return fields["bytes"] if is_image else fields


def json_line(record: dict[str, Any], *, keep_bytes: bool = False) -> bytes:
    """Returns a record as a line of JSON.

    Bytes become text if they are UTF-8; any other value that JSON cannot hold becomes {its type: its str}.

    Args:
      keep_bytes: other bytes are kept, in base64; False = their number alone.
    """
    return json.dumps(record, default=partial(_to_json, keep_bytes=keep_bytes)).encode() + b"\n"


def _to_json(value: Any, *, keep_bytes: bool) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {BASE64: base64.b64encode(value).decode()} if keep_bytes else {"bytes": len(value)}
    return {type(value).__name__: str(value)}
