"""Exact FLOPs of a model by part, for the tokens of a batch: the numerator of MFU.

Counted: two FLOPs for each multiply-add of a matrix product, for tokens that are not padding, and in attention for
visible (query, key) pairs only. Not counted: norms, softmax, rotary embedding, embedding lookup, the averaging of
patches (all well below 1%), and overhead of an implementation: padding, hidden pairs, unused images, rematerialisation.
So two implementations of the same computation have the same FLOPs, and MFU compares only their time.

L layers, C of them that attend to the encoder, D width (M of the encoder), N query heads, K key/value heads, H head
size, F MLP width, V vocabulary. FLOPs of one token, forward:

    projections        L * (4 D N H + 4 D K H)     queries and output; keys and values
    mlp                L * 6 D F
    attention          4 N H for each pair         scores and weighted sum; pairs depend on the kind of layer
    cross/memory       C * 4 M K H                 keys and values of an encoder state
    cross/projections  C * 4 D N H                 queries and output of separate cross-attention; merged has none
    head               2 D V                       decoder tokens only, tied or not

FLOPs of one image with P patches of A pixels, in a tower of width D and an MLP without gates (F), and K image tokens in
a language model of width W:

    vision/patches     2 * 3 A D * P
    vision/projections L * 8 D D * P
    vision/mlp         L * 4 D F * P
    vision/attention   L * 4 D * P * P
    projector          2 D W * K

A dual encoder has a second tower of the same kind for texts (all their tokens, also padding), and pooling: keys and
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
    LanguageModelConfig,
    LayerKind,
    ModelConfig,
    SiglipTextConfig,
    TextConfig,
    VisionConfig,
)
from t5g2.models.masks import Mask

LAYER_KINDS: tuple[LayerKind, ...] = ("local", "global")
TRAINING = 3  # products per forward product: itself, and the gradients by its inputs and by its weights


@dataclass(frozen=True)
class Counts:
    """Counts that FLOPs depend on.

    Attributes:
      encoder_tokens, decoder_tokens: tokens that are not padding.
      encoder_local, encoder_global, decoder_local, decoder_global: visible (query, key) pairs in a layer of the kind.
      cross: visible pairs of decoder queries and encoder keys.
      images: images in the encoder, or in a decoder-only model.
      texts: texts of a dual encoder.
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
    """Returns the FLOPs of one forward pass, the loss head included, by part."""
    if isinstance(config, DualEncoderConfig):
        return _dual_encoder(config, counts)
    decoder = config.decoder_stack
    parts = _stack(
        "decoder", decoder, counts.decoder_tokens, local=counts.decoder_local, everywhere=counts.decoder_global
    )
    if isinstance(config, EncoderDecoderConfig):
        encoder = config.encoder
        parts |= _stack(
            "encoder", encoder, counts.encoder_tokens, local=counts.encoder_local, everywhere=counts.encoder_global
        )
        parts |= _cross(config, counts)
    # every decoder token counts, also where its target has no loss: the loss head computes these logits too
    parts["head"] = 2 * decoder.width * decoder.vocab_size * counts.decoder_tokens
    stack = config.image_stack
    if stack.images is not None:
        vision = stack.images.vision
        parts |= _tower("vision", vision, vision.patches, counts.images) | _patches(vision, counts.images)
        parts["projector"] = 2 * vision.width * stack.width * stack.images.tokens * counts.images
    return parts


def training(config: ModelConfig, counts: Counts, *, frozen_vision: bool, frozen_body: bool = False) -> dict[str, int]:
    """Returns the FLOPs of forward and backward pass, by part.

    Args:
      frozen_vision: the image tower is not trained, so it only runs forward (T5Gemma 2; google-deepmind/gemma).
      frozen_body: nothing but a probe is trained, so all else only runs forward.
    """

    def passes(part: str) -> int:
        if frozen_body:
            return TRAINING - 1 if part == "head" else 1  # the states need no gradient
        if frozen_vision and part.startswith("vision/"):
            return 1
        return TRAINING - 1 if part == "vision/patches" else TRAINING  # pixels need no gradient

    return {part: passes(part) * flop for part, flop in _with_loss(config, counts).items()}


def _with_loss(config: ModelConfig, counts: Counts) -> dict[str, int]:
    """Returns the FLOPs of the forward pass that a loss takes: that of a probe runs its side and its head alone."""
    parts = forward(config, counts)
    if isinstance(config, DualEncoderConfig) or config.probe is None:
        return parts
    if config.encoder_stack is None or config.probe.state == "decoder_first":
        width = config.decoder_stack.width
    else:
        width = config.encoder_stack.width
        parts = {part: flop for part, flop in parts.items() if not part.startswith(("decoder/", "cross/"))}
    return parts | {"head": 2 * width * config.probe.outputs * counts.decoder_tokens}


def of_batch(config: ModelConfig, batch: Batch, *, frozen_vision: bool = True, frozen_body: bool = False) -> int:
    """Returns the FLOPs of one training step, forward and backward, on these rows (NumPy arrays)."""
    counts = count_rows(config, batch.encoder, batch.decoder)
    return sum(training(config, counts, frozen_vision=frozen_vision, frozen_body=frozen_body).values())


