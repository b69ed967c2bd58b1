"""Exact FLOPs of a model on given tokens, by part: what MFU divides.

Counted: two FLOPs for each multiply-add of a matrix product, of tokens that are no padding, and in attention of visible
(query, key) pairs only. Not counted: norms, softmax, rotary embedding, embedding lookup (all well below 1%), and what
an implementation computes beside: padding, hidden pairs, rematerialisation. So two implementations that compute the
same have the same FLOPs, and MFU compares their time alone.

L layers, D width, N query heads, K key/value heads, H head size, F MLP width, V vocabulary. One token takes, forward:

    projections  L * (4 D N H + 4 D K H)     queries and output; keys and values
    mlp          L * 6 D F
    memory       L * 4 D K H                 keys and values of an encoder state, in every decoder layer
    attention    4 N H for each pair         scores and weighted sum; pairs depend on the kind of layer
    head         2 D V                       decoder tokens only
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

from t5g2.core.batch import Batch, Stream
from t5g2.models import masks
from t5g2.models.config import EncoderDecoderConfig, LayerKind, ModelConfig, TextConfig
from t5g2.models.masks import Mask

TRAINING = 3  # forward; backward by the inputs and by the weights of every product


@dataclass(frozen=True)
class Counts:
    """Tokens that are no padding, and visible (query, key) pairs of one layer of each kind."""

    encoder_tokens: int = 0
    decoder_tokens: int = 0
    encoder_local: int = 0
    encoder_global: int = 0
    decoder_local: int = 0
    decoder_global: int = 0
    cross: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: int) -> "Counts":
        return Counts(*(getattr(self, f.name) * times for f in fields(self)))


def forward(config: ModelConfig, counts: Counts) -> dict[str, int]:
    """FLOPs of one forward pass, the loss head included, by part."""
    decoder = config.decoder if isinstance(config, EncoderDecoderConfig) else config
    parts = _stack(
        "decoder", decoder, counts.decoder_tokens, local=counts.decoder_local, everywhere=counts.decoder_global
    )
    if isinstance(config, EncoderDecoderConfig):
        parts |= _stack(
            "encoder",
            config.encoder,
            counts.encoder_tokens,
            local=counts.encoder_local,
            everywhere=counts.encoder_global,
        )
        parts["cross/memory"] = decoder.layers * 4 * decoder.width * _keys(decoder) * counts.encoder_tokens
        parts["cross/attention"] = decoder.layers * 4 * _queries(decoder) * counts.cross
    parts["head"] = 2 * decoder.width * decoder.vocab_size * counts.decoder_tokens
    return parts


def of_batch(config: ModelConfig, batch: Batch) -> int:
    """FLOPs of one training step on these rows (NumPy arrays): forward and backward."""
    return TRAINING * sum(forward(config, count(config, batch.encoder, batch.decoder)).values())


def of_lengths(config: ModelConfig, *, encoder: int = 0, decoder: int) -> Counts:
    """The counts of one example of so many encoder and decoder tokens."""
    return _count(config, np.array([encoder]), np.array([decoder]))


def count(config: ModelConfig, encoder: Stream | None, decoder: Stream) -> Counts:
    """The counts of packed rows, from their segments and block ids; positions must run through each segment."""
    segments = np.asarray(decoder.segments)
    sides = [np.zeros_like(segments) if encoder is None else np.asarray(encoder.segments), segments]
    most = max(int(side.max(initial=0)) for side in sides)
    tokens = (_sizes(side, most=most) for side in sides)
    blocks = None if decoder.blocks is None else _block_sizes(decoder)
    return _count(config, *tokens, blocks=blocks)


def _count(
    config: ModelConfig, encoder: np.ndarray, decoder: np.ndarray, *, blocks: np.ndarray | None = None
) -> Counts:
    """The counts of examples of encoder[i] and decoder[i] tokens, and of blocks of these sizes in their decoders."""
    causal = config.decoder if isinstance(config, EncoderDecoderConfig) else config
    # causality hides one half of a block's pairs, and the block brings them back
    lifted = 0 if blocks is None else int(np.sum(blocks * (blocks - 1) // 2))
    made = {
        "decoder_tokens": int(decoder.sum()),
        "decoder_local": _pairs(masks.decoder(causal, "local"), decoder) + lifted,
        "decoder_global": _pairs(masks.decoder(causal, "global"), decoder) + lifted,
    }
    if isinstance(config, EncoderDecoderConfig):
        made |= {
            "encoder_tokens": int(encoder.sum()),
            "encoder_local": _pairs(masks.encoder(config.encoder, "local"), encoder),
            "encoder_global": _pairs(masks.encoder(config.encoder, "global"), encoder),
            "cross": int(np.sum(encoder * decoder)),
        }
    return Counts(**made)


def _pairs(mask: Mask, lengths: np.ndarray) -> int:
    """Visible pairs of sequences of these lengths, summed.

    Of n tokens, those at a distance of 1 to m see m others on one side, but the m at the end fewer, down to none:
    n * m - m * (m + 1) / 2 pairs, where m = min(visible, n - 1).
    """

    def side(visible: int | None) -> np.ndarray:
        m = np.maximum(lengths - 1, 0) if visible is None else np.clip(lengths - 1, 0, visible)
        return lengths * m - m * (m + 1) // 2

    right = np.zeros_like(lengths) if mask.causal else side(mask.right)
    return int(np.sum(lengths + side(mask.left) + right))


def _sizes(ids: np.ndarray, *, most: int) -> np.ndarray:
    """int64[rows * most]: how often each id from 1 to `most` stands in each row; 0 is padding."""
    rows = np.arange(len(ids))[:, None] * (most + 1)
    sizes = np.bincount((rows + ids).ravel(), minlength=len(ids) * (most + 1)).reshape(len(ids), most + 1)
    return sizes[:, 1:].ravel()


def _block_sizes(decoder: Stream) -> np.ndarray:
    """Tokens of each block of each segment of each row."""
    segments, blocks = np.asarray(decoder.segments), np.asarray(decoder.blocks)
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


def _queries(config: TextConfig) -> int:
    return config.heads * config.head_size


def _keys(config: TextConfig) -> int:
    return config.kv_heads * config.head_size
