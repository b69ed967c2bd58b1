"""Plain local copies of files that cannot be read from the middle: compressed files, parquet, and files at a URL.

A run reads documents in a shuffled order, each by its offset in a file. A .gz or .zst file, a parquet file or a URL
cannot be read so, and is copied once, as it is or as JSON lines. Copies are kept in T5G2_CACHE, or ~/.cache/t5g2, under
a name that changes with the file (its path, size and time of change; for a URL whatever its file system offers), which
a copy gets only when it is complete.
"""

import functools
import gzip
import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from t5g2.core import errors
from t5g2.core.errors import UserError
from t5g2.core.files import cache_folder, replacing
from t5g2.core.optional import require
from t5g2.data.sources import parquet

BUFFER_BYTES = 1 << 20
ZSTD_BYTES = 1 << 13
# the largest window of the format, `zstd --ultra --long=31`; the default of its decoder is 128 MiB
MAX_WINDOW = 1 << 31
# text is packed to a tenth of its size, the most uniform logs to a hundredth; small files may be anything
BOMB_RATIO, BOMB_BYTES = 500, 1 << 28
# compressions that are not read, by ending; some, and files that were given a wrong name, show by their first bytes
PACKED = {
    ".bz2": "bzip2",
    ".xz": "xz",
    ".lzma": "lzma",
    ".lz4": "LZ4",
    ".br": "Brotli",
    ".sz": "Snappy",
    ".snappy": "Snappy",
    ".z": "compress",
    ".zip": "zip",
    ".7z": "7z",
    ".rar": "rar",
    ".tgz": "gzip",
}
FIRST_BYTES = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "LZ4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"PAR1": "parquet",
    b"version https://git-lfs.github.com/": "a pointer of Git LFS",
}
REMEDIES = {
    "gzip": "let its name end in .gz",
    "Zstandard": "let its name end in .zst",
    "parquet": "read it with the kind parquet",
    "a pointer of Git LFS": "get the file itself: git lfs pull",
}
REMEDY = "unpack it, or pack it with gzip or zstd (.gz, .zst), which are read"

# reads the first file and writes the second
Convert = Callable[[BinaryIO, BinaryIO], None]


def is_url(path: str) -> bool:
    """True if a path is remote: gs://…, s3://…, memory://…."""
    return "://" in path


def is_folder(path: str) -> bool:
    """True if a path or a URL is a folder."""
    if not is_url(path):
        return os.path.isdir(path)
    system, inside = _filesystem(path)
    return system.isdir(inside)


def remote_files(url: str) -> tuple[dict[str, int], str | None]:
    """Returns the sizes of the files that a URL stands for: one file, those of a folder, or those of a pattern.

    Returns:
      {name: bytes}, sorted by name; the folder of which all files are meant, None if they are chosen by their names.

    Raises:
      UserError: there are no files, or the package that reads such URLs is missing.
    """
    system, inside = _filesystem(url)
    try:
        if system.isfile(inside):
            candidates, base = {inside: system.info(inside)}, None
        elif set(inside) & set("*?[") and not system.isdir(inside):
            candidates = system.glob(inside, detail=True)
            folder, _, last = inside.rpartition("/")
            base = folder if set(last) <= {"*"} else None
        else:
            candidates, base = _files_below(system, inside), inside
        # fsspec's names lack the protocol, without which they would be local paths
        sizes = {
            system.unstrip_protocol(name): int(info.get("size") or 0)
            for name, info in sorted(candidates.items())
            if info["type"] == "file"
        }
    except OSError as error:
        raise UserError(f"{url} cannot be listed ({error}); check the URL, and that you may read it") from None
    if not sizes:
        raise UserError(f"no file at {url!r}; give a file, a folder with files, or a pattern")
    return sizes, None if base is None else system.unstrip_protocol(base)


def _files_below(system: Any, folder: str) -> dict[str, Any]:
    """Returns all files below a folder with their details, hidden ones aside."""
    base = len(folder.rstrip("/"))
    return {name: info for name, info in system.find(folder, detail=True).items() if "/." not in name[base:]}


