"""Who sees whom: structure that every attention backend turns into what it runs best, never an array.

B batch, T queries, S keys, K key/value heads, H head size. A query sees a key if

    they are of the same segment, and segment 0 (padding) is none;
    the key is at most `left` positions before the query and at most `right` after it;
    and, where the mask is causal, the key is not after the query - unless both are of one block that is not 0: blocks
    (images, bidirectional prefixes) lift causality, and nothing else.

Positions and segments belong to the tokens, not to their place in an array: one mask serves training, packing, prefill
and decode. Below, 1 = visible, a row for each query, a column for each key.

Two examples packed in one row, segments [1 1 1 2 2 0]; and what such a decoder row sees of itself and of an encoder row
with segments [1 1 2 2 2 0] in a local layer of merged attention, where the window never hides the encoder:

    packed: causal()      merged: causal(window=2) | ALL
    1 0 0 0 0 0           1 0 0 0 0 0 | 1 1 0 0 0 0
    1 1 0 0 0 0           1 1 0 0 0 0 | 1 1 0 0 0 0
    1 1 1 0 0 0           0 1 1 0 0 0 | 1 1 0 0 0 0
    0 0 0 1 0 0           0 0 0 1 0 0 | 0 0 1 1 1 0
    0 0 0 1 1 0           0 0 0 1 1 0 | 0 0 1 1 1 0
    0 0 0 0 0 0           0 0 0 0 0 0 | 0 0 0 0 0 0

One token is decoded for two rows, at positions 6 and 4. In the cache of 8 slots stand prompts of 5 and of 3 tokens,
padded to 5 on the left or on the right, and one token decoded after them; what the new token sees beside itself:

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
    """Which keys of one source are visible, by position.

    Attributes:
      causal: keys after the query are hidden, but for those of the query's own block.
      left, right: how many positions before and after the query's own are visible; None = all.
    """

    causal: bool
    left: int | None = None
    right: int | None = None


ALL = Mask(causal=False)


class Keys(NamedTuple):
    """One source of keys: k_BSKH, v_BSKH and the tokens they stand for (their segments, positions and blocks)."""

    k_BSKH: Array
    v_BSKH: Array
    tokens: Sequences


def causal(window: int | None = None, *, ahead: int | None = None) -> Mask:
    """The query's own key and those before it: `window` keys in all, None = every one.

    Five queries and keys, 1 = visible (transformers masking_utils.py: sliding_window_overlay):

        causal()        causal(window=3)
        1 0 0 0 0       1 0 0 0 0
        1 1 0 0 0       1 1 0 0 0
        1 1 1 0 0       1 1 1 0 0
        1 1 1 1 0       0 1 1 1 0
        1 1 1 1 1       0 0 1 1 1

    Block ids [0 1 1 1 0] (positions 1 to 3 see each other both ways; the window still bounds what lies behind):

        causal()        causal(window=2)
        1 0 0 0 0       1 0 0 0 0
        1 1 1 1 0       1 1 1 1 0
        1 1 1 1 0       0 1 1 1 0
        1 1 1 1 0       0 0 1 1 0
        1 1 1 1 1       0 0 0 1 1

    With a window the block's own tokens ahead are bounded too if `ahead` says so, as in the official code
    (google-deepmind/gemma, sliding masks are bounded on both sides); window = 2:

        ahead=None      ahead=1
        1 0 0 0 0       1 0 0 0 0
        1 1 1 1 0       1 1 1 0 0
        0 1 1 1 0       0 1 1 1 0
        0 0 1 1 0       0 0 1 1 0
        0 0 0 1 1       0 0 0 1 1
    """
    return Mask(causal=True, left=None if window is None else window - 1, right=ahead)


def bidirectional(window: int | None = None) -> Mask:
    """Keys on both sides: `window` in all, the query's own included; an even window reaches one further forward.

    ceil(W/2) - 1 back and floor(W/2) forward (transformers modeling_t5gemma2.py: sliding_window_mask_function with
    is_causal=False). T5Gemma 2 only: `each_side` is what T5Gemma 1 has.

        bidirectional(window=3)     bidirectional(window=4)
        1 1 0 0 0                   1 1 1 0 0
        1 1 1 0 0                   1 1 1 1 0
        0 1 1 1 0                   0 1 1 1 1
        0 0 1 1 1                   0 0 1 1 1
        0 0 0 1 1                   0 0 0 1 1
    """
    return ALL if window is None else Mask(causal=False, left=(window - 1) // 2, right=window // 2)


def each_side(reach: int) -> Mask:
    """Keys up to `reach` positions before the query and after it (T5Gemma 1: google-deepmind/gemma has W - 1).

    each_side(1)
    1 1 0 0 0
    1 1 1 0 0
    0 1 1 1 0
    0 0 1 1 1
    0 0 0 1 1
    """
    return Mask(causal=False, left=reach, right=reach)


def decoder(config: TextConfig, kind: LayerKind) -> Mask:
    """How the tokens of a decoder, or of a decoder-only model, see each other in a layer of this kind."""
    if kind == "global":
        return causal()
    bounded = config.images is not None and config.images.window
    return causal(config.window, ahead=config.window - 1 if bounded else None)


def encoder(config: EncoderDecoderConfig, kind: LayerKind) -> Mask:
    """How the tokens of an encoder see each other in a layer of this kind: config.encoder_attention and encoder_window
    say it.
    """
    if config.encoder_attention == "causal":
        return decoder(config.encoder, kind)
    if kind == "global":
        return ALL
    window = config.encoder.window
    if config.encoder_window == "around":
        return bidirectional(window)
    return each_side(window if config.encoder_window == "each_side_inclusive" else window - 1)
