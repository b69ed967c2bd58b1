"""The mean of several checkpoints: the last five, in T5Gemma 2's recipe (arXiv 2512.14856, section 3.1)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from t5g2.checkpoint.train_states import Checkpoints
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.core.tree import Leaf, LeafKey

BLOCK_ELEMENTS = 2**22


def newest_steps(checkpoints: Checkpoints, count: int) -> list[int]:
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


def mean_leaves(checkpoints: Checkpoints, steps: Sequence[int], params: Any) -> dict[LeafKey, Leaf]:
    """The weights averaged over `steps`: summed in float32 in the order given, divided once, cast to each leaf's dtype.

    A leaf is computed on the host when it is read. It is stored with others, a stack of layers, and these follow one
    another here: read in this order, each is read once of each step, and this takes the memory of one of them in
    float32 and of one as it is stored.

    Args:
      checkpoints: where the steps are; open for as long as leaves are read. In one process.
      steps: which to average.
      params: the abstract model, whose leaves say dtype and shape.

    Raises:
      UserError: a step is missing or damaged, or holds another model, with the difference; that the contents of a leaf
        have changed shows when it is read.
    """
    sums = _SummedLeaves([checkpoints.weights(step, params) for step in steps])
    stored = tree.named(params)
    places = tree.refill(params, {name: _StoredLeaf(name, x.shape, x.dtype) for name, x in stored.items()})
    found = {key: (leaf, leaf.read()) for key, leaf in tree.leaves(places).items()}
    order = {name: number for number, name in enumerate(stored)}
    return {
        key: replace(leaf, read=partial(_mean_leaf, sums, place, leaf.dtype))
        for key, (leaf, place) in sorted(found.items(), key=lambda entry: order[entry[1][1].name])
    }


@dataclass(frozen=True, eq=False)
class _StoredLeaf:
    """Where a leaf is stored: under which name, and as which of its layers (None = it is all of it).

    It stands in a tree for the array of that name, which asks nothing else of an array.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    layer_index: int | None = None

    def __getitem__(self, index: int) -> "_StoredLeaf":
        return replace(self, index=index)


class _SummedLeaves:
    """Stored leaves summed over all steps, of which the last one is kept."""

    def __init__(self, steps: Sequence[Mapping[str, Callable[[], jax.Array]]]):
        self.steps = steps
        self._name, self._sum = "", np.empty(0, np.float32)

    def sum_of(self, name: str) -> np.ndarray:
        """float32: the sum of the stored leaf of this name."""
        if self._name != name:
            self._name, self._sum = "", np.empty(0, np.float32)  # gone before the next one comes
            first, *others = (step[name] for step in self.steps)
            total = np.array(first(), np.float32)
            for read in others:
                _add_in_blocks(total, read())
            self._name, self._sum = name, total
        return self._sum


def _add_in_blocks(total: np.ndarray, x: jax.Array) -> None:
    # a function of its own: the array is let go of before the next one is read
    into, values = total.reshape(-1), np.asarray(x).reshape(-1)
    for start in range(0, into.size, BLOCK_ELEMENTS):
        into[start : start + BLOCK_ELEMENTS] += values[start : start + BLOCK_ELEMENTS].astype(np.float32)


def _mean_leaf(sums: _SummedLeaves, place: _StoredLeaf, dtype: Any) -> np.ndarray:
    total = sums.sum_of(place.name)
    total = total if place.layer_index is None else total[place.layer_index]
    mean = np.empty(total.shape, dtype)
    from_, into = total.reshape(-1), mean.reshape(-1)
    for start in range(0, into.size, BLOCK_ELEMENTS):
        block = from_[start : start + BLOCK_ELEMENTS] / np.float32(len(sums.steps))
        into[start : start + BLOCK_ELEMENTS] = block.astype(dtype)
    return mean
