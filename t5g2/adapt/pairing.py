"""Which source becomes which target: the families that fit, the sizes, and the architecture derived from a source.

    Gemma 2 -> T5Gemma      arXiv 2504.06225: separate cross-attention, an embedding for each side
    Gemma 3 -> T5Gemma 2    arXiv 2512.14856: merged attention, one embedding, images in the encoder

The blocks decide; how the decoder sees the encoder, what is tied and which layers see it are settings of the target, so
merged attention on Gemma 2's blocks and separate cross-attention on Gemma 3's are targets like any other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from t5g2.adapt.options import AdaptOptions
from t5g2.adapt.provenance import layer_ranges
from t5g2.core.errors import UserError, unknown
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
    """A model that weights come from.

    Attributes:
      config: of a decoder-only model, or of the image tower of a folder that gives nothing else.
      leaves: everything that it has, read when asked for.
      path: where it is, for messages.
    """

    config: ModelConfig | VisionConfig
    leaves: Mapping[LeafKey, Leaf] = field(repr=False)
    path: str = "the source"


@dataclass(frozen=True, eq=False)
class SourceModels:
    """What each part of the target is made of; encoder and decoder may be one and the same source.

    Attributes:
      vision: the image tower, where it does not come from the encoder's source.
    """

    encoder: SourceModel
    decoder: SourceModel
    vision: SourceModel | None = None

    @property
    def tower(self) -> VisionConfig | None:
        """The image tower that there is for the target."""
        if self.vision is not None:
            assert isinstance(self.vision.config, VisionConfig)
            return self.vision.config
        images = text_config(self.encoder).images
        return None if images is None else images.vision

    @property
    def by_name(self) -> dict[str, SourceModel]:
        """Each source once, by its name in the account: "" where there is one alone."""
        found = {"encoder": self.encoder, "decoder": self.decoder}
        if self.encoder is self.decoder:
            found = {"source" if self.vision else "": self.encoder}
        return found if self.vision is None else {**found, "vision": self.vision}


@dataclass(frozen=True, eq=False)
class Pairing:
    """Sources and a target that fit, and what was chosen; the rules ask it.

    Attributes:
      layers: by side, the source's layer for each layer of the target.
      settings: what the target has otherwise than the sources, as lines.
    """

    sources: SourceModels
    target: EncoderDecoderConfig
    options: AdaptOptions
    layers: Mapping[Side, tuple[int, ...]]
    settings: tuple[str, ...]

    @property
    def recipe(self) -> str:
        """Its name: "gemma3 -> t5gemma2"."""
        return "gemma3 -> t5gemma2" if self.target.decoder.qk_norm else "gemma2 -> t5gemma"

    @property
    def copies_cross_attention(self) -> bool:
        """Whether cross-attention is made of self-attention's weights."""
        choice, target = self.options.cross_attention, self.target
        return target.encoder.width == target.decoder.width if choice == "auto" else choice == "self"


def text_config(source: SourceModel) -> TextConfig:
    """The architecture of a decoder-only source.

    Raises:
      UserError: it is no decoder-only model.
    """
    if isinstance(source.config, TextConfig):
        return source.config
    if isinstance(source.config, EncoderDecoderConfig):
        raise UserError(
            f"{source.path} is an encoder-decoder model already; give a decoder-only source: {SUPPORTED_PAIRS}"
        )
    raise UserError(
        f"{source.path} is an image model (SigLIP), which has no language model to adapt; {SUPPORTED_PAIRS}. Its image tower can "
        f"be taken beside a language model: vision"
    )


