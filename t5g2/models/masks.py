"""Visibility of keys for queries, as a structure that every attention backend translates; never a dense array.

B batch, T queries, S keys, K key/value heads, H head size. A query sees a key if

    they are in the same segment, which is not 0 (padding);
    the key is at most `left` positions before the query and at most `right` after it;
    and, if the mask is causal, the key is not after the query - unless both are in the same block that is not 0: blocks
    (images, bidirectional prefixes) lift causality, and nothing else.

Positions and segments belong to tokens, not to indices of an array: one mask serves training, packing, prefill and
decode. Below, 1 = visible, a row for each query, a column for each key.

Left: two examples packed in one row, segments [1 1 1 2 2 0]. Right: the same row in a local layer of merged attention,
which sees itself through the window, and an encoder row with segments [1 1 2 2 2 0] that the window never hides:

    packed: causal()      merged: causal(window=2) | ALL
    1 0 0 0 0 0           1 0 0 0 0 0 | 1 1 0 0 0 0
    1 1 0 0 0 0           1 1 0 0 0 0 | 1 1 0 0 0 0
    1 1 1 0 0 0           0 1 1 0 0 0 | 1 1 0 0 0 0
    0 0 0 1 0 0           0 0 0 1 0 0 | 0 0 1 1 1 0
    0 0 0 1 1 0           0 0 0 1 1 0 | 0 0 1 1 1 0
    0 0 0 0 0 0           0 0 0 0 0 0 | 0 0 0 0 0 0

Decoding: the cache of 8 slots holds prompts of 5 and of 3 tokens, padded to 5 on the left or on the right, and one
token decoded after them. The next token of the two rows, at positions 6 and 4, sees these slots:

    padded left: positions      padded right: positions
    0 1 2 3 4 5 . .             0 1 2 3 4 5 . .
    . . 0 1 2 3 . .             0 1 2 . . 3 . .

    padded left: causal(3)      padded right: causal(3)
    0 0 0 0 1 1 0 0             0 0 0 0 1 1 0 0
    0 0 0 0 1 1 0 0             0 0 1 0 0 1 0 0
"""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array

from t5g2.core.batch import Sequences
from t5g2.models.config import EncoderDecoderConfig, LayerKind, TextConfig


@dataclass(frozen=True)
class Mask:
    """Visibility of the keys of one source, by position.

    Attributes:
      causal: keys after the query are hidden, except those of the query's own block.
      left, right: number of visible positions before and after the query's own; None = all.
    """

    causal: bool
    left: int | None = None
    right: int | None = None


ALL = Mask(causal=False)


class Keys(NamedTuple):
    """One source of keys.

    Attributes:
      k_BSKH, v_BSKH: keys and values.
      tokens: their segments, positions and blocks; those of the queries themselves are the same object.
      axis: logical axis of their columns.
      offset: the queries' own tokens are among these, from this column on; an array if it differs between devices.
        None = they are not, or `tokens` are those of the queries.
      score_offset: float32[], added to the scores of all these keys, after the soft cap; no gradient. None = nothing.
    """

    k_BSKH: Array
    v_BSKH: Array
    tokens: Sequences
    axis: str = "length"
    offset: int | Array | None = None
    score_offset: Array | None = None


def causal(window: int | None = None, *, ahead: int | None = None) -> Mask:
    """Returns the mask of the query's own key and those before it: `window` keys in all, None = all.

    Five queries and keys, 1 = visible (transformers masking_utils.py: sliding_window_overlay):

        causal()        causal(window=3)
        1 0 0 0 0       1 0 0 0 0
        1 1 0 0 0       1 1 0 0 0
        1 1 1 0 0       1 1 1 0 0
        1 1 1 1 0       0 1 1 1 0
        1 1 1 1 1       0 0 1 1 1

    Block ids [0 1 1 1 0] (attention among positions 1 to 3 is bidirectional; the window still bounds the keys before):

        causal()        causal(window=2)
        1 0 0 0 0       1 0 0 0 0
        1 1 1 1 0       1 1 1 1 0
        1 1 1 1 0       0 1 1 1 0
        1 1 1 1 0       0 0 1 1 0
        1 1 1 1 1       0 0 0 1 1

    `ahead` bounds the visible positions after the query within its block too, as in the official code
    (google-deepmind/gemma: sliding masks are bounded on both sides); window = 2:

        ahead=None      ahead=1
        1 0 0 0 0       1 0 0 0 0
        1 1 1 1 0       1 1 1 0 0
        0 1 1 1 0       0 1 1 1 0
        0 0 1 1 0       0 0 1 1 0
        0 0 0 1 1       0 0 0 1 1
    """
    return Mask(causal=True, left=None if window is None else window - 1, right=ahead)


def bidirectional(window: int | None = None) -> Mask:
    """Returns the mask of keys on both sides: `window` in all, the query's own included; None = all.

    ceil(W/2) - 1 keys back and floor(W/2) forward (transformers modeling_t5gemma2.py: sliding_window_mask_function with
    is_causal=False). For T5Gemma 2; T5Gemma has `each_side`.

        bidirectional(window=3)     bidirectional(window=4)
        1 1 0 0 0                   1 1 1 0 0
        1 1 1 0 0                   1 1 1 1 0
        0 1 1 1 0                   0 1 1 1 1
        0 0 1 1 1                   0 0 1 1 1
        0 0 0 1 1                   0 0 0 1 1
    """
    return ALL if window is None else Mask(causal=False, left=(window - 1) // 2, right=window // 2)


def each_side(reach: int) -> Mask:
    """Returns the mask of keys up to `reach` positions before and after the query (T5Gemma: W - 1).

    each_side(1)
    1 1 0 0 0
    1 1 1 0 0
    0 1 1 1 0
    0 0 1 1 1
    0 0 0 1 1
    """
    return Mask(causal=False, left=reach, right=reach)


def decoder(config: TextConfig, kind: LayerKind) -> Mask:
    """Returns the mask among the tokens of a decoder, or of a decoder-only model, in a layer of this kind."""
    if kind == "global":
        return causal()
    # the window also bounds the image tokens after the query, if the model was trained so
    bounded = config.images is not None and config.images.window
    return causal(config.window, ahead=config.window - 1 if bounded else None)


def encoder(config: EncoderDecoderConfig, kind: LayerKind) -> Mask:
    """Returns the mask among the tokens of an encoder in a layer of this kind.

    It follows from config.encoder_attention and config.encoder_window.
    """
    if config.encoder_attention == "causal":
        return decoder(config.encoder, kind)
    if kind == "global":
        return ALL
    # three meanings of one number W: see EncoderDecoderConfig.encoder_window
    window = config.encoder.window
    if config.encoder_window == "around":
        return bidirectional(window)
    return each_side(window if config.encoder_window == "each_side_inclusive" else window - 1)
