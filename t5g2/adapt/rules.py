"""Where every weight of an adapted model comes from: one table for all recipes, read from top to bottom.

For a target leaf the first rule counts that fits its path and is in force for the pairing; for a source leaf that no
target leaf came from, the first `Drop`. A leaf that no rule fits, on either side, is an error.

Gemma 3 to T5Gemma 2 (arXiv 2512.14856, section 2): merged attention was made so that nothing is new. The decoder's
queries and its own keys and values come from the source's matrices, and the encoder's states go through the same ones.
Gemma 2 to T5Gemma (arXiv 2504.06225, section 3.2): both sides are the source; cross-attention is copied from
self-attention where the widths allow it. Everything between and beside them is the same table under other settings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from t5g2.adapt.pairing import Pairing, SourceModel
from t5g2.adapt.shape_changes import HEADS, POSITIONS, ROWS, ShapeChange
from t5g2.core import tree

Operation = Literal["copied", "tied", "derived", "initialised"]
Origin = Literal["encoder", "decoder", "vision"]
Condition = Callable[[Pairing], bool]


def always(pairing: Pairing) -> bool:
    """True."""
    del pairing
    return True


@dataclass(frozen=True)
class Rule:
    """Target leaves whose path fits `target` come from the leaf `source` of one of the sources.

    Attributes:
      target, source: paths. A `*` at the end of both stands for the same text. Source None = from nowhere.
      how: "copied" = unchanged; "tied" = unchanged, and the one leaf that several parts of the target share; "derived"
        = computed; "initialised" = by the leaf's own initialiser.
      origin: which source: that of the encoder, of the decoder, of the image tower.
      note: what a reader should know.
      fit: what bridges a difference of shapes, which makes it "derived"; None = there must be none.
      value: of "initialised": all entries are this instead.
      when: whether the rule is in force.
    """

    target: str
    operation: Operation
    origin: Origin | None = None
    source: str | None = None
    note: str = ""
    shape_change: ShapeChange | None = None
    value: float | None = None
    when: Condition = always

    def __post_init__(self):
        assert (self.source is None) == (self.operation == "initialised") == (self.origin is None), self
        assert self.source is None or self.target.endswith("*") == self.source.endswith("*"), self

    def source_of(self, path: str) -> str | None:
        """The source path for a target path that fits."""
        if self.source is None or not self.source.endswith("*"):
            return self.source
        return self.source[:-1] + path.removeprefix(self.target[:-1])


@dataclass(frozen=True)
class Drop:
    """Source leaves that are left behind on purpose: those of an origin whose path fits, while it is in force."""

    origin: Origin
    pattern: str
    reason: str
    when: Condition = always


def _cross_is_copied(pairing: Pairing) -> bool:
    return pairing.copies_cross_attention


def _cross_norms(*choices: str) -> Condition:
    return lambda pairing: pairing.options.cross_norms in choices


def _own_head(pairing: Pairing) -> bool:
    """Whether the decoder's source has an output head that is not its embedding."""
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
    Rule("embedder.eoi", "derived", "decoder", "embedder.table", EOI),
    Rule("encoder_embedder.eoi", "derived", "encoder", "embedder.table", EOI),
    Rule("decoder_embedder.eoi", "derived", "decoder", "embedder.table", EOI),
    Rule("unembedder.table", "copied", "decoder", "unembedder.table", "output head", ROWS, when=_own_head),
    Rule("unembedder.table", "copied", "decoder", "embedder.table", "output head", ROWS),
    # the encoder sees both ways with the weights that saw one
    Rule("encoder.layers.attention.*", "copied", "encoder", "layers.attention.*", shape_change=HEADS),
    Rule("encoder.layers.*", "copied", "encoder", "layers.*"),
    Rule("encoder.final_norm.scale", "copied", "encoder", "final_norm.scale"),
    # cross-attention of its own; with merged attention there are no such leaves
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
)


def rule_for(path: str, pairing: Pairing, rules: Sequence[Rule] = RULES) -> Rule | None:
    """The rule that counts for a target path."""
    return next((rule for rule in rules if tree.select(rule.target, path) and rule.when(pairing)), None)


def source_of(rule: Rule, pairing: Pairing) -> SourceModel | None:
    """The source that a rule takes from; an image tower is the encoder's source's own, or of a folder of its own."""
    sources = pairing.sources
    found = {"encoder": sources.encoder, "decoder": sources.decoder, "vision": sources.vision or sources.encoder}
    return None if rule.origin is None else found[rule.origin]


def drop_reason(path: str, layer: int | None, source: SourceModel, pairing: Pairing) -> str | None:
    """Why a source leaf that nothing came from is dropped; None if no rule says that it may be."""
    sources = {
        "encoder": pairing.sources.encoder,
        "decoder": pairing.sources.decoder,
        "vision": pairing.sources.vision,
    }
    roles = [role for role, of in sources.items() if of is source]
    for drop in DROPS:
        if drop.origin in roles and tree.select(drop.pattern, path) and drop.when(pairing):
            return drop.reason
    taken = {old for side, layers in pairing.layers.items() if side in roles for old in layers}
    if layer is not None and path.startswith("layers.") and layer not in taken:
        return "cut in depth"
    return None
