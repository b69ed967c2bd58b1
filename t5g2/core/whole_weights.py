"""The weights that a mesh leaves whole, as its sizes divide none of their axes, and a mesh that cuts them."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from t5g2.core import sharding, tree
from t5g2.core.logs import log
from t5g2.core.sharding import AXES, RULES
from t5g2.core.tree import Leaf


def warn(params: Any, mesh: Mesh) -> None:
    """Logs a warning for each axis of a mesh that leaves weights of a model, concrete or abstract, whole."""
    for warning in WholeWeights(params, mesh.shape, zero1=False).warnings():
        log.warning("%s", warning)


class WholeWeights:
    """The weights that an axis of a mesh should cut and does not, as its size divides none of their axes.

    Those that tensor should cut are tables, heads and MLPs; key/value heads that it does not divide are whole by
    design. What data should cut is the state that ZeRO-1 keeps of weights.

    Args:
      params: a model, concrete or abstract.
      sizes: number of devices along each axis of the mesh.
      zero1: True = the optimizer's state is cut over data.
    """

    def __init__(self, params: Any, sizes: Mapping[str, int], *, zero1: bool):
        self._leaves = list(tree.leaves(params).values())
        # a mesh of a caller's own may lack axes
        self._sizes, self._zero1 = dict.fromkeys(AXES, 1) | dict(sizes), zero1

    @property
    def shares(self) -> dict[str, float]:
        """For an axis that leaves weights whole, their share of the weights that it should cut, above 0 to 1."""
        shares = {}
        for axis in AXES:
            whole = sum(math.prod(leaf.shape) for leaf in self._whole(axis, self._sizes))
            if whole:
                shares[axis] = whole / sum(math.prod(leaf.shape) for leaf in self._to_cut(axis, self._sizes))
        return shares

    def warnings(self) -> list[str]:
        """Returns a line for each axis that leaves weights whole: which, how many, and a size that does not."""
        return [self._warning(axis, share) for axis, share in self.shares.items()]

    def _warning(self, axis: str, share: float) -> str:
        size = self._sizes[axis]
        shapes = {leaf.path: leaf.shape for leaf in self._whole(axis, self._sizes)}
        largest = max(shapes, key=lambda path: math.prod(shapes[path]))
        of = f"{largest} {list(shapes[largest])}" + (f" and {len(shapes) - 1} more" if len(shapes) > 1 else "")
        noun = "the optimizer's state of the weights" if axis == "data" else "the weights"
        start = f"mesh.{axis} = {size} divides no axis of {of}: {share:.1%} of {noun} that it should cut"
        return f"{start} are whole on every device along it; {self._remedy(axis)}"

    def _remedy(self, axis: str) -> str:
        """Returns the largest smaller size with which the axis cuts all that it should, with what is left in data."""
        size = self._sizes[axis]
        if axis == "data":
            return "use another number of devices, or mesh.fsdp or mesh.tensor for some of them"
        for smaller in reversed(sharding.divisors(size)[:-1]):
            data = self._sizes["data"] * size // smaller
            if not any(self._whole(axis, self._sizes | {axis: smaller, "data": data})):
                other = ", or use another number of devices" if smaller == 1 else ""
                return f"set mesh.{axis} to {smaller} and mesh.data to {data}{other}"
        raise AssertionError("one device along an axis leaves nothing whole")

    def _whole(self, axis: str, sizes: Mapping[str, int]) -> Iterator[Leaf]:
        for leaf in self._to_cut(axis, sizes):
            over = sharding.names_of(sharding.weight_spec(leaf.axes, leaf.shape, sizes, zero1=self._zero1))
            if not any(axis in names for names in over):
                yield leaf

    def _to_cut(self, axis: str, sizes: Mapping[str, int]) -> Iterator[Leaf]:
        if sizes[axis] == 1 or (axis == "data" and not self._zero1):
            return
        logical = {name for name, axes in RULES.items() if axis in axes or axis == "data"} - {"kv_heads"}
        yield from (leaf for leaf in self._leaves if logical & set(leaf.axes))
