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
) -> tuple[np.ndarray, np.ndarray]:
    """What the encoder reads and what the decoder is asked for, without EOS.

    With tokens [11 … 20], kept_lengths [2 3], noise_lengths [2 3], sentinels [90 91]:

        [11 12 90 15 16 17 91]   [90 13 14 91 18 19 20]
    """
    part_lengths = np.stack([kept_lengths, noise_lengths], axis=1).ravel()
    noise = np.repeat(np.arange(len(part_lengths)) % 2 == 1, part_lengths)
    return _with_sentinels(tokens[~noise], kept_lengths, sentinels, after=True), _with_sentinels(
        tokens[noise], noise_lengths, sentinels, after=False
    )


def sentinel_places(noise_lengths: np.ndarray) -> np.ndarray:
    """int64[spans]: where the sentinels stand among the targets; with noise_lengths [2 3]: [0 3]."""
    return np.cumsum(noise_lengths + 1) - (noise_lengths + 1)


def _with_sentinels(tokens: np.ndarray, lengths: np.ndarray, sentinels: np.ndarray, *, after: bool) -> np.ndarray:
    """The parts of `tokens`, each with its sentinel after or before it."""
    places = np.cumsum(lengths + 1) - 1 if after else sentinel_places(lengths)
    out = np.empty(len(tokens) + len(sentinels), np.int32)
    is_token = np.ones(len(out), bool)
    is_token[places] = False
    out[places] = sentinels
    out[is_token] = tokens
    return out
