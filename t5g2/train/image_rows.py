"""The images of a run's rows: their size and tokens follow from the model, and must agree with the tokenizer."""

from collections.abc import Mapping
from typing import Any

from t5g2.core import settings
from t5g2.core.errors import UserError
from t5g2.data.config import DataConfig
from t5g2.models.config import KINDS, ImageConfig, LanguageModelConfig

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


def _fields_of(images: ImageConfig) -> dict[str, int]:
    """Returns the fields of ImageRows that follow from a model."""
    places = {name: getattr(images, name) for name in NAMES}
    return {"size": images.vision.image_size, "tokens": images.tokens, **places}
