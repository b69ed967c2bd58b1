"""The device mesh, and the rules that map logical axes of arrays to its axes.

Models name axes by their meaning ("embed", "heads", "rows"); RULES alone maps them to mesh axes:

    data    rows of the batch; every device along it holds all weights
    fsdp    rows of the batch and one axis of every weight; a layer's weights are gathered when it runs
    tensor  heads, MLP width and vocabulary, of weights and activations

One device is a mesh of size 1 along every axis, without a code path of its own. Axes are Auto: XLA chooses the
collectives.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5g2.core.bounds import Bounds, checked
from t5g2.core.device import platform
from t5g2.core.errors import UserError, unknown
from t5g2.core.tree import Tree

AXES = ("data", "fsdp", "tensor")

# logical axis -> axes of the mesh, outermost first
RULES: Mapping[str, tuple[str, ...]] = {
    # parameters
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_size": (),
    "mlp": ("tensor",),
    # activations
    "rows": ("data", "fsdp"),
    "length": (),
    "embed_act": (),
    "heads_act": ("tensor",),
    "kv_heads_act": ("tensor",),
    "mlp_act": ("tensor",),
    "vocab_act": ("tensor",),
}

AxisSize = Annotated[int, Bounds(least=1, most=2**20, also=-1, hint="-1 = all devices that are left")]


@dataclass(frozen=True)
@checked
class MeshShape:
    """Number of devices along each axis; -1, for one axis only, = all devices that the other axes leave."""

    data: AxisSize = -1
    fsdp: AxisSize = 1
    tensor: AxisSize = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if sizes.count(-1) > 1:
            raise UserError(
                f"the mesh {self} has more than one -1; -1 = all devices that are left, so only one axis can have it"
            )

    def __str__(self) -> str:
        return f"data={self.data} x fsdp={self.fsdp} x tensor={self.tensor}"

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """Returns the size of each axis on this number of devices.

        Raises:
          UserError: the axes do not multiply to the number of devices.
        """
        shape = (self.data, self.fsdp, self.tensor)
        fixed = math.prod(size for size in shape if size != -1)
        data, fsdp, tensor = (devices // fixed if size == -1 else size for size in shape)
        if data * fsdp * tensor != devices or 0 in (data, fsdp, tensor):
            needed = f"a multiple of {fixed}" if -1 in shape else str(fixed)
            raise UserError(
                f"the mesh {self} needs {needed} devices, and there are {devices}; its axes must multiply to the "
                f"number of devices (-1 = all that are left)"
            )
        return data, fsdp, tensor


def shape_of(text: str) -> MeshShape:
    """Returns the mesh shape that a text spells: "data=2,fsdp=4"; an axis that is left out has size 1.

    Raises:
      UserError: it is not made of axis=size, or has an unknown axis, one twice, or a size out of its range.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if not size.removeprefix("-").isdigit():
            raise UserError(f"mesh {text!r}: {part!r} is not axis=size; give for example data=2,fsdp=4")
        if name not in AXES:
            raise unknown("mesh axis", name, AXES)
        if name in sizes:
            raise UserError(f"mesh {text!r} has {name} twice; give each axis once")
        sizes[name] = int(size)
    return MeshShape(**{"data": 1} | sizes)


def make(shape: MeshShape, devices: Any = None) -> Mesh:
    """Returns the mesh of this shape over `devices` (None = all); neighbours in the mesh are near in the network.

    Raises:
      UserError: the shape does not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = shape.sizes(len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of every array of a batch: its first axis, rows, is split over data and fsdp."""
    return NamedSharding(mesh, P(RULES["rows"]))


def row_groups(mesh: Mesh) -> int:
    """Returns the number of groups of devices that rows are split over."""
    return math.prod(mesh.shape[name] for name in RULES["rows"])


