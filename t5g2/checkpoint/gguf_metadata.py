"""Metadata of a GGUF file, read by the library gguf: every field is checked for its type where it is read."""

import math
import re
import sys
from dataclasses import dataclass, field
from importlib import metadata as packages
from pathlib import Path
from typing import Any, get_args, get_origin

from t5g2.core import files
from t5g2.core.errors import UserError, shortened
from t5g2.core.optional import require

MAGIC = b"GGUF"
KINDS = {str: "text", bool: "true or false", float: "a finite number", int: "a whole number"}
# an enumeration's own message
UNKNOWN_TYPE = re.compile(r"(\d+)\W* is not a valid GGMLQuantizationType")
# types are small numbers; a larger one is damage
MOST_TYPES = 1000
PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class GgufMetadata:
    """Fields of a file, and the places of its tensors.

    Attributes:
      file: the file, for messages.
      reader: the library's reader of it.
    """

    file: Path
    reader: Any = field(repr=False)

    def value(self, name: str, kind: Any, *, least: int = 0) -> Any:
        """Returns a field, None if there is none.

        Args:
          name: its name, with the architecture: "gemma3.block_count".
          kind: str, bool, float (which must be finite), int, or a list of one of them, such as list[str].
          least: smallest value of a whole number.

        Raises:
          UserError: the field is of another kind, too small, or damaged.
        """
        stored = self.reader.get_field(name)
        if stored is None:
            return None
        try:
            value = stored.contents()
        except (ValueError, IndexError) as error:
            raise UserError(f"{self.file}: its field {name} is damaged ({error}); download it again") from None
        is_list = get_origin(kind) is list
        of = get_args(kind)[0] if is_list else kind
        entries = value if isinstance(value, list) else [value]
        if isinstance(value, list) != is_list or not all(_is(entry, of, least) for entry in entries):
            wanted = f"{KINDS[of]}{f' of at least {least}' if of is int else ''}"
            raise UserError(
                f"{self.file}: its field {name} is {shortened(repr(value))}; it must be "
                f"{f'a list, each entry {wanted}' if is_list else wanted}; give another file"
            )
        return value

    def missing(self, names: list[str]) -> UserError:
        """Returns the error for fields that a file must have."""
        return UserError(
            f"{self.file}: its metadata has no {', '.join(names)}; give another file, such as one that llama.cpp's "
            f"convert_hf_to_gguf.py makes"
        )


def is_gguf(path: Path) -> bool:
    """True if a path is a file that ends in .gguf, however that is written, or begins as such a file does."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    # the files of ollama's store are named after their hash
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def read(file: Path) -> GgufMetadata:
    """Reads the metadata of a whole file, and the places of its tensors.

    Raises:
      UserError: the library is not installed; the file is damaged, cut short, a part of several, of another version or
        byte order, or has a tensor of a type that the installed library does not know.
    """
    library = require("gguf", "gguf")
    installed = f"the installed gguf {packages.version('gguf')}"
    files.refuse_lfs_pointer(file)
    _check_header(file, library.GGUF_VERSION, installed)
    try:
        reader = library.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        unknown = UNKNOWN_TYPE.search(str(error))
        if unknown and int(unknown[1]) < MOST_TYPES:
            raise UserError(
                f"{file} has a tensor of type {unknown[1]}, which {installed} does not know; upgrade it (`pip install "
                f"--upgrade gguf`), or give a file of another quantisation, such as Q8_0"
            ) from None
        raise UserError(f"{file} is no whole GGUF file ({error}); download it again") from None
    metadata = GgufMetadata(file, reader)
    if (parts := metadata.value("split.count", int) or 1) > 1:
        raise part_of_several(file, parts)
    return metadata


def part_of_several(file: Path, parts: int) -> UserError:
    """Returns the error for one of several files that hold a model together."""
    first = PART.sub(r"-00001-of-\1.gguf", file.name)
    return UserError(
        f"{file} is one of {parts} parts of a model; merge them first, all in one folder: llama-gguf-split --merge "
        f"{file.with_name(first)} OUT.gguf (of llama.cpp), and give OUT.gguf"
    )


def _check_header(file: Path, newest: int, installed: str) -> None:
    """Raises UserError for a file of another byte order or version; what is no GGUF file at all is left to the library.

    Args:
      newest: newest version that the library reads; the oldest is 2.
      installed: the library, for messages.
    """
    with file.open("rb") as stream:
        start = stream.read(8)
    if start[:4] != MAGIC or len(start) < 8:
        return
    version = int.from_bytes(start[4:], sys.byteorder)
    # versions are small numbers, so that the bytes of one are in the wrong order where its lower half is 0
    if version & 0xFFFF == 0:
        order = "big" if sys.byteorder == "little" else "little"
        raise UserError(
            f"{file} is {order}-endian, for machines of another kind than this one; give the usual file, which is "
            f"{sys.byteorder}-endian, or convert a copy of it in place: gguf-convert-endian COPY.gguf {sys.byteorder}"
        )
    if not 2 <= version <= newest:
        raise UserError(
            f"{file} is of version {version} of GGUF, and {installed} reads 2 to {newest}; upgrade it (`pip install "
            f"--upgrade gguf`), or give a file that a current llama.cpp has made"
        )


def _is(value: Any, kind: type, least: int) -> bool:
    # Python counts True as an int
    if kind in (str, bool) or isinstance(value, bool):
        return type(value) is kind
    if kind is int:
        return isinstance(value, int) and value >= least
    return isinstance(value, int | float) and math.isfinite(value)