def derive_config(
    sources: SourceModels, family: str, options: AdaptOptions, *, end_of_image: int | None = None
) -> EncoderDecoderConfig:
    """The architecture of a family with the blocks of the sources, so that they compute what they did.

    Rows of the embedding from the image token on, which no text looks up, are left out, and the image token becomes
    the one after the end-of-image token, as in the released models (262144 rows, image token 256001).

    Args:
      family: "t5gemma" or "t5gemma2".
      choices: its layers say how deep both sides are.
      end_of_image: id of the token after an image, where the source does not say; its input embedding becomes a vector
        of its own in a T5Gemma 2. None = there is no such token.

    Raises:
      UserError: an unknown family; the sources are not of the family's blocks, or do not fit each other.
    """
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    sides: dict[Side, TextConfig] = {}
    given: dict[Side, SourceModel] = {"encoder": sources.encoder, "decoder": sources.decoder}
    for side, source in given.items():
        config = text_config(source)
        _check_family(source, gemma3=family == "t5gemma2")
        images = config.images
        rows = config.vocab_size if images is None else min(config.vocab_size, images.token)
        layers = len(options.layers(side, config.layers))
        sides[side] = replace(config, layers=layers, vocab_size=rows, images=None)
    if family == "t5gemma":
        return EncoderDecoderConfig(**sides, cross="separate", tied_embedding=False, encoder_window="each_side")
    images, tower = text_config(sources.encoder).images, sources.tower
    end = end_of_image if images is None else images.end
    if tower is not None:
        if end is None:
            raise UserError(
                f"there is an image tower, and neither {sources.encoder.path} nor its tokenizer knows the token that "
                f"ends an image; give the target's architecture with encoder.images and eoi_id"
            )
        sides["encoder"] = replace(sides["encoder"], images=_image_config(replace(tower, pool=False), images, end))
    return EncoderDecoderConfig(**sides, eoi_id=end)


def _image_config(tower: VisionConfig, images: ImageConfig | None, end: int) -> ImageConfig:
    """How images enter a T5Gemma 2, by the tokens around them; 256 tokens an image where its patches allow it."""
    if images is not None:
        return replace(images, vision=tower, token=end + 1)
    tokens = 256 if tower.side % 16 == 0 else tower.patches
    return ImageConfig(vision=tower, token=end + 1, begin=end - 1, end=end, tokens=tokens)


def pair(sources: SourceModels, target: ModelConfig, options: AdaptOptions = DEFAULT_OPTIONS) -> Pairing:
    """Sources and target as a pairing: what the weights' shapes follow from fits, or a choice bridges it.

    Raises:
      UserError: the families or the sizes do not fit; with both values of everything that differs and what bridges it.
    """
    configs: dict[Side, TextConfig] = {"encoder": text_config(sources.encoder), "decoder": text_config(sources.decoder)}
    if not isinstance(target, EncoderDecoderConfig):
        what = "an image model" if isinstance(target, DualEncoderConfig) else "decoder-only"
        raise UserError(f"the target is {what}; give an encoder-decoder one, such as t5gemma2: {SUPPORTED_PAIRS}")
    for source in (sources.encoder, sources.decoder):
        _check_family(source, gemma3=target.encoder.qk_norm and target.decoder.qk_norm)
    layers: dict[Side, tuple[int, ...]] = {}
    settings, wrong, ways = [], [], []
    for side, source in configs.items():
        stack: TextConfig = getattr(target, side)
        layers[side] = options.layers(side, source.layers)
        if len(layers[side]) != stack.layers:
            taken = f"of which {len(layers[side])} are taken"
            wrong.append(f"{side}.layers: {source.layers} in the source, {taken}, and {stack.layers} in the target")
            ways.append(f"{side}_layers says which layers to take")
        else:
            settings += _kind_changes(side, source, stack, layers[side])
        tied_head = stack.tied_head if side == "encoder" else source.tied_head  # an encoder has no head
        old_stack = replace(source, images=None, tied_head=tied_head)
        for name, old, new in _differences(old_stack, replace(stack, images=None)):
            line = f"{side}.{name}: {old} in the source, {new} in the target"
            way = _remedy(name, source, stack, options)
            if way is None:
                settings.append(line)
            elif name != "layers":
                wrong.append(line)
                ways.append(way)
    wrong += _cross_attention_problems(target, options)
    kept, odd = _image_differences(sources, target)
    if wrong or odd:
        lines = ["the source's weights do not fit the target:", *wrong, *odd]
        raise UserError("\n".join(["\n  ".join(lines), *dict.fromkeys(ways)]))
    return Pairing(sources, target, options, layers, (*settings, *kept))


