"""Where every weight of an adapted model comes from: one table per recipe, read from top to bottom.

Gemma 3 to T5Gemma 2 (arXiv 2512.14856, section 2). Merged attention was made so that this works: the decoder's queries
and its own keys and values come from the source's matrices, and the encoder's states go through the same ones, so there
is nothing new. Encoder and decoder both begin as the source, and the one embedding as its embedding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import numpy as np

from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.models.config import EncoderDecoderConfig, ModelConfig, Rope, TextConfig

How = Literal["copied", "tied", "derived", "initialised"]


@dataclass(frozen=True)
class Rule:
    """Target leaves whose path fits `target` come from the source leaf `source` of the same layer.

    Attributes:
      target, source: paths. A `*` at the end of both stands for the same text. Source None = from nowhere, initialised.
      how: "copied" = unchanged; "tied" = unchanged, and the one leaf that several parts of the target share;
        "derived" = computed by `derive`; "initialised" = as in a new model.
      note: what a reader should know.
      derive: (the source leaf's array, the target's config) -> the target leaf's array.
    """

    target: str
    how: How
    source: str | None
    note: str = ""
    derive: Callable[[np.ndarray, Any], np.ndarray] | None = None

    def __post_init__(self):
        assert (self.source is None) == (self.how == "initialised"), self
        assert (self.derive is not None) == (self.how == "derived"), self
        assert self.source is None or self.target.endswith("*") == self.source.endswith("*"), self

    def fits(self, path: str) -> bool:
        """Whether the rule is about this target path."""
        return tree.select(self.target, path)

    def source_of(self, path: str) -> str | None:
        """The source path for a target path that fits."""
        if self.source is None or not self.source.endswith("*"):
            return self.source
        return self.source[:-1] + path.removeprefix(self.target[:-1])


@dataclass(frozen=True)
class Recipe:
    """How one kind of model becomes another.

    Attributes:
      rules: the first that fits a target leaf says where it comes from; a leaf that none fits is an error.
      dropped: patterns of source leaves that are left behind on purpose; any other unused one is an error.
    """

    name: str
    rules: Sequence[Rule]
    dropped: Sequence[str] = ()


def eoi(table_VD: np.ndarray, config: EncoderDecoderConfig) -> np.ndarray:
    """The end-of-image vector: its row of the table as the source embeds it, times sqrt(D), so that nothing changes.

    The scale is rounded to the dtype of the weights first, as the embedding does when it computes in that dtype.
    """
    row_D = table_VD[config.eoi_id]
    return row_D * np.asarray(math.sqrt(row_D.shape[0]), row_D.dtype)


T5GEMMA2_FROM_GEMMA3 = Recipe(
    "gemma3 -> t5gemma2",
    rules=(
        Rule("embedder.table", "tied", "embedder.table", "encoder input, decoder input, output head"),
        Rule("embedder.eoi", "derived", "embedder.table", "row eoi_id * sqrt(width)", eoi),
        Rule("encoder.layers.*", "copied", "layers.*"),
        Rule("encoder.final_norm.scale", "copied", "final_norm.scale"),
        Rule("decoder.layers.*", "copied", "layers.*"),
        Rule("decoder.final_norm.scale", "copied", "final_norm.scale"),
    ),
)


def target_config(
    source: ModelConfig, *, rope_factor: float | None = None, eoi_id: int | None = None
) -> EncoderDecoderConfig:
    """The T5Gemma 2 architecture of a Gemma 3 source: its blocks, as encoder and as decoder.

    Args:
      source: the decoder-only architecture.
      rope_factor: of the global layers, which all released T5Gemma 2 have at 8, also where the source has 1; None = as
        in the source, so that the adapted decoder computes what the source does.
      eoi_id: the token whose input embedding becomes a vector of its own (released: 256000); None = no such token.

    Raises:
      UserError: the source is not a decoder-only Gemma 3.
    """
    if not isinstance(source, TextConfig):
        raise UserError("the source is an encoder-decoder model already; give a decoder-only one")
    if not source.qk_norm or source.attention_softcap or source.final_softcap:
        raise UserError(
            "the source is a Gemma 2 (no query-key norm, or soft caps); T5Gemma 2 has Gemma 3 blocks, so give a Gemma 3"
        )
    rope = source.rope_global if rope_factor is None else Rope(source.rope_global.base, rope_factor)
    stack = replace(source, rope_global=rope)
    return EncoderDecoderConfig(encoder=stack, decoder=stack, eoi_id=eoi_id)


# What the shapes of weights follow from; these cannot differ between source and target.
_SHAPES = ("vocab_size", "width", "layers", "mlp_width", "heads", "kv_heads", "head_size", "qk_norm")


def check(source: ModelConfig, target: ModelConfig) -> tuple[str, ...]:
    """The settings that the target has otherwise than the source, as lines; its weights serve it all the same.

    Raises:
      UserError: the source's weights do not fit the target; with both values of every setting that differs.
    """
    if not isinstance(source, TextConfig) or not isinstance(target, EncoderDecoderConfig):
        raise UserError(
            f"cannot adapt {type(source).__name__} to {type(target).__name__}; give a decoder-only source (gemma3) "
            f"and an encoder-decoder target (t5gemma2)"
        )
    kept, wrong = [], []
    for side in ("encoder", "decoder"):
        for name, was, becomes in _differences(source, getattr(target, side)):
            line = f"{side}.{name}: {was} in the source, {becomes} in the target"
            (wrong if name in _SHAPES else kept).append(line)
    if wrong:
        raise UserError(
            "the source's weights do not fit the target:\n  "
            + "\n  ".join(wrong)
            + "\nChoose a target of the source's "
            "sizes; --target=t5gemma2 derives it from the source"
        )
    return tuple(kept)


def _differences(a: Any, b: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if is_dataclass(x) and is_dataclass(y):
            found += _differences(x, y, f"{prefix}{field.name}.")
        elif x != y:
            found.append((f"{prefix}{field.name}", x, y))
    return found
