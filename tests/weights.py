"""Random weights for tiny models, large enough to matter, that any NumPy makes alike."""

import functools
import zlib

import jax
import jax.numpy as jnp
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
    return dict(_drawn(config))


@functools.cache
def _drawn(config: ModelConfig) -> dict[tree.LeafKey, np.ndarray]:
    made = {}
    for key, leaf in tree.leaves(build.abstract(config)).items():
        draw = np.random.RandomState(zlib.crc32(tree.name(key).encode()))
        spread = 0.2 if len(leaf.shape) == 1 else np.prod(leaf.shape[:1]) ** -0.5
        made[key] = np.asarray(spread * draw.standard_normal(leaf.shape), np.float32)
        made[key].flags.writeable = False  # they are everyone's
    return made


def checksum(config: ModelConfig) -> int:
    """A number that is another one if any bit of the weights is."""
    return zlib.crc32(b"".join(array.tobytes() for array in weights(config).values()))


def model(config: ModelConfig):
    """Our model with these weights."""
    return tree.build(build.abstract(config), weights(config).__getitem__)


def on_host(config: ModelConfig):
    """The same model of NumPy arrays, to be written to a folder: on a device every slice of a stack is a program."""
    return jax.device_get(model(config))


def rounded(model):
    """The model with weights that bfloat16 holds, rounded by NumPy, so that nothing is compiled."""
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf).astype(jnp.bfloat16).astype(np.float32)), model)
