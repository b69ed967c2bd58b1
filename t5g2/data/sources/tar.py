"""Samples of tar files as offsets of their members: nothing is unpacked."""

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from t5g2.core.errors import UserError

BLOCK = 512


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
      ending: the name after its first dot, in lower case.
      offset, size: first byte, bytes.
    """

    ending: str
    offset: int
    size: int


class TarSample(NamedTuple):
    """Files of an archive that follow each other and have the same name up to the ending.

    Attributes:
      key: the name up to the first dot, folder included.
      damage: description of damage of the archive directly after this sample; "" = none.
    """

    key: str
    members: list[Member]
    damage: str = ""


def samples(file: BinaryIO, name: str) -> Iterator[TarSample]:
    """Yields the samples of an uncompressed tar file, in its order; only headers are read.

    a/1.jpg a/1.txt a/2.png: the samples a/1, with two members, and a/2.

    Args:
      name: name of the file in errors.

    Raises:
      UserError: the file is not a tar file.
    """
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the caller closes the file
    except tarfile.ReadError as error:
        raise UserError(
            f"{name} is not a tar file ({error}); give tar files, uncompressed or with .gz or .zst"
        ) from None
    key, members, end = "", [], 0
    try:
        for member in archive:
            end = member.offset_data + -(-member.size // BLOCK) * BLOCK
            # as in WebDataset: the key ends at the first dot of the base name, not of the folder's
            folder, slash, base = member.name.removeprefix("./").rpartition("/")
            stem, _, ending = base.partition(".")
            if not (member.isreg() and stem and ending):
                continue
            if members and folder + slash + stem != key:
                yield TarSample(key, members)
                members = []
            key = folder + slash + stem
            members.append(Member(ending.lower(), member.offset_data, member.size))
    except tarfile.ReadError:  # the last member's content is cut off, which the check of the end reports
        pass
    if _archive_ends_at(file, end):
        if members:
            yield TarSample(key, members)
        return
    yield TarSample(key, members, f"the archive is damaged or cut off here, about byte {end:,}; get it again")


def _archive_ends_at(file: BinaryIO, end: int) -> bool:
    """True if only empty blocks follow byte `end`, and at least one."""
    # checked because tarfile takes anything that is not a header for the end of the archive, damage too
    file.seek(0, os.SEEK_END)
    if file.tell() < end + BLOCK:
        return False
    file.seek(end)
    while rest := file.read(1 << 16):
        if rest.strip(b"\0"):
            return False
    return True
