"""The one place where a source that a user gives becomes a folder of this machine."""

from os import PathLike
from pathlib import Path

from t5g2.checkpoint import gguf_folder, hub


def local(source: str | PathLike) -> str | PathLike:
    """Returns the folder or file of an address of the hub; any other source as it is.

    Raises:
      UserError, MachineError: as hub.snapshot.
    """
    return hub.snapshot(source) if isinstance(source, str) and hub.is_address(source) else source


def folder_of(source: str | PathLike) -> Path:
    """Returns the folder of a source, which may be at the hub, and of a GGUF file the one with its tokenizer.

    Raises:
      UserError, MachineError: as hub.snapshot and gguf_folder.folder_of.
    """
    return gguf_folder.folder_of(local(source))


def recorded(source: str | PathLike) -> str:
    """Returns what records and messages name a source by: its folder, its GGUF file, or its address with the commit.

    Raises:
      UserError, MachineError: as folder_of.
    """
    path = Path(local(source)).expanduser().absolute()
    return hub.recorded(gguf_folder.file_of(path) or path)


def pinned(source: str) -> str:
    """Returns an address of the hub with its commit; any other source as it is, or several separated by commas.

    Raises:
      UserError, MachineError: as hub.pinned.
    """
    parts = source.split(",") if hub.SCHEME in source else [source]
    return ",".join(hub.pinned(part) if hub.is_address(part) else part for part in parts)


def exists(source: str) -> bool:
    """True if a source is there; of the hub's models it is assumed."""
    return hub.is_address(source) or Path(source).expanduser().exists()
