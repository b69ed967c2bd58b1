"""Pairs of sources and targets: the families that fit, the sizes, and the architecture derived from a source.

    Gemma 2 -> T5Gemma      arXiv 2504.06225: separate cross-attention, an embedding for each side
    Gemma 3 -> T5Gemma 2    arXiv 2512.14856: merged attention, one embedding, images in the encoder

The blocks must fit. The kind of cross-attention, its layers and the tied weights are settings of the target, so merged
attention on Gemma 2's blocks and separate cross-attention on Gemma 3's are valid targets too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from t5g2.adapt.options import AdaptOptions
from t5g2.core.errors import UserError, unknown
from t5g2.core.ranges import format_ranges
from t5g2.core.tree import Leaf, LeafKey
from t5g2.models.config import (
    DualEncoderConfig,
    EncoderDecoderConfig,
    ImageConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)

Side = Literal["encoder", "decoder"]
Family = Literal["t5gemma", "t5gemma2"]
FAMILIES: tuple[Family, ...] = ("t5gemma", "t5gemma2")
DEFAULT_OPTIONS = AdaptOptions()
SUPPORTED_PAIRS = "Gemma 2 becomes T5Gemma, Gemma 3 and MedGemma become T5Gemma 2"


@dataclass(frozen=True, eq=False)
class SourceModel:
    """A model whose weights are adapted.

    Attributes:
      config: architecture of a decoder-only model, or of the image tower if only that is taken from the folder.
      leaves: all leaves of the folder, loaded by Leaf.read.
      path: folder, file or address of the weights, for messages.
      notes: on the import of the weights.
    """

    config: ModelConfig | VisionConfig
    leaves: Mapping[LeafKey, Leaf] = field(repr=False)
    path: str = "the source"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class SourceModels:
    """Source of each part of the target; encoder and decoder may have the same one.

    Attributes:
      vision: source of the image tower, if it is not the encoder's.
    """

    encoder: SourceModel
    decoder: SourceModel
    vision: SourceModel | None = None

    @property
    def tower(self) -> VisionConfig | None:
        """Architecture of the image tower of the sources, None if they have none."""
        if self.vision is not None:
            assert isinstance(self.vision.config, VisionConfig)
            return self.vision.config
        images = text_config(self.encoder).images
        return None if images is None else images.vision

    @property
    def by_name(self) -> dict[str, SourceModel]:
        """Each source once, by its name in the provenance: "" if there is only one."""
        sources = {"encoder": self.encoder, "decoder": self.decoder}
        if self.encoder is self.decoder:
            sources = {"source" if self.vision else "": self.encoder}
        return sources if self.vision is None else {**sources, "vision": self.vision}

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the import of each source, behind its name if there are several."""
        by_name = self.by_name.items()
        return tuple(f"{name}: {note}" if name else note for name, source in by_name for note in source.notes)


@dataclass(frozen=True, eq=False)
class Pairing:
    """Sources and a target that fit, with the options of the adaptation; the conditions of the rules depend on it.

    Attributes:
      layers: by side, the source's layer for each layer of the target.
      settings: lines for the settings in which the target differs from the sources.
    """

    sources: SourceModels
    target: EncoderDecoderConfig
    options: AdaptOptions
    layers: Mapping[Side, tuple[int, ...]]
    settings: tuple[str, ...]

    @property
    def recipe(self) -> str:
        """Name of the recipe: "gemma3 -> t5gemma2"."""
        return "gemma3 -> t5gemma2" if self.target.decoder.qk_norm else "gemma2 -> t5gemma"

    @property
    def copies_cross_attention(self) -> bool:
        """True if cross-attention starts as a copy of self-attention."""
        choice, target = self.options.cross_attention, self.target
        return target.encoder.width == target.decoder.width if choice == "auto" else choice == "self"


def text_config(source: SourceModel) -> TextConfig:
    """Returns the architecture of a decoder-only source, without a probe: that is of the model it was trained with.

    Raises:
      UserError: it is not a decoder-only model.
    """
    if isinstance(source.config, TextConfig):
        return replace(source.config, probe=None)
    if isinstance(source.config, EncoderDecoderConfig):
        raise UserError(
            f"{source.path} is an encoder-decoder model already; give a decoder-only source: {SUPPORTED_PAIRS}"
        )
    raise UserError(
        f"{source.path} is an image model (SigLIP), which has no language model to adapt; {SUPPORTED_PAIRS}. Its "
        f"image tower can be taken beside a language model: vision"
    )


