"""States of a GGUF file: one content of it is told from another without reading all of it.

Within a process it is what the file system says of the file (`identity`), which a write and a rename change, whatever
size and time the new content has. What the cache of a machine keeps is known by the file's content (`Content`), which
is the same on other machines and after a restart.

Limit: two files of one size and time are one `Content` if they agree in their first HEAD_BYTES and in the pieces behind
them. What the cache keeps is all of the metadata, which are 6.5 MB of a file of Gemma 3, and would be right even then;
metadata that are longer than HEAD_BYTES might be taken for the other file's.
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from t5g2.core.errors import UserError

HEAD_BYTES = 16 << 20
# evenly spread over what is behind the head
PIECES, PIECE_BYTES = 64, 4096


class Content(NamedTuple):
    """A content of a file: its size in bytes, the time of its last change in ns, and a hash of a part of it."""

    size: int
    mtime_ns: int
    digest: str


class FileState(NamedTuple):
    """A file as it was when it was looked at.

    Attributes:
      content: known to the cache.
      identity: `identity` of the file, compared in this process alone.
    """

    content: Content
    identity: tuple[int, ...]


def identity(stat: os.stat_result) -> tuple[int, ...]:
    """Returns what the file system tells a content of a file by, for as long as it is not mounted anew."""
    return stat.st_size, stat.st_mtime_ns, stat.st_dev, stat.st_ino, stat.st_ctime_ns


def read(file: Path) -> FileState:
    """Looks at a file, of which it reads at most HEAD_BYTES and the pieces.

    Raises:
      UserError: it is gone, or changes meanwhile.
    """
    try:
        with file.open("rb") as stream:
            stat = os.fstat(stream.fileno())
            hashed = hashlib.sha256(stream.read(HEAD_BYTES))
            rest = max(0, stat.st_size - HEAD_BYTES)
            for piece in range(PIECES if rest else 0):
                stream.seek(HEAD_BYTES + rest * piece // PIECES)
                hashed.update(stream.read(PIECE_BYTES))
            now = os.fstat(stream.fileno())
    except FileNotFoundError:
        raise changed(file, "is gone") from None
    if identity(now) != identity(stat):
        raise changed(file, "changes while it is read")
    return FileState(Content(stat.st_size, stat.st_mtime_ns, hashed.hexdigest()[:16]), identity(stat))


def check(file: Path, then: tuple[int, ...]) -> None:
    """Raises UserError if a file is not the one any more that had this `identity`."""
    try:
        now = identity(file.stat())
    except FileNotFoundError:
        raise changed(file, "is gone") from None
    if now != then:
        raise changed(file, "has changed while it was read")


def changed(file: Path, how: str) -> UserError:
    """Returns the error for a file that is not what it was a moment ago."""
    return UserError(f"{file} {how}; give the file again when it is complete")
