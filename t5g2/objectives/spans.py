"""Spans: where a text is cut, and what both sides of a model read of it. Arrays in, arrays out."""

import numpy as np


def random_parts(items: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """int64[parts]: lengths >= 1 that sum to `items`, every such composition equally likely.

    With items = 7, parts = 3 and cuts after items 2 and 3: [2 1 4].
    """
    edges = np.empty(parts + 1, np.int64)
    edges[0], edges[-1] = -1, items - 1
    cuts = rng.choice(items - 1, parts - 1, replace=False, shuffle=False)
    cuts.sort()
    edges[1:-1] = cuts
    return edges[1:] - edges[:-1]


def corrupt(
    tokens: np.ndarray, kept_lengths: np.ndarray, noise_lengths: np.ndarray, sentinels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the encoder reads, what the decoder is asked for, without EOS, and where each target was; -1 = nowhere.

    With tokens [11 … 20], kept_lengths [2 3], noise_lengths [2 3], sentinels [90 91]:

        [11 12 90 15 16 17 91]   [90 13 14 91 18 19 20]   [-1 2 3 -1 7 8 9]
    """
    spans = np.arange(len(sentinels))
    # token p of an output is token p + shift of the text; where a sentinel goes, a token that it replaces
    shift = noise_lengths.cumsum() - noise_lengths - spans
    encoder_tokens = tokens[_shifted(shift, kept_lengths + 1)]
    encoder_tokens[sentinel_places(kept_lengths) + kept_lengths] = sentinels
    shift = kept_lengths.cumsum() - spans - 1
    origins = _shifted(shift, noise_lengths + 1)
    targets, places = tokens[origins], sentinel_places(noise_lengths)
    targets[places] = sentinels
    origins[places] = -1
    return encoder_tokens, targets, origins


def _shifted(shift: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64[sum of lengths]: 0, 1, 2, … plus the shift of the part that each is in."""
    indices = shift.repeat(lengths)
    indices += np.arange(len(indices))
    return indices


def sentinel_places(noise_lengths: np.ndarray) -> np.ndarray:
    """int64[spans]: where the sentinels stand among the targets; with noise_lengths [2 3]: [0 3]."""
    lengths = noise_lengths + 1
    return lengths.cumsum() - lengths