def derive_config(
    sources: SourceModels, family: str, options: AdaptOptions, *, end_of_image: int | None = None
) -> EncoderDecoderConfig:
    """Returns the architecture of a family with the blocks of the sources, so that they compute the same as before.

    Rows of the embedding from the image token on, which no text looks up, are left out, and the image token becomes
    the one after the end-of-image token, as in the released models (262144 rows, image token 256001).

    Args:
      sources: the decoder-only models.
      family: "t5gemma" or "t5gemma2".
      options: options of the adaptation; its layers set the depth of both sides.
      end_of_image: id of the token after an image, if the source's config has none; T5Gemma 2 has a vector of its own
        for it, which is derived from its input embedding. None = there is no such token.

    Raises:
      UserError: an unknown family; the sources are not of the family's blocks, or do not fit each other.
    """
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    sides: dict[Side, TextConfig] = {}
    by_side: dict[Side, SourceModel] = {"encoder": sources.encoder, "decoder": sources.decoder}
    for side, source in by_side.items():
        config = text_config(source)
        _check_family(source, gemma3=family == "t5gemma2")
        images = config.images
        # rows from the image token on are looked up by no text
        rows = config.vocab_size if images is None else min(config.vocab_size, images.token)
        layers = len(options.layers(side, config.layers))
        sides[side] = replace(config, layers=layers, vocab_size=rows, images=None)
    if family == "t5gemma":
        return EncoderDecoderConfig(**sides, cross="separate", tied_embedding=False, encoder_window="each_side")
    # T5Gemma 2 can have a vector for the end of an image without reading images
    images, tower = text_config(sources.encoder).images, sources.tower
    end = end_of_image if images is None else images.end
    if tower is not None:
        if end is None:
            raise UserError(
                f"there is an image tower, and neither {sources.encoder.path} nor its tokenizer has a token that "
                f"ends an image; give the target's architecture with encoder.images and eoi_id"
            )
        sides["encoder"] = replace(sides["encoder"], images=_image_config(replace(tower, pool=False), images, end))
    return EncoderDecoderConfig(**sides, eoi_id=end)


def _image_config(tower: VisionConfig, images: ImageConfig | None, end: int) -> ImageConfig:
    """Returns the images of a T5Gemma 2: the tokens around them, and 256 tokens per image if the patches allow it."""
    if images is not None:
        return replace(images, vision=tower, token=end + 1)
    # 256 = 16 x 16 tokens, pooled from the patches as in Gemma 3
    tokens = 256 if tower.side % 16 == 0 else tower.patches
    return ImageConfig(vision=tower, token=end + 1, begin=end - 1, end=end, tokens=tokens)


def pair(sources: SourceModels, target: ModelConfig, options: AdaptOptions = DEFAULT_OPTIONS) -> Pairing:
    """Returns sources and target as a pairing, after a check that the weights fit, or that an option makes them fit.

    Raises:
      UserError: the families or the sizes do not fit; the message has both values of each difference, and remedies.
    """
    configs: dict[Side, TextConfig] = {"encoder": text_config(sources.encoder), "decoder": text_config(sources.decoder)}
    if not isinstance(target, EncoderDecoderConfig):
        kind = "an image model" if isinstance(target, DualEncoderConfig) else "decoder-only"
        raise UserError(f"the target is {kind}; give an encoder-decoder one, such as t5gemma2: {SUPPORTED_PAIRS}")
    for source in (sources.encoder, sources.decoder):
        _check_family(source, gemma3=target.encoder.qk_norm and target.decoder.qk_norm)
    layers: dict[Side, tuple[int, ...]] = {}
    # differences are either settings, which may change, or problems, for which there are remedies
    settings, problems, remedies = [], [], []
    for side, source in configs.items():
        stack: TextConfig = getattr(target, side)
        layers[side] = options.layers(side, source.layers)
        if len(layers[side]) != stack.layers:
            taken = f"of which {len(layers[side])} are taken"
            problems.append(f"{side}.layers: {source.layers} in the source, {taken}, and {stack.layers} in the target")
            remedies.append(f"{side}_layers chooses the layers to take")
        else:
            settings += _kind_changes(side, source, stack, layers[side])
        # images are compared below, and the encoder's head never, because an encoder has none
        tied_head = stack.tied_head if side == "encoder" else source.tied_head
        old_stack = replace(source, images=None, tied_head=tied_head)
        for name, old, new in _differences(old_stack, replace(stack, images=None)):
            line = f"{side}.{name}: {old} in the source, {new} in the target"
            remedy = _remedy(name, source, stack, options)
            if remedy is None:
                settings.append(line)
            elif name != "layers":
                problems.append(line)
                remedies.append(remedy)
    problems += _cross_attention_problems(target, options)
    image_settings, image_problems = _image_differences(sources, target)
    if problems or image_problems:
        lines = ["the source's weights do not fit the target:", *problems, *image_problems]
        raise UserError("\n".join(["\n  ".join(lines), *dict.fromkeys(remedies)]))
    return Pairing(sources, target, options, layers, (*settings, *image_settings))


