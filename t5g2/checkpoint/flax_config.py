"""Finds the architecture of an official Flax tree, which has no config file, among the released sizes."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from t5g2.checkpoint import flax_names, names
from t5g2.checkpoint.names import TensorFormat
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.core.tree import Shape
from t5g2.models import build, sizes
from t5g2.models.config import EncoderDecoderConfig, ModelConfig, TextConfig

# transformers adds rows after these, for the image token
GEMMA3_FLAX_ROWS = 262_144


def find(origin: str, tensor_format: TensorFormat, shapes: Mapping[str, Shape]) -> ModelConfig:
    """Returns the released size whose tensors have exactly these names and shapes.

    Args:
      origin: what messages name the weights by.

    Raises:
      UserError: there is none, or there are several.
    """
    fitting: dict[str, ModelConfig] = {}
    for name, config in _candidates(tensor_format, shapes):
        matches = names.match_tensors(tensor_format, tree.leaves(build.abstract(config)), shapes)
        # sizes that differ in name alone (a base model and its instruction-tuned one) are one architecture
        if {match.name: match.shape for match in matches} == shapes and config not in fitting.values():
            fitting[name] = config
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    tables = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()) if "input_embedding" in name)
    layers = len({match for name in shapes for match in re.findall(r"(?:\w+coder/)?layer_\d+/", name)})
    result = f"could be any of {', '.join(fitting)}" if fitting else "is none of the released sizes"
    raise UserError(
        f"{origin} ({tensor_format.title}: {tables or 'no embedding'}; {layers} layers) {result}; name its "
        f"architecture: config = a size's name, such as gemma3:1b, or a file like model.json"
    )


def _candidates(tensor_format: TensorFormat, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, ModelConfig]]:
    """Yields (name, config) of the released sizes with the width and depth of the tree, with images if it has them.

    Width and depth are looked up directly, because comparing all leaves of every size takes seconds.
    """
    has_images = any(name.startswith("vision_encoder/") for name in shapes)
    for name, config in sizes.SIZES.items():
        if isinstance(config, TextConfig) and tensor_format is flax_names.GEMMA:
            rows = min(config.vocab_size, GEMMA3_FLAX_ROWS)
            candidate = replace(config, vocab_size=rows, images=config.images if has_images else None)
            tables, last_layer = {"embedder/input_embedding": candidate.width}, f"layer_{candidate.layers - 1}/"
        elif (
            isinstance(config, EncoderDecoderConfig)
            and config.cross == "separate"
            and tensor_format is flax_names.T5GEMMA
        ):
            candidate = config
            tables = {
                f"{side}/embedder/input_embedding": getattr(config, side).width for side in ("encoder", "decoder")
            }
            last_layer = f"decoder/layer_{config.decoder.layers - 1}/"
        else:
            continue
        widths = {table: shapes[table][1] for table in tables if table in shapes}
        if widths == tables and any(name.startswith(last_layer) for name in shapes):
            yield name, candidate
