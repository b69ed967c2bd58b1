"""Average of checkpoints: T5Gemma 2 averages the last five (arXiv 2512.14856, section 3.1)."""

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
    """Returns the newest `count` steps, ascending.

    Raises:
      UserError: there are fewer steps, or none.
    """
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{checkpoints.directory} holds no checkpoint; give the workdir of a run that has saved one")
    if not 1 <= count <= len(steps):
        raise UserError(
            f"cannot average {count} checkpoints of {checkpoints.directory}, which holds those of steps "
            f"{', '.join(map(str, steps))}; average 1 to {len(steps)}, or keep more of them (save.keep)"
        )
    return steps[-count:]


def mean_leaves(checkpoints: Checkpoints, steps: Sequence[int], params: Any) -> dict[LeafKey, Leaf]:
    """Returns the mean of the weights of `steps`: summed in float32 in that order, divided, cast to each dtype.

    A leaf is computed on the host when it is read. The layers of a stack are stored as one array and follow one another
    in the returned order: if leaves are read in this order, every stored array is read once per step, and memory holds
    one of them in float32 and one as it is stored.

    Args:
      checkpoints: the checkpoints of a run, open for as long as leaves are read. Only for a single process.
      steps: the steps to average.
      params: the abstract model, which gives dtypes and shapes.

    Raises:
      UserError: a step is missing or damaged, or holds another model, with the difference. Changed contents of a leaf
        are detected when it is read.
    """
    sums = _SummedLeaves([checkpoints.weights(step, params) for step in steps])
    stored = tree.named(params)
    # with placeholders in place of the arrays, tree.leaves gives the stored array and the layer of each leaf
    placeholders = tree.refill(params, {name: _Location(name, x.shape, x.dtype) for name, x in stored.items()})
    located = {key: (leaf, leaf.read()) for key, leaf in tree.leaves(placeholders).items()}
    order = {name: number for number, name in enumerate(stored)}
    return {
        key: replace(leaf, read=partial(_mean_leaf, sums, place, leaf.dtype))
        for key, (leaf, place) in sorted(located.items(), key=lambda entry: order[entry[1][1].name])
    }


@dataclass(frozen=True, eq=False)
class _Location:
    """Location of a leaf: the name of the stored array, and its layer in it (None = the leaf is all of the array).

    It takes the place of the array in a tree; indexing it gives the location of one layer.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    layer_index: int | None = None

    def __getitem__(self, index: int) -> "_Location":
        return replace(self, layer_index=index)


class _SummedLeaves:
    """Sums of stored arrays over all steps; the last sum is kept."""

    def __init__(self, steps: Sequence[Mapping[str, Callable[[], jax.Array]]]):
        self.steps = steps
        self._name, self._sum = "", np.empty(0, np.float32)

    def sum_of(self, name: str) -> np.ndarray:
        """Returns float32, the sum of the stored array of this name."""
        if self._name != name:
            self._name, self._sum = "", np.empty(0, np.float32)  # free the last sum before the next one is computed
            first, *others = (step[name] for step in self.steps)
            total = np.array(first(), np.float32)
            for read in others:
                _add_in_blocks(total, read())
            self._name, self._sum = name, total
        return self._sum


def _add_in_blocks(total: np.ndarray, x: jax.Array) -> None:
    # a function of its own, so that x is freed before the next array is read; in blocks, because a cast of the whole
    # array to float32 would double its memory
    sums, values = total.reshape(-1), np.asarray(x).reshape(-1)
    for start in range(0, sums.size, BLOCK_ELEMENTS):
        sums[start : start + BLOCK_ELEMENTS] += values[start : start + BLOCK_ELEMENTS].astype(np.float32)


def _mean_leaf(sums: _SummedLeaves, place: _Location, dtype: Any) -> np.ndarray:
    total = sums.sum_of(place.name)
    total = total if place.layer_index is None else total[place.layer_index]
    mean = np.empty(total.shape, dtype)
    sums_flat, mean_flat = total.reshape(-1), mean.reshape(-1)
    for start in range(0, mean_flat.size, BLOCK_ELEMENTS):
        block = sums_flat[start : start + BLOCK_ELEMENTS] / np.float32(len(sums.steps))
        mean_flat[start : start + BLOCK_ELEMENTS] = block.astype(dtype)
    return mean
