"""Random weights for tiny models, large enough to matter, that any NumPy makes alike."""

import zlib

import numpy as np

from t5g2.core import tree
from t5g2.models import build
from t5g2.models.config import ModelConfig


def weights(config: ModelConfig) -> dict[tree.LeafKey, np.ndarray]:
    """Random float32 weights by (path, layer): large enough that every norm, window and angle tells in the output, and
    small enough that float32's own error does not (at most 5e-6 against float64, for transformers and for us).

    RandomState's stream is frozen by NumPy's compatibility policy, so golden files need not hold the weights; each
    leaf is seeded by its own name.
    """
    made = {}
    for key, leaf in tree.leaves(build.abstract(config)).items():
        draw = np.random.RandomState(zlib.crc32(tree.name(key).encode()))
        spread = 0.2 if len(leaf.shape) == 1 else np.prod(leaf.shape[:1]) ** -0.5
        made[key] = (spread * draw.standard_normal(leaf.shape)).astype(np.float32)
    return made


def checksum(config: ModelConfig) -> int:
    """A number that is another one if any bit of the weights is."""
    return zlib.crc32(b"".join(array.tobytes() for array in weights(config).values()))


def model(config: ModelConfig):
    """Our model with these weights."""
    return tree.build(build.abstract(config), weights(config).__getitem__)