def _check_family(source: SourceModel, *, gemma3: bool) -> None:
    """Raises UserError if the source's blocks are of the other family."""
    if text_config(source).qk_norm == gemma3:
        return
    it, other, target = ("Gemma 2", "Gemma 3", "T5Gemma 2") if gemma3 else ("Gemma 3", "Gemma 2", "T5Gemma")
    norms = "no norms" if gemma3 else "norms"
    way = "t5gemma with cross=merged" if gemma3 else "t5gemma2 with cross=separate"
    raise UserError(
        f"{source.path} has the blocks of {it} ({norms} on queries and keys), and {target} has those of {other}: "
        f"{SUPPORTED_PAIRS}. For the other kind of attention on {it}'s blocks take {way} as the target"
    )


def _remedy(name: str, source: TextConfig, target: TextConfig, choices: AdaptOptions) -> str | None:
    """None if weights fit although this setting differs; else what to do."""
    if name in ("width", "mlp_width", "heads", "head_size", "qk_norm"):
        return f"{name}: choose a target of the source's size; a family, such as t5gemma2, derives it from the source"
    if name == "tied_head" and not source.tied_head:
        return "tied_head: the source has a head of its own, so say tied_head=False"
    if name == "kv_heads" and target.kv_heads % source.kv_heads:
        return f"kv_heads: they are repeated, so give a multiple of {source.kv_heads}"
    if name == "vocab_size" and choices.vocabulary == "same":
        # what follows the image token are rows that no text looks up
        cut = source.images is not None and source.images.token >= target.vocab_size
        return None if cut else "vocab_size: vocabulary=resize takes the first rows, or adds some"
    return None


def _kind_changes(side: Side, source: TextConfig, target: TextConfig, layers: tuple[int, ...]) -> list[str]:
    """A line if layers become layers of the other kind, local or global."""
    moved = [new for new, old in enumerate(layers) if source.kind(old) != target.kind(new)]
    if not moved:
        return []
    return [f"{side} layers {layer_ranges(moved)} come from layers of the other kind (local or global attention)"]


def _cross_attention_problems(target: EncoderDecoderConfig, choices: AdaptOptions) -> list[str]:
    """What is wrong with the choices about cross-attention."""
    if target.cross == "merged":
        chosen = [
            name for name in ("cross_attention", "cross_norms") if getattr(choices, name) != getattr(AdaptOptions, name)
        ]
        return [
            f"{name} = {getattr(choices, name)}, and the target's attention is merged: it has no cross-attention of "
            f"its own; leave it out, or take a target with cross=separate"
            for name in chosen
        ]
    widths = target.encoder.width, target.decoder.width
    if choices.cross_attention == "self" and widths[0] != widths[1]:
        return [
            f"cross_attention = self, and the encoder's width is {widths[0]}, the decoder's {widths[1]}: keys and "
            f"values of self-attention take states of the decoder's width; say cross_attention=fresh"
        ]
    return []


def _image_differences(sources: SourceModels, target: EncoderDecoderConfig) -> tuple[list[str], list[str]]:
    """(what differs and may, what is wrong) of how images come in."""
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
    kept, wrong = [], []
    pairs = [] if old is None or sources.vision is not None else _differences(old, images, "encoder.images.")
    tower_pairs = _differences(replace(tower, pool=False), images.vision, "encoder.images.vision.")
    for name, was, becomes in [*(p for p in pairs if ".vision." not in p[0]), *tower_pairs]:
        line = f"{name}: {was} in the source, {becomes} in the target"
        fixed = ".vision." in name and not name.endswith(("image_size", "norm_eps"))
        (wrong if fixed else kept).append(line + ("; choose a target with the tower's size" if fixed else ""))
    return kept, wrong


def _differences(a: Any, b: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(name, a's value, b's value) of every field in which two architectures compute differently."""
    if isinstance(a, TextConfig) and isinstance(b, TextConfig) and a.scale == b.scale:
        a = replace(a, query_scalar=b.query_scalar)
    found = []
    for entry in fields(a):
        x, y = getattr(a, entry.name), getattr(b, entry.name)
        if is_dataclass(x) and is_dataclass(y):
            found += _differences(x, y, f"{prefix}{entry.name}.")
        elif x != y:
            found.append((f"{prefix}{entry.name}", x, y))
    return found