def plain_copy(file: str, columns: Mapping[str, str] | None = None) -> str:
    """Returns the path of a local file with the contents of `file`: `file` itself if it is local and plain.

    Args:
      file: a path or a URL.
      columns: columns of a parquet file by the settings that name them, {} = all; its copy has {column: value, …} on
        each line. None = not a parquet file.

    Raises:
      UserError: the file is damaged or cut off, is compressed in another way, or lacks a column; the package that reads
        it is missing.
    """
    convert = CONVERTERS.get(file.rpartition(".")[2])
    if columns is not None and not columns:
        return converted_copy(file, parquet.write_rows, ("whole rows, bytes in base64",))
    if columns is not None:
        first, *others = columns.values()
        # copies of one column keep the name that they had when there was no other kind
        variant = (first, *others) if others else first
        return converted_copy(file, functools.partial(parquet.write_named, columns=columns), variant)
    if convert is None:
        plain = converted_copy(file, _copy, None) if is_url(file) else file
        _refuse_packed(file, plain)
        return plain
    return converted_copy(file, convert, None)


def converted_copy(file: str, convert: Convert, variant: object) -> str:
    """Returns the path of the copy that `convert` makes of a file, which is made if it is missing.

    Args:
      convert: reads the first file and writes the second.
      variant: distinguishes copies of the same file; its repr is hashed into the copy's name.

    Raises:
      UserError: the file is damaged or cut off, or `convert` raises a UserError.
    """
    target = cache_folder() / f"{_identity(file, variant)}-{Path(file).name}"
    if target.exists():
        return str(target)
    # several processes and machines may be here at once: each writes under a name of its own, and all copies are equal
    try:
        with replacing(target) as part, _open(file) as source, open(part, "wb") as out:
            convert(source, out)
    except UserError:
        raise
    except (EOFError, OSError, ValueError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno in errors.OS_ERRORS:  # the file itself is in order
            raise
        if target.exists():  # another process was faster, whatever became of this one's copy
            return str(target)
        raise UserError(f"{file} is damaged or cut off ({error}); get it again") from None
    return str(target)


def _refuse_packed(file: str, plain: str) -> None:
    """Raises UserError for a file, read as it is, that is known to be something else by its ending or first bytes."""
    try:
        with open(plain, "rb") as data:
            start = data.read(max(map(len, FIRST_BYTES)))
    except OSError:  # reported where the file is read
        return
    kind = PACKED.get(Path(file).suffix.lower())
    kind = next((kind for first, kind in FIRST_BYTES.items() if start.startswith(first)), kind)
    if kind is None:
        return
    raise UserError(f"{file} is not plain, but {kind}; {REMEDIES.get(kind, REMEDY)}")


def _copy(source: BinaryIO, out: BinaryIO) -> None:
    shutil.copyfileobj(source, out, BUFFER_BYTES)


def _refuse_bomb(source: BinaryIO, out: BinaryIO) -> None:
    """Raises UserError if more has been unpacked than any text has been packed from."""
    packed, unpacked = source.tell(), out.tell()
    if unpacked > BOMB_BYTES and unpacked > BOMB_RATIO * packed:
        raise UserError(
            f"{getattr(source, 'name', 'the file')} unpacks to more than {BOMB_RATIO} times its size, which would fill "
            f"the disk; leave it out, or unpack it yourself if it is meant so"
        )


def _decompress_gzip(source: BinaryIO, out: BinaryIO) -> None:
    with gzip.GzipFile(fileobj=source) as unpacked:
        while data := unpacked.read(BUFFER_BYTES):
            out.write(data)
            _refuse_bomb(source, out)


def _decompress_zstd(source: BinaryIO, out: BinaryIO) -> None:
    zstandard = require("zstandard", "zstd")
    frame, data = None, b""
    # a few bytes may stand for a block of 128 KiB, and what is given at once is unpacked at once
    while data or (data := source.read(ZSTD_BYTES)):
        frame = frame or zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
        try:
            out.write(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
        _refuse_bomb(source, out)
        # a file may hold several frames, one after the other
        data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("a frame does not end")


CONVERTERS: dict[str, Convert] = {"gz": _decompress_gzip, "zst": _decompress_zstd}


def _filesystem(url: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL, and the path in it."""
    fsspec = require("fsspec", "remote")
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be read: {error}; give a local path, or a URL that fsspec knows") from None


def _open(file: str) -> AbstractContextManager[BinaryIO]:
    if not is_url(file):
        return open(file, "rb")
    system, inside = _filesystem(file)
    return system.open(inside, "rb")


def _identity(file: str, variant: object) -> str:
    """Returns 16 hex digits that change with the file."""
    if is_url(file):
        system, inside = _filesystem(file)
        facts: tuple = (file, system.ukey(inside), variant)
    else:
        # not the content: hashing a large file would take as long as copying it
        status = os.stat(file)
        facts = (os.path.abspath(file), status.st_size, status.st_mtime_ns, variant)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
