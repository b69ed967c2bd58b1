"""GGUF files as Hugging Face folders: what a file holds beside its weights is written once, to the cache of a machine.

Such a folder has config.json, generation_config.json, tokenizer.json, a chat template, and in gguf.json the file with
the place of each tensor in it, so that the weights are read from the file itself, and its metadata, hundreds of
thousands of pieces, once.
"""

import dataclasses
import hashlib
import json
from os import PathLike
from pathlib import Path
from typing import Any

from t5g2.checkpoint import gguf_file
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
      UserError: there are several files in the folder.
    """
    given = Path(path).expanduser().absolute()
    return given if given.is_file() and given.suffix == ".gguf" else _only_file(given)


def folder_of(path: str | PathLike) -> Path:
    """Returns the folder of a GGUF file, or of a folder that holds one and no other weights; any other path as it is.

    Raises:
      UserError: there are several files in the folder; as gguf_file.describe.
    """
    file = file_of(path)
    if file is None:
        return Path(path).expanduser().absolute()
    stat = file.stat()
    identity = json.dumps([VERSION, str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    folder = files.cache_folder() / "gguf" / hashlib.sha256(identity.encode()).hexdigest()[:16]
    if not (folder / INDEX).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(folder.with_name(f"{folder.name}.lock")):
            if not (folder / INDEX).is_file():
                _write(folder, file)
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
    if not file.is_file() or file.stat().st_size != index["size"]:
        raise UserError(f"{file} is gone or has changed since {folder} was made of it; give the file again")
    entries = index["tensors"].items()
    stored = {name: StoredTensor(kind, tuple(shape), *place) for name, (kind, shape, *place) in entries}
    return GgufSource(file, tuple(index["notes"]), gguf_file.read_tensors(file, stored))


def _only_file(folder: Path) -> Path | None:
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return None
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise UserError(f"{folder} holds {len(found)} GGUF files ({names}); give one of them")
    return found[0] if found else None


def _write(folder: Path, file: Path) -> None:
    described = gguf_file.describe(file)
    index: dict[str, Any] = {
        "file": str(file),
        "size": file.stat().st_size,
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
