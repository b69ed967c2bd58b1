"""Files that cannot be read from the middle, as plain copies that can: compressed ones, parquet, and those elsewhere.

A run reads documents in a shuffled order, each by its place in a file. A .gz or .zst file, a parquet file or a URL has
no such places, so it is written out once, as it is or as a JSON object a line, and read from there. Copies are kept in
T5G2_CACHE, or ~/.cache/t5g2, under a name that changes with the file (path, size, time of change; of a URL what its
file system offers), and appear under it only when they are whole.
"""

import functools
import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from t5g2.core import errors
from t5g2.core.errors import UserError
from t5g2.core.files import cache_folder
from t5g2.core.optional import require

CHUNK = 1 << 20


def is_url(path: str) -> bool:
    """Whether a path is elsewhere: gs://…, s3://…, memory://…."""
    return "://" in path


def is_folder(path: str) -> bool:
    """Whether a path or a URL is a folder."""
    if not is_url(path):
        return os.path.isdir(path)
    system, inside = _system(path)
    return system.isdir(inside)


def remote_files(path: str) -> list[str]:
    """The files that a URL means, sorted: one, those of a folder, or those of a pattern.

    Raises:
      UserError: there are none, or there is nothing to read such URLs with.
    """
    system, inside = _system(path)
    try:
        found = (
            [inside]
            if system.isfile(inside)
            else system.glob(inside)
            if set(inside) & set("*?[")
            else _below(system, inside)
        )
        names = sorted(system.unstrip_protocol(name) for name in found if system.isfile(name))
    except OSError as error:
        raise UserError(f"{path} cannot be listed ({error}); is it right, and may you read it?") from None
    if not names:
        raise UserError(f"no file at {path!r}; give a file, a folder with files, or a pattern")
    return names


def _below(system: Any, folder: str) -> list[str]:
    """All files below a folder, hidden ones aside."""
    base = len(folder.rstrip("/"))
    return [name for name in system.find(folder) if "/." not in name[base:]]


def plain_copy(file: str, column: str | None = None) -> str:
    """The path of a local file with the contents of `file`: itself if it is local and plain.

    Args:
      file: a path or a URL.
      column: of a parquet file, which becomes {column: text} a line.

    Raises:
      UserError: it is damaged or cut off, has no such column, or what reads it is not installed.
    """
    convert = CONVERTERS.get(file.rpartition(".")[2])
    if column is not None:
        convert = functools.partial(_parquet, column=column)
    elif convert is None and not is_url(file):
        return file
    return converted_copy(file, convert or _copy, column)


def converted_copy(file: str, convert: Callable[[BinaryIO, BinaryIO], None], what: object) -> str:
    """The path of the copy that `convert` makes of a file, unless there is one already.

    Args:
      convert: reads the first and writes the second.
      what: is made of the file; its repr is part of the copy's name.

    Raises:
      UserError: it is damaged or cut off, or what `convert` raises.
    """
    target = cache_folder() / f"{_identity(file, what)}-{Path(file).name}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with _open(file) as source, open(part, "wb") as out:
                convert(source, out)
            os.replace(part, target)
        except UserError:
            raise
        except (EOFError, OSError, ValueError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno in errors.ENVIRONMENT:  # nothing is wrong with the file
                raise
            raise UserError(f"{file} is damaged or cut off ({error}); get it again") from None
        finally:
            part.unlink(missing_ok=True)
    return str(target)


def _copy(source: BinaryIO, out: BinaryIO) -> None:
    shutil.copyfileobj(source, out, CHUNK)


def _gzip(source: BinaryIO, out: BinaryIO) -> None:
    with gzip.GzipFile(fileobj=source) as unpacked:
        shutil.copyfileobj(unpacked, out, CHUNK)


def _zstandard(source: BinaryIO, out: BinaryIO) -> None:
    zstandard = require("zstandard", "zstd")
    frame, data = None, b""
    while data or (data := source.read(CHUNK)):
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        try:
            out.write(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
        # a file may hold several frames, one after the other
        data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("a frame does not end")


def _parquet(source: BinaryIO, out: BinaryIO, *, column: str) -> None:
    for batch in parquet_file(source, field=column).iter_batches(columns=[column]):
        for value in batch.column(0).to_pylist():
            out.write(json_line({column: value}))


def json_line(record: dict[str, Any]) -> bytes:
    """A record as a line of JSON. Bytes are text if they are UTF-8; what else JSON has no word for says what it is."""
    return json.dumps(record, default=_in_json).encode() + b"\n"


def _in_json(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"bytes": len(value)}
    return {type(value).__name__: str(value)}


def parquet_file(source: BinaryIO, **columns: str) -> Any:
    """A pyarrow.parquet.ParquetFile that has these columns, each by the setting that names it.

    Raises:
      UserError: it lacks one, or pyarrow is not installed.
    """
    parquet = require("pyarrow.parquet", "parquet")
    file = parquet.ParquetFile(source)
    names = file.schema_arrow.names
    for setting, column in columns.items():
        if column not in names:
            raise UserError(
                f"{getattr(source, 'name', source)} has no column {column!r}; it has {', '.join(names)}: set "
                f"`{setting}` to one of them"
            )
    return file


CONVERTERS: dict[str, Callable[[BinaryIO, BinaryIO], None]] = {"gz": _gzip, "zst": _zstandard}


def _system(path: str) -> tuple[Any, str]:
    fsspec = require("fsspec", "remote")
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; give a local path, or a URL that fsspec knows") from None


def _open(file: str) -> AbstractContextManager[BinaryIO]:
    if not is_url(file):
        return open(file, "rb")
    system, inside = _system(file)
    return system.open(inside, "rb")


def _identity(file: str, what: object) -> str:
    """16 hex digits that change with the file."""
    if is_url(file):
        system, inside = _system(file)
        facts: tuple = (file, system.ukey(inside), what)
    else:
        status = os.stat(file)
        facts = (os.path.abspath(file), status.st_size, status.st_mtime_ns, what)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
