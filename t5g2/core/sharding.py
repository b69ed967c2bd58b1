"""Devices as a mesh, and which axis of which array is cut over which axis of the mesh.

Models name axes by what they mean ("embed", "heads", "rows"); RULES alone says what that is on a mesh:

    data    rows of the batch; every device along it holds all weights
    fsdp    rows of the batch and one axis of every weight; a layer's weights are gathered when it runs
    tensor  heads, MLP width and vocabulary, of weights and activations

A mesh of one device is a mesh of ones: there is no other path for it. Axes are Auto: XLA chooses the collectives.
"""

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5g2.core.errors import UserError, unknown

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

_NUMBERS = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

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


def start(distributed: Literal["auto", "on", "off"] = "auto") -> None:
    """Joins the processes of a run on several hosts into one; call it before anything asks for devices.

    JAX finds the coordinator and the process's number by itself on Cloud TPU, Slurm, Open MPI and Kubernetes; elsewhere
    set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
      distributed: "auto" joins where the environment tells of several processes, "on" always, "off" never.

    Raises:
      UserError: "on", and nothing says who the other processes are.
    """
    if distributed not in ("auto", "on", "off"):
        raise unknown("value of distributed", distributed, ("auto", "on", "off"))
    if distributed == "off" or jax.distributed.is_initialized():
        return
    if distributed == "auto" and not _told_of_others(os.environ):
        return
    try:
        # the address is read by JAX itself
        processes, process = (int(os.environ[k]) if k in os.environ else None for k in _NUMBERS)
        jax.distributed.initialize(num_processes=processes, process_id=process)
    except ValueError as error:
        raise UserError(
            f"this process cannot join the others: {error} Cloud TPU, Slurm, Open MPI and Kubernetes say by themselves "
            f"who they are; elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or use "
            f"--distributed=off"
        ) from None


def cache_compilations() -> None:
    """Keeps compiled programs between processes, in ~/.cache/t5g2/jax unless JAX_COMPILATION_CACHE_DIR says where."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "t5g2" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _told_of_others(environ: Mapping[str, str]) -> bool:
    """Whether the environment says that this process is one of several, or might be (a Cloud TPU host)."""
    if "JAX_COORDINATOR_ADDRESS" in environ or int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    # SLURM_STEP_NUM_TASKS counts what one srun started; without srun there is no step and this process is alone
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return True
    if "," in environ.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    # a host of a Cloud TPU may be one of a pod; joining works on a single one too
    chips = any(Path("/dev").glob(pattern) for pattern in ("accel[0-9]*", "vfio/[0-9]*"))
    wanted = "tpu" in environ.get("JAX_PLATFORMS", "tpu").split(",")
    return wanted and chips and importlib.util.find_spec("libtpu") is not None


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