def shardings(tree: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """Returns a tree like `tree` with every leaf's NamedSharding, from the logical axes of its declaration.

    A logical axis whose size the mesh axes do not divide is not split. A leaf without logical axes is replicated.
    """
    result = []
    for leaf in jax.tree.leaves(tree, is_leaf=_is_variable):
        value = leaf.get_value() if _is_variable(leaf) else leaf
        result.append(NamedSharding(mesh, spec(_axes(leaf, value), value.shape, mesh.shape)))
    return jax.tree.unflatten(jax.tree.structure(tree), result)


def shardings_like(tree: Tree, params: Any, mesh: Mesh) -> Tree:
    """Returns the sharding of every leaf of an optimizer's state: its parameter's, or replicated if it has none.

    A leaf belongs to a parameter if its path ends with the parameter's path and the shapes are equal. Adam's moments
    do; a count or a factored second moment does not. So moments are sharded like weights (ZeRO).
    """
    weights = {
        _key(path): (value.shape, sharding)
        for (path, value), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings(params, mesh)), strict=True
        )
    }
    result = []
    for path, value in jax.tree_util.tree_leaves_with_path(tree):
        parts = _key(path)
        # the longest suffix first: mu.encoder.layers.q is the moment of encoder.layers.q
        matches = (weights[parts[i:]] for i in range(len(parts)) if parts[i:] in weights)
        shape, sharding = next(matches, (None, None))
        result.append(sharding if sharding is not None and shape == value.shape else replicated(mesh))
    return jax.tree.unflatten(jax.tree.structure(tree), result)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns x sharded by these logical axes if a mesh is set; None and axes that do not divide are not split."""
    assert len(axes) == x.ndim, (axes, x.shape)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh.shape))


def sum_groups(x_RVD: jax.Array) -> jax.Array:
    """Returns the sum over groups of rows of their gradients of a [vocab, embed] table, sharded like the table.

    Args:
      x_RVD: one gradient for each group, sharded as ("rows", "vocab_act", None).
    """
    # summed whole and then cut, for each use of the table: of several such sums XLA for TPU makes one reduce-scatter of
    # the sum of all; written out as reduce-scatters, it takes them apart into an all-reduce of the whole gradient
    x_VD = constrain(jnp.sum(x_RVD, axis=0), "vocab_act", None)
    return constrain(x_VD, "vocab", "embed")


def constrain_weights(tree: Tree) -> Tree:
    """Returns weights, or their gradients, sharded by `shardings(tree, mesh)` if a mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings(tree, mesh))


def lay_out_tables(gradients: Tree) -> Tree:
    """Returns gradients of weights with those of [vocab, embed] tables stored by columns, on several TPUs.

    A table is cut along its columns, and XLA for TPU cuts a sum over devices where it is made only if the axis is not
    that of lanes, as that of the columns is otherwise: with long rows the sum would be whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or platform() != "tpu":
        return gradients
    axes = [_axes(leaf, leaf.get_value()) for leaf in jax.tree.leaves(gradients, is_leaf=_is_variable)]
    leaves, structure = jax.tree.flatten(gradients)
    by_columns = Layout(major_to_minor=(1, 0))
    tables = (
        with_layout_constraint(x, by_columns) if of == ("vocab", "embed") else x
        for x, of in zip(leaves, axes, strict=True)
    )
    return jax.tree.unflatten(structure, tables)


def parts(axis: str, size: int, mesh: Mesh | None = None) -> int:
    """Returns the number of parts that a mesh splits a logical axis of this size into; without any mesh, 1.

    Args:
      mesh: None = the current one.
    """
    shape = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape
    return math.prod(shape[name] for name in _dividing(axis, size, shape))


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mapping[str, int]) -> P:
    """Returns the mesh axes of an array's logical axes; those that do not divide its shape are dropped."""
    # stacked layers have an axis in front that the parameters' declarations lack
    axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
    return P(*(_dividing(axis, size, mesh) or None for axis, size in zip(axes, shape, strict=True)))


def _dividing(axis: str | None, size: int, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes of a logical axis; the last ones are dropped until the others divide its size."""
    if axis is None:
        return ()
    if axis not in RULES:
        raise ValueError(f"no rule for the logical axis {axis!r}; known: {', '.join(RULES)}")
    names = tuple(name for name in RULES[axis] if mesh.get(name, 1) > 1)
    while names and size % math.prod(mesh[name] for name in names):
        names = names[:-1]
    return names


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _axes(leaf: Any, value: Any) -> tuple[str | None, ...]:
    axes = leaf.get_metadata().get("out_sharding") if _is_variable(leaf) else None
    return (None,) * len(value.shape) if axes is None else tuple(axes)


def _key(path: tuple) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
