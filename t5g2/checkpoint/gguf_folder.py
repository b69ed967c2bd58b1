"""GGUF files as Hugging Face folders: what a file holds beside its weights is written once, to the cache of a machine.

Such a folder has config.json, generation_config.json, tokenizer.json, a chat template, and in gguf.json the file with
the place of each tensor in it, so that the weights are read from the file itself, and its metadata, hundreds of
thousands of pieces, once. The folders of one file, as it was at different times and is on different machines, stand in
one folder; when another is made, those go that nobody has used for a day.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from os import PathLike
from pathlib import Path
from typing import Any

from t5g2.checkpoint import flax_tree, gguf_file, gguf_metadata
from t5g2.checkpoint.bos import TOKENIZER_FILE
from t5g2.checkpoint.generation_ids import GENERATION_FILE
from t5g2.checkpoint.gguf_file import StoredTensor
from t5g2.checkpoint.hf_config_fields import CONFIG_FILE
from t5g2.checkpoint.tensor import Tensor
from t5g2.core import files
from t5g2.core.errors import UserError

INDEX = "gguf.json"
# of what is written here: another number makes the folders anew
VERSION = 2
CHAT_TEMPLATE_FILE = "chat_template.jinja"


@dataclasses.dataclass(frozen=True)
class GgufSource:
    """The file of a folder.

    Attributes:
      file: the file.
      notes: what was assumed, and how the weights are quantised.
      tensors: the tensors by the names of a Hugging Face folder, none of them read yet.
    """

    file: Path
    notes: tuple[str, ...]
    tensors: dict[str, Tensor]


def file_of(path: str | PathLike) -> Path | None:
    """Returns the GGUF file that a path names, or that a folder holds and no other weights; None of any other path.

    Raises:
      UserError: there are several files in the folder, or a config.json as well.
    """
    given = Path(path).expanduser().absolute()
    return given if gguf_metadata.is_gguf(given) else _only_file(given)


def folder_of(path: str | PathLike) -> Path:
    """Returns the folder of a GGUF file, or of a folder that holds one and no other weights; any other path as it is.

    Raises:
      UserError: there are several files in the folder, or a config.json as well; as gguf_file.describe.
    """
    file = file_of(path)
    if file is None:
        return Path(path).expanduser().absolute()
    of_file = files.cache_folder() / "gguf" / _digest(str(file.resolve()))
    folder = of_file / _digest(json.dumps([VERSION, *gguf_file.state(file.stat())]))
    if not _marked_as_used(folder):
        files.make_folder(of_file)
        with files.locked(of_file.with_suffix(".lock")):
            if not _marked_as_used(folder):
                # what a removal that was cut short has left
                shutil.rmtree(folder, ignore_errors=True)
                _write(folder, file)
                _remove_unused(folder)
    return folder


def source_of(folder: Path) -> GgufSource | None:
    """Returns the file that a folder of `folder_of` stands for; None of any other folder.

    Raises:
      UserError: the file is gone or has changed.
    """
    if not (folder / INDEX).is_file():
        return None
    index = files.read_json_object(folder / INDEX, fix="remove the folder")
    file = Path(index["file"])
    state = index["size"], index["mtime_ns"]
    if not file.is_file() or gguf_file.state(file.stat()) != state:
        raise UserError(f"{file} is gone or has changed since {folder} was made of it; give the file again")
    entries = index["tensors"].items()
    stored = {name: StoredTensor(kind, tuple(shape), *place) for name, (kind, shape, *place) in entries}
    return GgufSource(file, tuple(index["notes"]), gguf_file.read_tensors(file, stored, state))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _only_file(folder: Path) -> Path | None:
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".gguf") if folder.is_dir() else []
    if not found or any(folder.glob("*.safetensors")) or flax_tree.is_flax(folder):
        return None
    if len(found) > 1:
        parts = {match[1] for file in found if (match := gguf_metadata.PART.search(file.name))}
        if len(parts) == 1 and all(gguf_metadata.PART.search(file.name) for file in found):
            raise gguf_metadata.part_of_several(found[0], int(parts.pop()))
        names = ", ".join(file.name for file in found[:4])
        raise UserError(f"{folder} holds {len(found)} GGUF files ({names}); give one of them")
    if (folder / CONFIG_FILE).exists():
        raise UserError(
            f"{folder} holds {found[0].name}, which has a config of its own, and a {CONFIG_FILE}, which may be that of "
            f"another model; give the file itself: {found[0]}"
        )
    return found[0]


def _marked_as_used(folder: Path) -> bool:
    """Marks a folder as used now, by the time of its index; False if it is not there."""
    try:
        os.utime(folder / INDEX)
    except FileNotFoundError:
        return False
    except OSError:  # a cache that others may write, or that nobody may
        return (folder / INDEX).is_file()
    return True


def _remove_unused(folder: Path) -> None:
    """Removes the folders beside one, made of the file when it was another one, that have not been used for long.

    Others may be read now: by a run that began before the file changed, or by a machine that has the file with another
    time.
    """
    for other in folder.parent.iterdir():
        # those with a point are being written, or left by a writer that was killed
        if other != folder and not other.name.startswith(".") and _unused_secs(other) >= files.ABANDONED_SECS:
            shutil.rmtree(other, ignore_errors=True)


def _unused_secs(folder: Path) -> float:
    mark = folder / INDEX
    with contextlib.suppress(OSError):  # another process has removed it
        return time.time() - (mark if mark.exists() else folder).stat().st_mtime
    return 0.0


def _write(folder: Path, file: Path) -> None:
    size, mtime_ns = gguf_file.state(file.stat())
    described = gguf_file.describe(file)
    index: dict[str, Any] = {
        # at the hub, several commits may have the same file: links to it come and go
        "file": str(file.resolve()),
        "size": size,
        "mtime_ns": mtime_ns,
        "notes": described.notes,
        "tensors": described.tensors,
    }
    contents = {
        CONFIG_FILE: described.config,
        GENERATION_FILE: described.generation,
        TOKENIZER_FILE: described.tokenizer,
        INDEX: index,
    }
    with files.new_folder(folder) as part:
        for name, value in contents.items():
            files.write_json(part / name, value)
        if described.chat_template:
            files.write_text(part / CHAT_TEMPLATE_FILE, described.chat_template)
