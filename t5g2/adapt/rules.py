"""Rules for the origin of every weight of an adapted model: one table for all recipes, read from top to bottom.

A target leaf is computed by the first rule whose pattern matches its path and whose condition holds; a source leaf
that is not used needs a `Drop` that matches it. A leaf that no rule matches, on either side, is an error.

Gemma 3 to T5Gemma 2 (arXiv 2512.14856, section 2): merged attention is designed so that no weight is new. The decoder's
queries and its own keys and values come from the source's matrices, and the encoder's states go through the same ones.
Gemma 2 to T5Gemma (arXiv 2504.06225, section 3.2): both sides are copies of the source; cross-attention is copied from
self-attention where the widths allow it. Recipes between these two follow from the same table with other settings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from t5g2.adapt.pairing import Pairing, SourceModel
from t5g2.adapt.shape_changes import HEADS, POSITIONS, ROWS, ShapeChange, end_of_image_vector, scaled_norm
from t5g2.core import tree

Operation = Literal["copied", "tied", "derived", "initialised"]
Origin = Literal["encoder", "decoder", "vision"]
Condition = Callable[[Pairing], bool]


def always(pairing: Pairing) -> bool:
    """Condition that holds for every pairing."""
    del pairing
    return True


@dataclass(frozen=True)
class Rule:
    """Rule that computes target leaves whose path matches `target` from the leaf `source` of one of the sources.

    Attributes:
      target, source: paths. A `*` at the end of both stands for the same text. Source None = the leaf is new.
      operation: "copied" = unchanged; "tied" = unchanged, and shared by several parts of the target; "derived" =
        computed; "initialised" = by the leaf's own initialiser.
      origin: the source that is used: the encoder's, the decoder's, or the image tower's.
      note: description for the provenance table, with the names of options in braces, which stand for their values.
      shape_change: computes a leaf of another shape, which is then "derived"; None = the shapes must be equal.
      derive: (value of the source leaf, pairing) -> value of a "derived" leaf.
      value: value of all entries of an "initialised" leaf, in place of its initialiser.
      when: condition under which the rule applies.
    """

    target: str
    operation: Operation
    origin: Origin | None = None
    source: str | None = None
    note: str = ""
    shape_change: ShapeChange | None = None
    derive: Callable[[np.ndarray, Pairing], np.ndarray] | None = None
    value: float | None = None
    when: Condition = always

    def __post_init__(self):
        assert (self.source is None) == (self.operation == "initialised") == (self.origin is None), self
        assert (self.derive is None) == (self.operation != "derived"), self
        assert self.source is None or self.target.endswith("*") == self.source.endswith("*"), self

    def source_of(self, path: str) -> str | None:
        """Returns the source path for a target path that matches."""
        if self.source is None or not self.source.endswith("*"):
            return self.source
        return self.source[:-1] + path.removeprefix(self.target[:-1])

    def note_for(self, pairing: Pairing) -> str:
        """Returns the note of an adaptation."""
        return self.note.format_map(vars(pairing.options))


@dataclass(frozen=True)
class Drop:
    """Rule that source leaves of an origin whose path matches are dropped on purpose, if the condition holds."""

    origin: Origin
    pattern: str
    reason: str
    when: Condition = always


def _cross_is_copied(pairing: Pairing) -> bool:
    return pairing.copies_cross_attention


def _cross_norms(*choices: str) -> Condition:
    return lambda pairing: pairing.options.cross_norms in choices


def _scales_encoder(pairing: Pairing) -> bool:
    return pairing.options.encoder_scale != 1.0


def _end_of_image(table_VD: np.ndarray, pairing: Pairing) -> np.ndarray:
    assert pairing.target.eoi_id is not None
    return end_of_image_vector(table_VD, pairing.target.eoi_id)


def _scaled_encoder_norm(scale_D: np.ndarray, pairing: Pairing) -> np.ndarray:
    return scaled_norm(scale_D, pairing.options.encoder_scale)


def _own_head(pairing: Pairing) -> bool:
    """True if the decoder's source has an output head apart from its embedding."""
    return ("unembedder.table", None) in pairing.sources.decoder.leaves


def _own_tower(pairing: Pairing) -> bool:
    return pairing.sources.vision is None


def _other_tower(pairing: Pairing) -> bool:
    return pairing.sources.vision is not None


def _two_sources(pairing: Pairing) -> bool:
    return pairing.sources.encoder is not pairing.sources.decoder


def _two_sources_tied(pairing: Pairing) -> bool:
    return _two_sources(pairing) and pairing.target.tied_embedding


def _no_images(pairing: Pairing) -> bool:
    return pairing.target.encoder.images is None


