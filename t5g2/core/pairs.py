"""A pair of token sequences as one array: what is read, and what is asked for.

    inputs [11 12 13], targets [21 22]:  [3 11 12 13 21 22]

The first number says how many inputs follow. So a pair goes wherever a chunk of text goes, and is never cut.
"""

import numpy as np

# the number of inputs is kept in the place of a token, which takes two bytes with small vocabularies
MAX_INPUTS = (1 << 16) - 1


def join(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """int32[1 + inputs + targets]."""
    return np.concatenate([[len(inputs)], inputs, targets]).astype(np.int32)


def split(pair: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and the targets of a pair."""
    end = 1 + int(pair[0])
    return pair[1:end], pair[end:]
