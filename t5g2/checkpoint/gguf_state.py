"""States of a GGUF file: one content of it is told from another without reading all of it.

Within a process it is what the file system says of the file (`identity`), which a write and a rename change, whatever
size and time the new content has. What the cache of a machine keeps is known by the file's content (`Content`), which
is the same on other machines and after a restart. A file of which the file system says something else, but the same
size and time, is known by its content too: its rights may have changed, a backup may have linked it, or a network
mount may number its files anew.

Limit: two files of one size and time are one `Content` if they agree in their first HEAD_BYTES and in the pieces behind
them. What the cache keeps is all of the metadata, which are 6.5 MB of a file of Gemma 3, and would be right even then;
metadata that are longer than HEAD_BYTES might be taken for the other file's, and weights that are replaced between
two reads by such a file's.
"""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

from t5g2.core.errors import UserError

HEAD_BYTES = 16 << 20
# evenly spread over what is behind the head
PIECES, PIECE_BYTES = 64, 4096


class Content(NamedTuple):
    """A content of a file: its size in bytes, the time of its last change in ns, and a hash of a part of it."""

    size: int
    mtime_ns: int
    digest: str


@dataclasses.dataclass
class FileState:
    """A file as it was when it was looked at.

    Attributes:
      content: known to the cache.
      identities: each `identity` that the file has had with this content, compared in this process alone.
    """

    content: Content
    identities: set[tuple[int, ...]]


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
            content = _content(stream, stat)
            now = os.fstat(stream.fileno())
    except FileNotFoundError:
        raise changed(file, "is gone") from None
    if identity(now) != identity(stat):
        raise changed(file, "changes while it is read")
    return FileState(content, {identity(stat)})


def check(file: Path, then: FileState) -> None:
    """Raises UserError if a file is gone, or has another content than it had."""
    try:
        with file.open("rb") as stream:
            is_same = is_still(stream, then)
    except FileNotFoundError:
        raise changed(file, "is gone") from None
    if not is_same:
        raise changed(file, "has changed while it was read")


def is_still(stream: BinaryIO, then: FileState) -> bool:
    """True if an open file has the content that it had then; reads of it only what `read` does, and that seldom."""
    stat = os.fstat(stream.fileno())
    if identity(stat) in then.identities:
        return True
    if (stat.st_size, stat.st_mtime_ns) != then.content[:2] or _content(stream, stat) != then.content:
        return False
    then.identities.add(identity(stat))
    return True


def _content(stream: BinaryIO, stat: os.stat_result) -> Content:
    stream.seek(0)
    hashed = hashlib.sha256(stream.read(HEAD_BYTES))
    rest = max(0, stat.st_size - HEAD_BYTES)
    for piece in range(PIECES if rest else 0):
        stream.seek(HEAD_BYTES + rest * piece // PIECES)
        hashed.update(stream.read(PIECE_BYTES))
    return Content(stat.st_size, stat.st_mtime_ns, hashed.hexdigest()[:16])


def changed(file: Path, how: str) -> UserError:
    """Returns the error for a file that is not what it was a moment ago."""
    return UserError(f"{file} {how}; give the file again when it is complete")
