"""The images of a run's rows: their size and tokens follow from the model, and must agree with the tokenizer."""

from collections.abc import Mapping
from typing import Any

from t5g2.checkpoint import source_folder
from t5g2.core import settings
from t5g2.core.errors import UserError
from t5g2.core.logs import log
from t5g2.data import image_processor
from t5g2.data.config import DataConfig
from t5g2.data.image_tokens import ImageRows
from t5g2.models.config import KINDS, ImageConfig, LanguageModelConfig
from t5g2.train.weight_origin import Init

NAMES = {"token": "image", "begin": "start_of_image", "end": "end_of_image"}


def completed(node: Mapping[str, Any]) -> dict[str, Any]:
    """Fills in the fields of data.images that follow from the model; `per_row` is left as it is.

    Args:
      node: an experiment as plain data.
    """
    node, data = dict(node), node.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("images"), Mapping) or "model" not in node:
        return node
    model = settings.build(LanguageModelConfig, node["model"], where="config.model", tables=(KINDS,))
    images = model.image_stack.images
    if images is not None:
        # a value in the file wins, so that `check` can report a contradiction
        node["data"] = {**data, "images": _fields_of(images) | data["images"]}
    return node


def check(model: LanguageModelConfig, data: DataConfig) -> None:
    """Raises UserError if the rows have images and the model has no tower, other sizes or other image tokens."""
    rows, images = data.images, model.image_stack.images
    if rows is None:
        return
    if images is None:
        raise UserError(
            "data.images is set, and the model has no image tower; leave it out, or take a model that has one "
            "(gemma3:4b and larger, t5gemma2, or model.encoder.images)"
        )
    expected = _fields_of(images)
    differ = {name: getattr(rows, name) for name, value in expected.items() if getattr(rows, name) != value}
    if differ:
        raise UserError(f"data.images has {differ}, and the model {expected}; give per_row and resampling alone")
    # the data workers insert the tokens by name, the model finds the images by id
    named = data.tokenizer.named()
    wrong = {name: named.get(name) for field, name in NAMES.items() if named.get(name) != expected[field]}
    if wrong:
        model_tokens = {name: expected[field] for field, name in NAMES.items()}
        raise UserError(
            f"the tokenizer has {wrong} and the model {model_tokens}; set tokenizer.ids = "
            f"{[list(item) for item in model_tokens.items()]}, or give the model those of the tokenizer "
            f"(images.token, begin, end)"
        )


def check_processor(rows: ImageRows | None, init: Init) -> None:
    """Checks that the tower of the initial weights reads images as training makes them; another resampling is logged.

    Raises:
      UserError: the folder's image processor makes other values than x / 127.5 - 1, or is not supported.
    """
    folder = init.params
    if init.adapt is not None:
        folder = init.adapt.vision or init.adapt.sources[0]
    if rows is None or folder is None:
        return
    processor = image_processor.read(source_folder.folder_of(folder), default=rows.resampling)
    if not processor.is_default:
        low, high = processor.limits
        raise UserError(
            f"the image processor of {folder} gives pixels from {low:.4g} to {high:.4g} (mean {list(processor.mean)}, "
            f"std {list(processor.std)}, scale {processor.scale:.4g}); training reads them as x / 127.5 - 1, from -1 "
            f"to 1. Take weights whose processor has mean and std 0.5 and scale 1/255"
        )
    if processor.resampling != rows.resampling:
        log.warning(
            "images are resized by data.images.resampling = %s, and by %s in the image processor of %s; the model "
            "that is written has the first",
            rows.resampling,
            processor.resampling,
            folder,
        )


def _fields_of(images: ImageConfig) -> dict[str, int]:
    """Returns the fields of ImageRows that follow from a model."""
    places = {name: getattr(images, name) for name in NAMES}
    return {"size": images.vision.image_size, "tokens": images.tokens, **places}
