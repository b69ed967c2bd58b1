"""Span corruption as functions on arrays: random span lengths, and the encoder and decoder sequences."""

import numpy as np


def random_parts(items: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Returns int64[parts], lengths >= 1 that sum to `items`, every such composition equally likely.

    With items = 7, parts = 3 and cuts after items 2 and 3: [2 1 4].
    """
    edges = np.empty(parts + 1, np.int64)
    edges[0], edges[-1] = -1, items - 1
    # a composition is a choice of parts - 1 of the items - 1 gaps between items
    cuts = rng.choice(items - 1, parts - 1, replace=False, shuffle=False)
    cuts.sort()
    edges[1:-1] = cuts
    return edges[1:] - edges[:-1]


def corrupt(
    tokens: np.ndarray, kept_lengths: np.ndarray, noise_lengths: np.ndarray, sentinels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns encoder tokens, targets without EOS, and the position of each target in the text; -1 = sentinel.

    Kept and noise spans alternate, a kept one first; each noise span becomes a sentinel of the encoder's tokens. With
    tokens [11 … 20], kept_lengths [2 3], noise_lengths [2 3], sentinels [90 91]:

        [11 12 90 15 16 17 91]   [90 13 14 91 18 19 20]   [-1 2 3 -1 7 8 9]
    """
    spans = np.arange(len(sentinels))
    # Both outputs are gathered from the text in one step: token p of an output is token p + shift of the text, with one
    # shift for each span. The places of sentinels are gathered too, and then overwritten.
    # encoder: kept span i comes after noise spans 0 to i - 1 in the text, and after i sentinels in the output
    shift = noise_lengths.cumsum() - noise_lengths - spans
    encoder_tokens = tokens[_shifted(shift, kept_lengths + 1)]
    encoder_tokens[sentinel_positions(kept_lengths) + kept_lengths] = sentinels
    # targets: noise span i comes after kept spans 0 to i in the text, and after i + 1 sentinels in the output
    shift = kept_lengths.cumsum() - spans - 1
    origins = _shifted(shift, noise_lengths + 1)
    targets, at = tokens[origins], sentinel_positions(noise_lengths)
    targets[at] = sentinels
    origins[at] = -1
    return encoder_tokens, targets, origins


def _shifted(shift: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns int64[sum of lengths]: 0, 1, 2, … plus the shift of the span that each is in."""
    indices = shift.repeat(lengths)
    indices += np.arange(len(indices))
    return indices


def sentinel_positions(noise_lengths: np.ndarray) -> np.ndarray:
    """Returns int64[spans], the positions of the sentinels in the targets; with noise_lengths [2 3]: [0 3]."""
    lengths = noise_lengths + 1
    return lengths.cumsum() - lengths
