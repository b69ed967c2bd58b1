"""What the images of a run's rows are: follows from the model, and must be what the tokenizer says."""

from collections.abc import Mapping
from typing import Any

from t5g2.core import settings
from t5g2.core.errors import UserError
from t5g2.data.config import DataConfig
from t5g2.models.config import KINDS, EncoderDecoderConfig, ImageConfig, TextConfig

LanguageModel = TextConfig | EncoderDecoderConfig
NAMES = {"token": "image", "begin": "start_of_image", "end": "end_of_image"}


def completed(node: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment as plain data, with all of data.images if it has any: how many a row holds is given there, and what
    they are is the model's.
    """
    node, data = dict(node), node.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("images"), Mapping) or "model" not in node:
        return node
    model = settings.build(LanguageModel, node["model"], where="config.model", tables=(KINDS,))
    images = images_of(model)
    if images is not None:
        node["data"] = {**data, "images": _facts(images) | data["images"]}
    return node


def check(model: LanguageModel, data: DataConfig) -> None:
    """Raises UserError if the model reads no images, or others than the rows have, or other tokens for them."""
    rows, images = data.images, images_of(model)
    if rows is None:
        return
    if images is None:
        raise UserError(
            "data.images is set, and the model has no image tower; leave it out, or take a model that has one "
            "(gemma3:4b and larger, t5gemma2, or model.encoder.images)"
        )
    facts = _facts(images)
    differ = {name: getattr(rows, name) for name, value in facts.items() if getattr(rows, name) != value}
    if differ:
        raise UserError(f"data.images has {differ}, and the model {facts}; give per_row and resampling alone")
    named = data.tokenizer.named()
    wrong = {name: named.get(name) for field, name in NAMES.items() if named.get(name) != facts[field]}
    if wrong:
        ours = {name: facts[field] for field, name in NAMES.items()}
        raise UserError(
            f"the tokenizer has {wrong} and the model {ours}; say which ids they are, tokenizer.ids = "
            f"{[list(item) for item in ours.items()]}, or give the model those of the tokenizer (images.token, begin, "
            f"end)"
        )


def images_of(model: LanguageModel) -> ImageConfig | None:
    """How images enter a model, if they do."""
    return model.encoder.images if isinstance(model, EncoderDecoderConfig) else model.images


def _facts(images: ImageConfig) -> dict[str, int]:
    """The fields of ImageRows that follow from a model."""
    places = {name: getattr(images, name) for name in NAMES}
    return {"size": images.vision.image_size, "tokens": images.tokens, **places}
