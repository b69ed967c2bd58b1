"""The mean of several checkpoints: the last five, in T5Gemma 2's recipe (arXiv 2512.14856, section 3.1)."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from t5g2.checkpoint.state import Checkpoints
from t5g2.core import tree
from t5g2.core.errors import UserError

Tree = TypeVar("Tree")


def last(checkpoints: Checkpoints, count: int) -> list[int]:
    """The newest `count` steps, ascending.

    Raises:
      UserError: there are fewer.
    """
    steps = checkpoints.steps()
    if not 1 <= count <= len(steps):
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(
            f"cannot average {count} checkpoints of {checkpoints.directory}: there are {len(steps)} ({there}). "
            f"Average 1 up to all of them, or keep more of them (save.keep)"
        )
    return steps[-count:]


def mean(checkpoints: Checkpoints, steps: Sequence[int], params: Tree) -> Tree:
    """The weights averaged over `steps`: summed in float32 in the order given, divided once, cast to each leaf's dtype.

    One leaf of one step is read at a time, so this takes the memory of one model, and of one leaf in float32.

    Args:
      checkpoints: where the steps are.
      steps: which to average.
      params: the abstract model, whose leaves say dtype, shape and sharding.

    Raises:
      UserError: a step is missing or damaged, or holds another model; with the difference.
    """
    averaged: dict[str, Any] = {}
    for leaves in zip(*(checkpoints.weights(step, params) for step in steps), strict=True):
        name, first = leaves[0]
        total = first.astype(jnp.float32)
        for _, leaf in leaves[1:]:
            total = _add(total, leaf)
        # a whole array of divisors: XLA multiplies by the reciprocal of a scalar, which rounds differently
        averaged[name] = _divide(total, jnp.full_like(total, len(steps))).astype(first.dtype)
    return tree.refill(params, averaged)


@jax.jit
def _add(total: jax.Array, leaf: jax.Array) -> jax.Array:
    return total + leaf.astype(jnp.float32)


@jax.jit
def _divide(total: jax.Array, counts: jax.Array) -> jax.Array:
    return total / counts
