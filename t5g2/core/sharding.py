"""Devices as a mesh, and which axis of which array is cut over which axis of the mesh.

Models name axes by what they mean ("embed", "heads", "rows"); RULES alone says what that is on a mesh:

    data    rows of the batch; every device along it holds all weights
    fsdp    rows of the batch and one axis of every weight; a layer's weights are gathered when it runs
    tensor  heads, MLP width and vocabulary, of weights and activations

A mesh of one device is a mesh of ones: there is no other path for it. Axes are Auto: XLA chooses the collectives.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5g2.core.errors import UserError

AXES = ("data", "fsdp", "tensor")

# logical axis -> axes of the mesh, the first of them outermost
RULES: Mapping[str, tuple[str, ...]] = {
    # of parameters
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_size": (),
    "mlp": ("tensor",),
    # of activations
    "rows": ("data", "fsdp"),
    "length": (),
    "embed_act": (),
    "heads_act": ("tensor",),
    "kv_heads_act": ("tensor",),
    "mlp_act": ("tensor",),
    "vocab_act": ("tensor",),
}


Tree = TypeVar("Tree")


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis; -1 = all that are left over by the other two, allowed once."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        for axis, size in zip(AXES, sizes, strict=True):
            if size < 1 and size != -1:
                raise UserError(f"mesh.{axis} = {size}; it must be at least 1, or -1 for all devices that are left")
        if sizes.count(-1) > 1:
            raise UserError(
                f"the mesh {self} has more than one -1; -1 = all devices that are left, so only one axis can have it"
            )

    def __str__(self) -> str:
        return f"data={self.data} x fsdp={self.fsdp} x tensor={self.tensor}"

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """The size of each axis on so many devices.

        Raises:
          UserError: the axes do not multiply to the number of devices.
        """
        given = (self.data, self.fsdp, self.tensor)
        fixed = math.prod(size for size in given if size != -1)
        data, fsdp, tensor = (devices // fixed if size == -1 else size for size in given)
        if data * fsdp * tensor != devices or 0 in (data, fsdp, tensor):
            needed = f"a multiple of {fixed}" if -1 in given else str(fixed)
            raise UserError(
                f"the mesh {self} needs {needed} devices, and there are {devices}; its axes must multiply to the "
                f"number of devices (-1 = all that are left)"
            )
        return data, fsdp, tensor


def make(shape: MeshShape, devices: Any = None) -> Mesh:
    """The mesh of this shape over `devices`, by default all of the run; neighbours in it are near each other.

    Raises:
      UserError: the shape does not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = shape.sizes(len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis, rows, is cut over data and fsdp; every array of a batch has it."""
    return NamedSharding(mesh, P(RULES["rows"]))


def shardings(tree: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """Where every leaf of a model goes, by the logical axes it was declared with; a tree of NamedSharding like `tree`.

    A logical axis whose size the mesh does not divide is left whole. A leaf without logical axes is replicated.
    """
    placed = []
    for leaf in jax.tree.leaves(tree, is_leaf=_is_variable):
        value = leaf.get_value() if _is_variable(leaf) else leaf
        placed.append(NamedSharding(mesh, _spec(_axes(leaf, value), value.shape, mesh.shape)))
    return jax.tree.unflatten(jax.tree.structure(tree), placed)


def shardings_like(tree: Tree, params: Any, mesh: Mesh) -> Tree:
    """Where every leaf of an optimizer's state goes: with the parameter that it belongs to; everything else everywhere.

    A leaf belongs to the parameter whose path ends its own path, if it also has its shape: Adam's moments do, a count
    or a factored second moment do not. So moments are cut wherever weights are (ZeRO).
    """
    weights = {
        _key(path): (value.shape, place)
        for (path, value), place in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings(params, mesh)), strict=True
        )
    }
    placed = []
    for path, value in jax.tree_util.tree_leaves_with_path(tree):
        parts = _key(path)
        found = (weights[parts[i:]] for i in range(len(parts)) if parts[i:] in weights)
        shape, place = next(found, (None, None))
        placed.append(place if place is not None and shape == value.shape else replicated(mesh))
    return jax.tree.unflatten(jax.tree.structure(tree), placed)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, cut as these logical axes say if a mesh is set; None = whole. An axis that does not divide is left whole."""
    assert len(axes) == x.ndim, (axes, x.shape)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(axes, x.shape, mesh.shape))


def constrain_weights(tree: Tree) -> Tree:
    """Weights, or gradients of all of them, cut as `shardings` says if a mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings(tree, mesh))


def parts(axis: str, size: int) -> int:
    """Into how many parts the mesh that is set cuts a logical axis of this size; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh().shape
    return math.prod(mesh[name] for name in _dividing(axis, size, mesh))


def _spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mapping[str, int]) -> P:
    # a stack of layers has an axis in front that its parameters' names do not know
    axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
    return P(*(_dividing(axis, size, mesh) or None for axis, size in zip(axes, shape, strict=True)))


def _dividing(axis: str | None, size: int, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes of a logical axis; the later ones left out as long as they do not divide its size."""
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
