"""Recognises folders and files that hold no model that can be read, and what to do with each."""

import fnmatch
import os
import re
from pathlib import Path

from t5g2.checkpoint import hub
from t5g2.checkpoint.folder import EXTRA_FILES
from t5g2.checkpoint.hf_config_fields import CONFIG_FILE
from t5g2.core.errors import UserError

WORKDIR = "experiment.json"
HUB_URL = re.compile(r"https?://(www\.)?(huggingface\.co|hf\.co)/([^/]+/[^/?#]+).*")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
FILES_OF_A_MODEL = (CONFIG_FILE, "*.safetensors", "*.safetensors.index.json", *EXTRA_FILES)
OPEN_CLIP = ("open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def refuse(directory: str | os.PathLike) -> None:
    """Checks that a path is a folder that may hold a model.

    Raises:
      UserError: it is none, or is known to be something else; the message has what to give instead.
    """
    path = Path(directory).expanduser().absolute()
    # of a model of the hub its address: its folder in the cache is not what the user gave
    origin = hub.recorded(path)
    if path.is_file():
        raise UserError(f"{origin} is a file; give the folder that it is in")
    if not path.is_dir():
        raise _missing(str(directory), path)
    if (path / WORKDIR).is_file():
        raise UserError(
            f"{origin} is the workdir of a run: it has an {WORKDIR}. Its model folder is {hub.recorded(path / 'model')}"
        )
    _refuse_cache(path)
    _refuse_dangling(path)
    if (path / "adapter_config.json").is_file() and not (path / CONFIG_FILE).is_file():
        raise UserError(
            f"{origin} is an adapter (peft), changes to the weights of another model; merge the two and give the "
            f"result: AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(OUT)"
        )
    if any((path / name).is_file() for name in OPEN_CLIP) and not (path / CONFIG_FILE).is_file():
        raise UserError(
            f"{origin} is a folder of open_clip, whose tensors have other names; give the same model as transformers "
            f"has it, such as google/siglip-so400m-patch14-384 for ViT-SO400M-14-SigLIP-384"
        )


def _missing(given: str, path: Path) -> UserError:
    if path.is_symlink():
        return UserError(f"{path} is a link to {os.readlink(path)}, which does not exist; give another folder")
    address = HUB_URL.fullmatch(given)
    if address:
        return UserError(
            f"{given} is a page of Hugging Face's hub; to have the model downloaded into the hub's cache, give "
            f"hf://{address[3]}"
        )
    if HUB_ID.fullmatch(given) and not path.parent.is_dir():
        return UserError(
            f"{path} does not exist; if {given} is a model of Hugging Face's hub, give hf://{given}, and it is "
            f"downloaded into the hub's cache"
        )
    return UserError(
        f"{path} does not exist; give a Hugging Face folder, an official Flax one or a model folder, a GGUF file, or a "
        f"model of the hub: hf://OWNER/NAME"
    )


def _refuse_cache(path: Path) -> None:
    """Raises UserError for the folder of a model in the hub's cache, and for one of such folders."""
    if path.name == "snapshots" and path.parent.name.startswith("models--"):
        path = path.parent
    if (path / "snapshots").is_dir() and not (path / CONFIG_FILE).exists():
        snapshots = sorted(folder for folder in (path / "snapshots").iterdir() if folder.is_dir())
        main = path / "refs" / "main"
        current = path / "snapshots" / main.read_text().strip() if main.is_file() else None
        give = current if current in snapshots else next(iter(snapshots), None)
        raise UserError(
            f"{path} is a model's folder in the hub's cache, in which each version has a folder of its own; "
            + (f"give {give}" if give else "none has been downloaded, so download the model again")
        )
    models = sorted(folder.name for folder in path.glob("models--*") if folder.is_dir())
    if models and not (path / CONFIG_FILE).exists():
        shown = ", ".join(models[:4]) + (" and others" if len(models) > 4 else "")
        raise UserError(f"{path} is the hub's cache, with {shown}; give the folder MODEL/snapshots/HASH of one of them")


def _refuse_dangling(path: Path) -> None:
    """Raises UserError if a file of the model is a link to one that is gone, as in a hub's cache that was pruned."""
    # glob passes over links to nothing
    for file in sorted(path.iterdir()):
        is_of_model = any(fnmatch.fnmatch(file.name, pattern) for pattern in FILES_OF_A_MODEL)
        if is_of_model and file.is_symlink() and not file.exists():
            raise UserError(f"{file} is a link to {os.readlink(file)}, which does not exist; download the model again")
