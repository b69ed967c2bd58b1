"""Exact FLOPs of a model on given tokens, by part: what MFU divides.

Counted: two FLOPs for each multiply-add of a matrix product, of tokens that are no padding, and in attention of visible
(query, key) pairs only. Not counted: norms, softmax, rotary embedding, embedding lookup, the averaging of patches (all
well below 1%), and what an implementation computes beside: padding, hidden pairs, images nobody looks at,
rematerialisation. So two implementations that compute the same have the same FLOPs, and MFU compares their time alone.

L layers, C of them that see the encoder, D width (M of the encoder), N query heads, K key/value heads, H head size, F
MLP width, V vocabulary. One token takes, forward:

    projections        L * (4 D N H + 4 D K H)     queries and output; keys and values
    mlp                L * 6 D F
    attention          4 N H for each pair         scores and weighted sum; pairs depend on the kind of layer
    cross/memory       C * 4 M K H                 keys and values of an encoder state
    cross/projections  C * 4 D N H                 queries and output of separate cross-attention; merged has none
    head               2 D V                       decoder tokens only, tied or not

One image takes, with P patches of A pixels, in a tower of width D and an MLP without gates (F); K image tokens in a
language model of width W:

    vision/patches     2 * 3 A D * P
    vision/projections L * 8 D D * P
    vision/mlp         L * 4 D F * P
    vision/attention   L * 4 D * P * P
    projector          2 D W * K

A dual encoder has a second tower of the same kind for texts (all their tokens, padding too), and pooling: keys and
values of every patch, and for one query attention, output and an MLP.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import numpy as np

from t5g2.core.batch import Batch, Sequences, image_blocks
from t5g2.models import masks
from t5g2.models.config import (
    DualEncoderConfig,
    EncoderDecoderConfig,
    LayerKind,
    ModelConfig,
    SiglipTextConfig,
    TextConfig,
    VisionConfig,
)
from t5g2.models.masks import Mask

LAYER_KINDS: tuple[LayerKind, ...] = ("local", "global")
TRAINING = 3  # forward; backward by the inputs and by the weights of every product


@dataclass(frozen=True)
class Counts:
    """Tokens that are no padding, visible (query, key) pairs of one layer of each kind, images, and a dual encoder's
    texts.
    """

    encoder_tokens: int = 0
    decoder_tokens: int = 0
    encoder_local: int = 0
    encoder_global: int = 0
    decoder_local: int = 0
    decoder_global: int = 0
    cross: int = 0
    images: int = 0
    texts: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: int) -> "Counts":
        return Counts(*(getattr(self, f.name) * times for f in fields(self)))


def forward(config: ModelConfig, counts: Counts) -> dict[str, int]:
    """FLOPs of one forward pass, the loss head included, by part."""
    if isinstance(config, DualEncoderConfig):
        return _dual_encoder(config, counts)
    decoder = config.decoder if isinstance(config, EncoderDecoderConfig) else config
    parts = _stack(
        "decoder", decoder, counts.decoder_tokens, local=counts.decoder_local, everywhere=counts.decoder_global
    )
    if isinstance(config, EncoderDecoderConfig):
        encoder = config.encoder
        parts |= _stack(
            "encoder", encoder, counts.encoder_tokens, local=counts.encoder_local, everywhere=counts.encoder_global
        )
        parts |= _cross(config, counts)
    parts["head"] = 2 * decoder.width * decoder.vocab_size * counts.decoder_tokens
    reader = _reader(config)
    if reader.images is not None:
        vision = reader.images.vision
        parts |= _tower("vision", vision, vision.patches, counts.images) | _patches(vision, counts.images)
        parts["projector"] = 2 * vision.width * reader.width * reader.images.tokens * counts.images
    return parts


def training(config: ModelConfig, counts: Counts, *, frozen_vision: bool) -> dict[str, int]:
    """FLOPs of forward and backward pass, by part.

    Args:
      frozen_vision: the image tower is not trained, so it only runs forward (T5Gemma 2; google-deepmind/gemma).
    """

    def times(part: str) -> int:
        if frozen_vision and part.startswith("vision/"):
            return 1
        return TRAINING - 1 if part == "vision/patches" else TRAINING  # pixels need no gradient

    return {part: times(part) * flop for part, flop in forward(config, counts).items()}


def of_batch(config: ModelConfig, batch: Batch, *, frozen_vision: bool = True) -> int:
    """FLOPs of one training step on these rows (NumPy arrays): forward and backward."""
    counts = count_rows(config, batch.encoder, batch.decoder)
    return sum(training(config, counts, frozen_vision=frozen_vision).values())


def count_lengths(config: ModelConfig, *, encoder: int = 0, decoder: int, images: int = 0) -> Counts:
    """The counts of one example of so many encoder and decoder tokens, those of its images included."""
    made = _reader(config).images
    sizes = np.full(images, 0 if made is None else made.tokens)
    return replace(_count(config, np.array([encoder]), np.array([decoder]), blocks=sizes), images=images)


def count_rows(config: ModelConfig, encoder: Sequences | None, decoder: Sequences) -> Counts:
    """The counts of packed rows, from their tokens, segments and block ids; positions must run through each segment.

    Block ids are those of the side that images enter; an encoder that has none is counted with its images as blocks.
    """
    segments = np.asarray(decoder.segments)
    sides = [np.zeros_like(segments) if encoder is None else np.asarray(encoder.segments), segments]
    most = max(int(side.max(initial=0)) for side in sides)
    tokens = (_sizes(side, most=most) for side in sides)
    reads = encoder if isinstance(config, EncoderDecoderConfig) else decoder
    return replace(_count(config, *tokens, blocks=_block_sizes(config, reads)), images=_images(config, reads))


def _count(config: ModelConfig, encoder: np.ndarray, decoder: np.ndarray, *, blocks: np.ndarray) -> Counts:
    """The counts of examples of encoder[i] and decoder[i] tokens, and of blocks of these sizes on the side that images
    enter.
    """
    made, none = {"decoder_tokens": int(decoder.sum())}, np.zeros(0, np.int64)
    if not isinstance(config, EncoderDecoderConfig):
        alone = _reader(config)
        made |= {f"decoder_{kind}": _pairs(masks.decoder(alone, kind), decoder, blocks) for kind in LAYER_KINDS}
        return Counts(**made)
    for kind in LAYER_KINDS:
        made[f"decoder_{kind}"] = _pairs(masks.decoder(config.decoder, kind), decoder, none)
        made[f"encoder_{kind}"] = _pairs(masks.encoder(config, kind), encoder, blocks)
    return Counts(**made, encoder_tokens=int(encoder.sum()), cross=int(np.sum(encoder * decoder)))


def _images(config: ModelConfig, reads: Sequences | None) -> int:
    """How many images stand among these tokens."""
    images = _reader(config).images
    if images is None or reads is None:
        return 0
    tokens, segments = np.asarray(reads.tokens), np.asarray(reads.segments)
    return int(np.sum((tokens == images.token) & (segments > 0))) // images.tokens


def _reader(config: ModelConfig) -> TextConfig:
    """The stack of a language model that images enter."""
    if isinstance(config, DualEncoderConfig):
        raise TypeError("a dual encoder has no tokens to count; give Counts(images=…, texts=…)")
    return config.encoder if isinstance(config, EncoderDecoderConfig) else config


def _pairs(mask: Mask, lengths: np.ndarray, blocks: np.ndarray) -> int:
    """Visible pairs of sequences of these lengths, summed, with blocks of these sizes in them.

    Of n tokens, those at a distance of 1 to m see m others on one side, but the m at the end fewer, down to none:
    n * m - m * (m + 1) / 2 pairs, where m = min(visible, n - 1).
    """
    # a causal mask shows what is ahead within a block only
    right = _ahead(mask.right, blocks if mask.causal else lengths)
    return int(np.sum(lengths + _ahead(mask.left, lengths)) + np.sum(right))


def _ahead(visible: int | None, lengths: np.ndarray) -> np.ndarray:
    """Pairs at a distance of 1 to `visible` (None = any), to one side, in sequences of these lengths."""
    m = np.maximum(lengths - 1, 0) if visible is None else np.clip(lengths - 1, 0, visible)
    return lengths * m - m * (m + 1) // 2


def _sizes(ids: np.ndarray, *, most: int) -> np.ndarray:
    """int64[rows * most]: how often each id from 1 to `most` stands in each row; 0 is padding."""
    rows = np.arange(len(ids))[:, None] * (most + 1)
    sizes = np.bincount((rows + ids).ravel(), minlength=len(ids) * (most + 1)).reshape(len(ids), most + 1)
    return sizes[:, 1:].ravel()


def _block_sizes(config: ModelConfig, reads: Sequences | None) -> np.ndarray:
    """Tokens of each block of each segment of each row."""
    if reads is None:
        return np.zeros(0, np.int64)
    segments, blocks = np.asarray(reads.segments), reads.blocks
    images = _reader(config).images
    if isinstance(config, EncoderDecoderConfig) and config.encoder_attention == "causal" and images is not None:
        blocks = image_blocks(reads.tokens, images.token) if blocks is None else blocks
    if blocks is None:
        return np.zeros(0, np.int64)
    blocks = np.asarray(blocks)
    most = int(blocks.max(initial=0))
    ids = np.where((segments > 0) & (blocks > 0), (segments - 1) * most + blocks, 0)
    return _sizes(ids, most=int(ids.max(initial=0)))


def _stack(name: str, config: TextConfig, tokens: int, *, local: int, everywhere: int) -> dict[str, int]:
    pairs: dict[LayerKind, int] = {"local": local, "global": everywhere}
    kinds: Iterable[LayerKind] = (config.kind(layer) for layer in range(config.layers))
    return {
        f"{name}/projections": config.layers * 4 * config.width * (_queries(config) + _keys(config)) * tokens,
        f"{name}/mlp": config.layers * 6 * config.width * config.mlp_width * tokens,
        f"{name}/attention": 4 * _queries(config) * sum(pairs[kind] for kind in kinds),
    }


def _cross(config: EncoderDecoderConfig, counts: Counts) -> dict[str, int]:
    decoder = config.decoder
    everywhere = config.cross_layers == "all"
    layers = sum(everywhere or decoder.kind(layer) == "global" for layer in range(decoder.layers))
    parts = {
        "cross/memory": layers * 4 * config.encoder.width * _keys(decoder) * counts.encoder_tokens,
        "cross/attention": layers * 4 * _queries(decoder) * counts.cross,
    }
    if config.cross == "separate":
        parts["cross/projections"] = layers * 4 * decoder.width * _queries(decoder) * counts.decoder_tokens
    return parts


def _tower(name: str, config: VisionConfig | SiglipTextConfig, length: int, number: int) -> dict[str, int]:
    """`number` inputs of `length` tokens that all see each other."""
    tokens = length * number
    return {
        f"{name}/projections": config.layers * 8 * config.width**2 * tokens,
        f"{name}/mlp": config.layers * 4 * config.width * config.mlp_width * tokens,
        f"{name}/attention": config.layers * 4 * config.width * length * tokens,
    }


def _patches(config: VisionConfig, images: int) -> dict[str, int]:
    return {"vision/patches": 2 * 3 * config.patch_size**2 * config.width * config.patches * images}


def _dual_encoder(config: DualEncoderConfig, counts: Counts) -> dict[str, int]:
    vision, text = config.vision, config.text
    parts = _tower("vision", vision, vision.patches, counts.images) | _patches(vision, counts.images)
    # the query is the same for every image, so it is no image's
    pooled = 4 * vision.width**2 * vision.patches + 4 * vision.width * vision.patches
    pooled += 2 * vision.width**2 + 4 * vision.width * vision.mlp_width
    parts["vision/pool"] = pooled * counts.images
    parts |= _tower("text", text, text.length, counts.texts)
    parts["text/head"] = 2 * text.width * text.projection * counts.texts
    parts["similarity"] = 2 * text.projection * counts.texts * counts.images
    return parts


def _queries(config: TextConfig) -> int:
    return config.heads * config.head_size


def _keys(config: TextConfig) -> int:
    return config.kv_heads * config.head_size
