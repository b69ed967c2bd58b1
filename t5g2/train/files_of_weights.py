"""Files beside the weights that a run starts from, which belong to the model that it writes as well.

They are the settings of generation, the chat template, and those of the tokenizer and of the image processor. Without
them a model that was trained further would end its texts at other tokens than the one that it was trained from.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from t5g2.checkpoint import folder as folders
from t5g2.checkpoint import generation_ids, source_folder
from t5g2.core.errors import MachineError, UserError
from t5g2.core.logs import log
from t5g2.data import image_processor
from t5g2.data.images import ImageProcessor
from t5g2.data.tokenizers.base import Tokenizer
from t5g2.data.tokenizers.subword import FileTokenizer
from t5g2.train.experiment import Experiment
from t5g2.train.weight_origin import Init


class FilesOfWeights(NamedTuple):
    """Files to copy, the tokenizer's own among them, and plain data to write as JSON; None = no such file."""

    files: tuple[Path, ...]
    generation_config: dict[str, Any] | None
    image_processor: dict[str, Any] | None

    @property
    def json_files(self) -> dict[str, Any]:
        """File name -> plain data, as folders.save_leaves takes them."""
        return {
            generation_ids.GENERATION_FILE: self.generation_config,
            image_processor.PREPROCESSOR_FILE: self.image_processor,
        }


def read(init: Init, experiment: Experiment) -> FilesOfWeights:
    """Returns the files of the initial weights that fit a run: with another tokenizer, the image processor's alone.

    Images that a run has trained with are read as in training, whatever its first weights say.

    Raises:
      UserError: a file is damaged, or is a link that leads out of its folder; the tokenizer's file is gone, and no file
        beside the weights is the same.
    """
    tokenizer = experiment.data.tokenizer
    paths = [Path(path).absolute() for path in _folders(init)]
    # of two files with one name the later, the decoder's, stays
    by_name = {file.name: file for path in paths for file in folders.extra_files(path)}
    same, processor = _tokenizer_beside(tokenizer, by_name), _image_processor(init, experiment)
    own = {file.name: _there(file, same) for file in tokenizer.files}
    if processor is not None:
        by_name = {name: file for name, file in by_name.items() if name not in image_processor.FILES}
    if same is None:
        processor_files = {name: file for name, file in by_name.items() if name in image_processor.FILES}
        return FilesOfWeights(tuple((processor_files | own).values()), None, processor)
    return FilesOfWeights(tuple((by_name | own).values()), generation_ids.completed(paths[-1]), processor)


def read_or_warn(init: Init, experiment: Experiment) -> FilesOfWeights:
    """Returns the files as `read`; those of the run's own settings, with a warning, if the others are gone or damaged.

    Another warning says which of these are gone too. At the end of a run the weights are written in any case.
    """
    try:
        missing = [path for path in _folders(init) if not Path(path).is_dir()]
        if missing:
            raise UserError(f"{', '.join(missing)} does not exist any more")
        return read(init, experiment)
    except (UserError, MachineError) as error:
        log.warning(
            "the model folder has no settings of generation from the weights that the run began with: %s", error
        )
        own = tuple(file for file in experiment.data.tokenizer.files if file.is_file())
        for file in experiment.data.tokenizer.files:
            if file not in own:
                log.warning(
                    "the model folder has no %s: the file of the run's tokenizer, %s, does not exist any more; put the "
                    "same file into the model folder",
                    file.name,
                    file,
                )
        return FilesOfWeights(own, None, _image_processor(Init(), experiment))


def stop_ids(init: Init, experiment: Experiment) -> tuple[int, ...]:
    """Returns the tokens that end a text by the settings of the initial weights; none if they have no such setting."""
    ids = (read_or_warn(init, experiment).generation_config or {}).get("eos_token_id", ())
    return (ids,) if isinstance(ids, int) else tuple(ids or ())


def _folders(init: Init) -> list[str]:
    if init.adapt is not None:
        return [str(source_folder.folder_of(source)) for source in init.adapt.sources]
    return [] if init.params is None else [str(source_folder.folder_of(init.params))]


def _image_processor(init: Init, experiment: Experiment) -> dict[str, Any] | None:
    """Returns the preprocessor_config.json to write; None = the files of the initial weights are right."""
    images, rows = experiment.model.image_stack.images, experiment.data.images
    if images is None:
        return None
    vision = init.adapt.vision if init.adapt else None
    tower = None if vision is None else str(source_folder.folder_of(vision))
    paths = [*_folders(init), *([] if tower is None else [tower])]
    path = next((path for path in reversed(paths) if image_processor.has_files(Path(path))), None)
    original = ImageProcessor() if path is None else image_processor.read(Path(path), default="bilinear")
    # training makes the values of the default (image_rows.check_processor)
    processor = original if rows is None else ImageProcessor(rows.resampling)
    is_copied = path is None or path != tower
    return None if is_copied and processor == original else image_processor.to_dict(processor, images.vision.image_size)


def _tokenizer_beside(tokenizer: Tokenizer, by_name: dict[str, Path]) -> Path | None:
    """Returns the file of the weights' folder that is the tokenizer's; None if there is none."""
    if not isinstance(tokenizer, FileTokenizer):
        return None
    beside = [by_name[name] for name in generation_ids.TOKENIZER_FILES if name in by_name]
    return next((file for file in beside if hashlib.sha256(file.read_bytes()).hexdigest() == tokenizer.sha256), None)


def _there(file: Path, same: Path | None) -> Path:
    """Returns a tokenizer's file, or the same one beside the weights if it is gone, as from a cache.

    Raises:
      UserError: neither is there.
    """
    if file.is_file():
        return file
    if same is None or same.name != file.name:
        raise UserError(f"{file}, the file of the run's tokenizer, does not exist any more; put it back")
    return same