EOI = "row eoi_id * sqrt(width)"
NEW_NORMS = "as in self-attention"
RULES = (
    # embeddings and head
    Rule("embedder.table", "tied", "decoder", "embedder.table", "encoder input, decoder input, output head", ROWS),
    Rule("encoder_embedder.table", "copied", "encoder", "embedder.table", "encoder input", ROWS),
    Rule("decoder_embedder.table", "copied", "decoder", "embedder.table", "decoder input, output head", ROWS),
    Rule("embedder.eoi", "derived", "decoder", "embedder.table", EOI, derive=_end_of_image),
    Rule("encoder_embedder.eoi", "derived", "encoder", "embedder.table", EOI, derive=_end_of_image),
    Rule("decoder_embedder.eoi", "derived", "decoder", "embedder.table", EOI, derive=_end_of_image),
    Rule("unembedder.table", "copied", "decoder", "unembedder.table", "output head", ROWS, when=_own_head),
    Rule("unembedder.table", "copied", "decoder", "embedder.table", "output head", ROWS),
    # bidirectional attention uses the weights that were trained causally
    Rule("encoder.layers.attention.*", "copied", "encoder", "layers.attention.*", shape_change=HEADS),
    Rule("encoder.layers.*", "copied", "encoder", "layers.*"),
    Rule(
        "encoder.final_norm.scale",
        "derived",
        "encoder",
        "final_norm.scale",
        "factors times {encoder_scale}",
        derive=_scaled_encoder_norm,
        when=_scales_encoder,
    ),
    Rule("encoder.final_norm.scale", "copied", "encoder", "final_norm.scale"),
    # separate cross-attention; merged attention has no such leaves
    Rule(
        "decoder.layers.cross_attention.*",
        "copied",
        "decoder",
        "layers.attention.*",
        shape_change=HEADS,
        when=_cross_is_copied,
    ),
    Rule("decoder.layers.cross_attention.*", "initialised"),
    Rule("decoder.layers.post_cross_norm.scale", "initialised", note="factor 0", value=-1.0, when=_cross_norms("none")),
    Rule("decoder.layers.*_cross_norm.scale", "initialised", note="factor 1", when=_cross_norms("fresh")),
    Rule("decoder.layers.pre_cross_norm.scale", "copied", "decoder", "layers.pre_attention_norm.scale", NEW_NORMS),
    Rule("decoder.layers.post_cross_norm.scale", "copied", "decoder", "layers.post_attention_norm.scale", NEW_NORMS),
    Rule("decoder.layers.attention.*", "copied", "decoder", "layers.attention.*", shape_change=HEADS),
    Rule("decoder.layers.*", "copied", "decoder", "layers.*"),
    Rule("decoder.final_norm.scale", "copied", "decoder", "final_norm.scale"),
    # images
    Rule("vision.positions", "copied", "vision", "vision.positions", shape_change=POSITIONS),
    Rule("vision.*", "copied", "vision", "vision.*"),
    Rule("projector.*", "copied", "vision", "projector.*", when=_own_tower),
    Rule("projector.*", "initialised", note="the tower is of another model"),
    Rule("probe.*", "initialised"),
)
DROPS = (
    Drop("vision", "vision.pool.*", "a language model takes the patches, not one vector per image", _other_tower),
    Drop("vision", "*", "only the image tower of this folder is taken", _other_tower),
    Drop("encoder", "vision.*", "the tower is taken from elsewhere", _other_tower),
    Drop("encoder", "projector.*", "the tower is taken from elsewhere", _other_tower),
    Drop("encoder", "vision.*", "the target reads no images", _no_images),
    Drop("encoder", "projector.*", "the target reads no images", _no_images),
    Drop("decoder", "vision.*", "the encoder reads the images, with its own source's tower", _two_sources),
    Drop("decoder", "projector.*", "the encoder reads the images, with its own source's tower", _two_sources),
    Drop("encoder", "embedder.table", "the one embedding is that of the decoder's source", _two_sources_tied),
    Drop("encoder", "unembedder.table", "an encoder has no head", _two_sources),
    Drop("encoder", "probe.*", "a probe is of the model that it was trained with"),
    Drop("decoder", "probe.*", "a probe is of the model that it was trained with"),
)


def rule_for(path: str, pairing: Pairing, rules: Sequence[Rule] = RULES) -> Rule | None:
    """Returns the rule for a target path; None if none matches."""
    return next((rule for rule in rules if tree.matches(rule.target, path) and rule.when(pairing)), None)


def source_of(rule: Rule, pairing: Pairing) -> SourceModel | None:
    """Returns the source of a rule; the image tower is that of the encoder's source, or of a folder of its own."""
    sources = pairing.sources
    by_origin = {"encoder": sources.encoder, "decoder": sources.decoder, "vision": sources.vision or sources.encoder}
    return None if rule.origin is None else by_origin[rule.origin]


def drop_reason(path: str, layer: int | None, source: SourceModel, pairing: Pairing) -> str | None:
    """Returns the reason why an unused source leaf is dropped; None if no rule allows it."""
    by_role = {
        "encoder": pairing.sources.encoder,
        "decoder": pairing.sources.decoder,
        "vision": pairing.sources.vision,
    }
    # one source can have several roles
    roles = [role for role, role_source in by_role.items() if role_source is source]
    for drop in DROPS:
        if drop.origin in roles and tree.matches(drop.pattern, path) and drop.when(pairing):
            return drop.reason
    # layers that a shallower target does not take
    taken = {old for side, layers in pairing.layers.items() if side in roles for old in layers}
    if layer is not None and path.startswith("layers.") and layer not in taken:
        return "cut in depth"
    return None