def count_rows(config: ModelConfig, encoder: Sequences | None, decoder: Sequences) -> Counts:
    """Returns the counts of packed rows, from tokens, segments and block ids; positions are 0, 1, … in each segment.

    Blocks are those of the tokens that include images; a causal encoder without block ids has its images as blocks.
    """
    segments = np.asarray(decoder.segments)
    encoder_segments = np.zeros_like(segments) if encoder is None else np.asarray(encoder.segments)
    # one maximum for both, so that entry i of either is the same example
    most = max(int(ids.max(initial=0)) for ids in (encoder_segments, segments))
    lengths = (_sizes(ids, most=most) for ids in (encoder_segments, segments))
    tokens = encoder if _language_model(config).is_encoder_decoder else decoder  # the tokens that include images
    return replace(_count(config, *lengths, blocks=_block_sizes(config, tokens)), images=_images(config, tokens))


def _count(config: ModelConfig, encoder: np.ndarray, decoder: np.ndarray, *, blocks: np.ndarray) -> Counts:
    """Returns the counts of examples of encoder[i] and decoder[i] tokens, with blocks of these sizes.

    The blocks are in the encoder, or in a decoder-only model.
    """
    counts, no_blocks = {"decoder_tokens": int(decoder.sum())}, np.zeros(0, np.int64)
    if not isinstance(config, EncoderDecoderConfig):
        stack = _language_model(config).decoder_stack
        counts |= {f"decoder_{kind}": _pairs(masks.decoder(stack, kind), decoder, blocks) for kind in LAYER_KINDS}
        return Counts(**counts)
    for kind in LAYER_KINDS:
        counts[f"decoder_{kind}"] = _pairs(masks.decoder(config.decoder, kind), decoder, no_blocks)
        counts[f"encoder_{kind}"] = _pairs(masks.encoder(config, kind), encoder, blocks)
    return Counts(**counts, encoder_tokens=int(encoder.sum()), cross=int(np.sum(encoder * decoder)))


def _images(config: ModelConfig, tokens: Sequences | None) -> int:
    """Returns the number of images among these tokens."""
    images = _language_model(config).image_stack.images
    if images is None or tokens is None:
        return 0
    is_image = (np.asarray(tokens.tokens) == images.token) & (np.asarray(tokens.segments) > 0)
    return int(np.sum(is_image)) // images.tokens


def _language_model(config: ModelConfig) -> LanguageModelConfig:
    if isinstance(config, DualEncoderConfig):
        raise TypeError("a dual encoder has no tokens to count; give Counts(images=…, texts=…)")
    return config


def _pairs(mask: Mask, lengths: np.ndarray, blocks: np.ndarray) -> int:
    """Returns the number of visible pairs, summed over sequences of these lengths with blocks of these sizes."""
    # the pairs (token, itself), those before, and those after the query, which a causal mask shows only within a block
    right = _ahead(mask.right, blocks if mask.causal else lengths)
    return int(np.sum(lengths + _ahead(mask.left, lengths)) + np.sum(right))


def _ahead(visible: int | None, lengths: np.ndarray) -> np.ndarray:
    """Returns the pairs at a distance of 1 to `visible` (None = any) to one side, in sequences of these lengths.

    Of n tokens, each sees m = min(visible, n - 1) others on one side, except the m tokens nearest to that end, which
    see m - 1 down to 0: n * m - m * (m + 1) / 2 pairs.
    """
    m = np.maximum(lengths - 1, 0) if visible is None else np.clip(lengths - 1, 0, visible)
    return lengths * m - m * (m + 1) // 2


def _sizes(ids: np.ndarray, *, most: int) -> np.ndarray:
    """Returns int64[rows * most], the count of each id from 1 to `most` in each row; 0 is padding."""
    # one bincount for all rows: row r has the bins from r * (most + 1) on
    rows = np.arange(len(ids))[:, None] * (most + 1)
    sizes = np.bincount((rows + ids).ravel(), minlength=len(ids) * (most + 1)).reshape(len(ids), most + 1)
    return sizes[:, 1:].ravel()


def _block_sizes(config: ModelConfig, tokens: Sequences | None) -> np.ndarray:
    """Returns the number of tokens of each block of each segment of each row."""
    if tokens is None:
        return np.zeros(0, np.int64)
    segments, blocks = np.asarray(tokens.segments), tokens.blocks
    images = _language_model(config).image_stack.images
    # T5Gemma.encode makes blocks of images too
    if isinstance(config, EncoderDecoderConfig) and config.encoder_attention == "causal" and images is not None:
        blocks = image_blocks(tokens.tokens, images.token) if blocks is None else blocks
    if blocks is None:
        return np.zeros(0, np.int64)
    blocks = np.asarray(blocks)
    most = int(blocks.max(initial=0))
    # segments have block ids of their own, so a block is identified by both
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
    """Returns the FLOPs of a tower on `number` inputs of `length` tokens, attention without a mask."""
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
    # the learned query is the same for every image, so its projection is not counted
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