def _check_family(source: SourceModel, *, gemma3: bool) -> None:
    """Raises UserError if the source's blocks are of the other family."""
    if text_config(source).qk_norm == gemma3:
        return
    own, other, target = ("Gemma 2", "Gemma 3", "T5Gemma 2") if gemma3 else ("Gemma 3", "Gemma 2", "T5Gemma")
    norms = "no norms" if gemma3 else "norms"
    alternative = "t5gemma with cross=merged" if gemma3 else "t5gemma2 with cross=separate"
    raise UserError(
        f"{source.path} has the blocks of {own} ({norms} on queries and keys), and {target} has those of {other}: "
        f"{SUPPORTED_PAIRS}. For the other kind of attention on {own}'s blocks take {alternative} as the target"
    )


def _remedy(name: str, source: TextConfig, target: TextConfig, options: AdaptOptions) -> str | None:
    """Returns the remedy for a difference in this setting; None if the weights fit nevertheless."""
    if name in ("width", "mlp_width", "heads", "head_size", "qk_norm"):
        return f"{name}: choose a target of the source's size; a family, such as t5gemma2, derives it from the source"
    if name == "tied_head" and not source.tied_head:
        return "tied_head: the source has a head of its own, so set tied_head=False"
    # repeated heads compute the same, so only multiples are possible
    if name == "kv_heads" and target.kv_heads % source.kv_heads:
        return f"kv_heads: key/value heads are repeated, so give a multiple of {source.kv_heads}"
    if name == "vocab_size" and options.vocabulary == "same":
        # rows after the image token are looked up by no text
        is_unused = source.images is not None and source.images.token >= target.vocab_size
        return None if is_unused else "vocab_size: vocabulary=resize takes the first rows, or adds some"
    return None


def _kind_changes(side: Side, source: TextConfig, target: TextConfig, layers: tuple[int, ...]) -> list[str]:
    """Returns a line if layers become layers of the other kind, local or global."""
    moved = [new for new, old in enumerate(layers) if source.kind(old) != target.kind(new)]
    if not moved:
        return []
    return [f"{side} layers {format_ranges(moved)} come from layers of the other kind (local or global attention)"]


def _cross_attention_problems(target: EncoderDecoderConfig, options: AdaptOptions) -> list[str]:
    """Returns a line for each option about cross-attention that does not fit the target."""
    if target.cross == "merged":
        chosen = [
            name for name in ("cross_attention", "cross_norms") if getattr(options, name) != getattr(AdaptOptions, name)
        ]
        return [
            f"{name} = {getattr(options, name)}, and the target's attention is merged: it has no cross-attention of "
            f"its own; leave it out, or take a target with cross=separate"
            for name in chosen
        ]
    # cross-attention reads the encoder's states with matrices of the decoder's self-attention
    widths = target.encoder.width, target.decoder.width
    if options.cross_attention == "self" and widths[0] != widths[1]:
        return [
            f"cross_attention = self, and the encoder's width is {widths[0]}, the decoder's {widths[1]}: keys and "
            f"values of self-attention take states of the decoder's width; set cross_attention=fresh"
        ]
    return []


def _image_differences(sources: SourceModels, target: EncoderDecoderConfig) -> tuple[list[str], list[str]]:
    """Returns (lines for settings of images that differ, lines for those that do not fit)."""
    images, tower = target.encoder.images, sources.tower
    if images is None:
        if sources.vision is not None:
            return [], [
                f"{sources.vision.path} gives an image tower, and the target has no encoder.images; leave it out"
            ]
        return [], []
    if tower is None:
        return [], [
            f"the target reads images, and {sources.encoder.path} has no image tower; give the folder of one as vision "
            f"(a Gemma 3 with images, MedGemma, SigLIP or MedSigLIP), or a target with encoder.images=None"
        ]
    old = text_config(sources.encoder).images
    settings, problems = [], []
    pairs = [] if old is None or sources.vision is not None else _differences(old, images, "encoder.images.")
    tower_pairs = _differences(replace(tower, pool=False), images.vision, "encoder.images.vision.")
    for name, was, becomes in [*(p for p in pairs if ".vision." not in p[0]), *tower_pairs]:
        line = f"{name}: {was} in the source, {becomes} in the target"
        # position embeddings are resampled to another image size; other shapes are fixed
        is_fixed = ".vision." in name and not name.endswith(("image_size", "norm_eps"))
        if is_fixed:
            problems.append(f"{line}; choose a target with the tower's size")
        else:
            settings.append(line)
    return settings, problems


def _differences(a: Any, b: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Returns (name, a's value, b's value) of every field in which two architectures compute differently."""
    if isinstance(a, TextConfig) and isinstance(b, TextConfig) and a.scale == b.scale:
        a = replace(a, query_scalar=b.query_scalar)  # two ways to write one scale
    differences = []
    for entry in fields(a):
        x, y = getattr(a, entry.name), getattr(b, entry.name)
        if is_dataclass(x) and is_dataclass(y):
            differences += _differences(x, y, f"{prefix}{entry.name}.")
        elif x != y:
            differences.append((f"{prefix}{entry.name}", x, y))
    return differences
