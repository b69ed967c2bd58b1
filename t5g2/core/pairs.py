"""A pair of token sequences, inputs and targets, as one array.

    inputs [11 12 13], targets [21 22]:  [3 11 12 13 21 22]

The first entry is the number of inputs. So a pair is stored and passed on like a chunk of text; it is never cut.
"""

import numpy as np

# the number of inputs is stored like a token, and tokens of small vocabularies have two bytes
MAX_INPUTS = (1 << 16) - 1


def join(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns int32[1 + inputs + targets]."""
    return np.concatenate([[len(inputs)], inputs, targets]).astype(np.int32)


def split(pair: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the inputs and the targets of a pair."""
    end = 1 + int(pair[0])
    return pair[1:end], pair[end:]
