"""Tensors that are read when they are needed: the unit in which every format is imported and exported."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from t5g2.core.casting import cast_weights
from t5g2.core.tree import Leaf


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of known shape and dtype whose `read` loads or computes it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = field(repr=False)

    @property
    def size_bytes(self) -> int:
        """Size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensor_from_leaf(leaf: Leaf) -> Tensor:
    """Returns a leaf of a model as a tensor on the host; reading it gathers the parts that other processes hold.

    All processes read a leaf that is spread over them, because gathering is a collective operation.
    """

    def gather() -> np.ndarray:
        array = leaf.read()
        # np.asarray reads only arrays that this process holds in full
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            array = multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(array)

    return Tensor(leaf.shape, np.dtype(leaf.dtype), gather)


def cast_tensor(tensor: Tensor, dtype: Any, *, name: str) -> Tensor:
    """Returns the tensor in another dtype (None = its own), cast and checked (core/casting.py) when it is read."""
    target = tensor.dtype if dtype is None else jnp.dtype(dtype)
    return Tensor(tensor.shape, target, lambda: cast_weights(tensor.read(), target, name=name))


def zero_tensor(shape: tuple[int, ...], dtype: Any) -> Tensor:
    """Returns a tensor of zeros, allocated when it is read."""
    return Tensor(shape, jnp.dtype(dtype), lambda: np.zeros(shape, jnp.dtype(dtype)))
