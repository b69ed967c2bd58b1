"""Files beside the weights that a run starts from, which belong to the model that it writes as well.

They are the settings of generation, the chat template, and those of the tokenizer and of the image processor. Without
them a model that was trained further would end its texts at other tokens than the one that it was trained from.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from t5g2.checkpoint import folder as folders
from t5g2.checkpoint import generation_ids
from t5g2.core.errors import UserError
from t5g2.core.logs import log
from t5g2.data.image_processor import PREPROCESSOR_FILE, PROCESSOR_FILE
from t5g2.data.tokenizers.base import Tokenizer
from t5g2.data.tokenizers.subword import FileTokenizer
from t5g2.train.weight_origin import Init


class FilesOfWeights(NamedTuple):
    """Files to copy, the tokenizer's own among them, and the generation_config.json to write; None = none."""

    files: tuple[Path, ...]
    generation_config: dict[str, Any] | None


def read(init: Init, tokenizer: Tokenizer) -> FilesOfWeights:
    """Returns the files of the initial weights that fit a run's tokenizer: with another one, the processor's alone.

    Raises:
      UserError: a file is damaged, or is a link that leads out of its folder.
    """
    paths = [Path(path).absolute() for path in _folders(init)]
    # of two files with one name the later, the decoder's, stays
    by_name = {file.name: file for path in paths for file in folders.extra_files(path)}
    own = {file.name: file for file in tokenizer.files}
    if not _is_beside(tokenizer, by_name):
        processors = {name: file for name, file in by_name.items() if name in (PREPROCESSOR_FILE, PROCESSOR_FILE)}
        return FilesOfWeights(tuple((processors | own).values()), None)
    return FilesOfWeights(tuple((by_name | own).values()), generation_ids.completed(paths[-1]))


def read_or_warn(init: Init, tokenizer: Tokenizer) -> FilesOfWeights:
    """Returns the files as `read`; those of the tokenizer alone, with a warning, if the others are gone or damaged.

    At the end of a run the weights are written in any case.
    """
    try:
        missing = [path for path in _folders(init) if not Path(path).is_dir()]
        if missing:
            raise UserError(f"{', '.join(missing)} does not exist any more")
        return read(init, tokenizer)
    except UserError as error:
        log.warning(
            "the model folder has no settings of generation from the weights that the run began with: %s", error
        )
        return FilesOfWeights(tokenizer.files, None)


def stop_ids(init: Init, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens that end a text by the settings of the initial weights; none if they have no such setting."""
    ids = (read_or_warn(init, tokenizer).generation_config or {}).get("eos_token_id", ())
    return (ids,) if isinstance(ids, int) else tuple(ids or ())


def _folders(init: Init) -> list[str]:
    if init.adapt is not None:
        return init.adapt.sources
    return [] if init.params is None else [init.params]


def _is_beside(tokenizer: Tokenizer, by_name: dict[str, Path]) -> bool:
    """True if a file of the weights' folder is the tokenizer's."""
    files = [by_name[name] for name in generation_ids.TOKENIZER_FILES if name in by_name]
    return isinstance(tokenizer, FileTokenizer) and any(
        hashlib.sha256(file.read_bytes()).hexdigest() == tokenizer.sha256 for file in files
    )
