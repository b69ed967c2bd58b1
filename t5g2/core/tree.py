"""The leaves of a model by logical name and layer number, independent of the storage of its layers.

A stack of layers is a module with two lists. `slots` holds the P blocks of a pattern, each leaf with a leading axis of
R repeats, so that whole patterns can be scanned; `tail` holds the remaining layers, as plain blocks. Slot p of repeat r
is layer r * P + p; block t of the tail is layer R * P + t. With 5 layers and a pattern of 2 (P = 2, R = 2):

    storage                shape        leaves (path, layer)                      name as stored
    layers.slots.0.mlp.up  [2, D, F]    ("layers.mlp.up", 0), (…, 2)              layers.mlp.up.0-2by2
    layers.slots.1.mlp.up  [2, D, F]    ("layers.mlp.up", 1), (…, 3)              layers.mlp.up.1-3by2
    layers.tail.0.mlp.up   [D, F]       ("layers.mlp.up", 4)                      layers.mlp.up.4
    final_norm.scale       [D]          ("final_norm.scale", None)                final_norm.scale

Only this file and the models' own scan know the storage; names, rules, checkpoints and reports use (path, layer).
"""

import fnmatch
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

LeafKey = tuple[str, int | None]
Shape = tuple[int, ...]
Tree = TypeVar("Tree")


@dataclass(frozen=True, eq=False)
class Leaf:
    """One parameter of one layer; layer None = a parameter outside of layers.

    Attributes:
      shape, dtype: of this layer alone.
      axes: logical axis of each dimension, None = none.
      init: (key, shape, dtype) -> a new array for one layer, from the parameter's declaration; None = unknown.
      read: () -> the array of this layer, sliced when called; of an abstract tree, its jax.ShapeDtypeStruct.
    """

    path: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]
    read: Callable[[], Any] = field(repr=False)
    init: Callable[..., Any] | None = field(default=None, repr=False)

    @property
    def key(self) -> LeafKey:
        """The pair (path, layer)."""
        return self.path, self.layer

    def new(self, seed: int) -> jax.Array:
        """Returns a new array by the leaf's own initialiser, from a key that depends on the seed and on its name."""
        assert self.init is not None
        # the name, not the order, decides the key, so that adding or removing a leaf changes no other
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name(self.key).encode()))
        return self.init(key, self.shape, self.dtype)


def name(key: LeafKey) -> str:
    """Returns (path, layer) as one string.

    >>> name(("layers.attention.q", 7)), name(("final_norm.scale", None))
    ('layers.attention.q.7', 'final_norm.scale')
    """
    path, layer = key
    return path if layer is None else f"{path}.{layer}"


def leaves(tree: Any) -> dict[LeafKey, Leaf]:
    """Returns {(path, layer): Leaf} of a module, concrete or abstract, sorted by path and layer."""
    leaves = []
    for stored in _walk(tree):
        value, axes = stored.value, stored.axes
        if not stored.repeats:
            read = lambda value=value: value  # noqa: E731
            leaves.append(Leaf(stored.path, stored.layer, value.shape, value.dtype, axes, read, stored.init))
            continue
        if value.shape[0] != stored.repeats:
            raise ValueError(f"{stored.name} has shape {value.shape}, but {stored.repeats} layers are stacked in it")
        for r, layer in enumerate(stored.layers):
            read = lambda value=value, r=r: _slice(value, r)  # noqa: E731
            leaves.append(Leaf(stored.path, layer, value.shape[1:], value.dtype, axes, read, stored.init))
    return {leaf.key: leaf for leaf in sorted(leaves, key=lambda leaf: (leaf.path, leaf.layer or 0))}


def build(abstract: Tree, read: Callable[[LeafKey], Any], *, shardings: Any = None) -> Tree:
    """Returns `abstract` with every leaf filled by `read((path, layer))`: the inverse of `leaves`.

    One stored leaf is read, stacked and placed at a time, so the host never holds more than the largest of them.

    Args:
      abstract: a module as returned by jax.eval_shape; a concrete one serves as well.
      read: returns an array of exactly the leaf's shape and dtype.
      shardings: of the leaves, a tree like `abstract`; None = the default device.

    Raises:
      ValueError: a leaf that was read has another shape or dtype; nothing is cast silently.
    """
    placements = [None] * len(jax.tree.leaves(abstract)) if shardings is None else jax.tree.leaves(shardings)
    filled = []
    for stored, placement in zip(_walk(abstract), placements, strict=True):
        shape = stored.value.shape[1:] if stored.repeats else stored.value.shape
        layers = stored.layers if stored.repeats else [stored.layer]
        keys = [(stored.path, layer) for layer in layers]
        parts = [_checked(read(key), key, shape, stored.value.dtype) for key in keys]
        if stored.repeats:
            # NumPy arrays are stacked on the host: on a device they would exist twice
            on_host = all(isinstance(part, np.ndarray) for part in parts)
            whole = np.stack(parts) if on_host else jnp.stack(parts)
        else:
            whole = parts[0]
        if placement is None:
            filled.append(jax.device_put(whole))  # where jnp.asarray would compile a program for each shape
        else:  # each process places the shards of its own devices
            filled.append(jax.make_array_from_callback(whole.shape, placement, whole.__getitem__))
    return jax.tree.unflatten(jax.tree.structure(abstract), filled)


def named(tree: Any) -> dict[str, Any]:
    """Returns every leaf of any tree (a module, an optimizer's state) as it is stored, by a unique readable name.

    A stack is one entry, named by its layers: "layers.mlp.up.0-2by2" holds layers 0 and 2.
    """
    walked = _walk(tree)
    by_name = {stored.name: stored.value for stored in walked}
    assert len(by_name) == len(walked), [n for n, count in Counter(s.name for s in walked).items() if count > 1]
    return by_name


def refill(tree: Tree, values: Mapping[str, Any]) -> Tree:
    """Returns `tree` with every leaf replaced by the value of its name: the inverse of `named`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [values[name] for name in named(tree)])


def paths(tree: Tree) -> Tree:
    """Returns a tree of the same structure with every leaf replaced by its path, without the layer."""
    return jax.tree.unflatten(jax.tree.structure(tree), [stored.path for stored in _walk(tree)])


def axes(tree: Any) -> list[tuple[str | None, ...]]:
    """Returns the logical axes of every leaf, in the order of jax.tree.leaves; a stack of layers has None in front."""
    return [(None,) * bool(stored.repeats) + stored.axes for stored in _walk(tree)]


def matches(pattern: str, path: str) -> bool:
    """Returns True if the path matches the pattern: * is any characters, dots too; ? is one; [ab] is a or b.

    >>> matches("*.scale", "layers.pre_mlp_norm.scale"), matches("encoder.*", "decoder.final_norm.scale")
    (True, False)
    """
    return fnmatch.fnmatchcase(path, pattern)


def unmatched(patterns: Iterable[str], paths: Iterable[str]) -> list[str]:
    """Returns the patterns that match none of the paths: a misspelt one would otherwise do nothing, silently."""
    known = set(paths)
    return [pattern for pattern in patterns if not any(matches(pattern, path) for path in known)]


def difference(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> str:
    """Returns the differences of two mappings by name, one line per entry, sorted; empty if they are equal.

    >>> print(difference({"a": 1, "b": 2, "c": 3}, {"b": 5, "c": 3, "d": 4}))
    missing  a: 1
    surplus  d: 4
    changed  b: 2 -> 5
    """
    missing = [f"missing  {key}: {expected[key]}" for key in sorted(expected.keys() - actual.keys())]
    surplus = [f"surplus  {key}: {actual[key]}" for key in sorted(actual.keys() - expected.keys())]
    both = sorted(expected.keys() & actual.keys())
    changed = [f"changed  {key}: {expected[key]} -> {actual[key]}" for key in both if expected[key] != actual[key]]
    return "\n".join(missing + surplus + changed)


@dataclass(frozen=True, eq=False)
class _StoredLeaf:
    """A leaf as it is stored.

    Attributes:
      layer: its layer, or the first of them; None = outside of layers.
      repeats: number of layers that are stacked in it; 0 = it is not stacked.
      step: distance between layers that are neighbours in the stack: 2 if every other layer is in it.
    """

    path: str
    value: Any
    axes: tuple[str | None, ...]
    init: Callable[..., Any] | None = None
    layer: int | None = None
    repeats: int = 0
    step: int = 1

    @property
    def layers(self) -> list[int]:
        assert self.layer is not None
        return [self.layer + r * self.step for r in range(self.repeats)]

    @property
    def name(self) -> str:
        if self.repeats <= 1:
            return name((self.path, self.layer))
        return f"{self.path}.{self.layer}-{self.layers[-1]}" + (f"by{self.step}" if self.step > 1 else "")


def _walk(tree: Any) -> list[_StoredLeaf]:
    """Returns the stored leaves, in the order of jax.tree.leaves."""
    raw = []
    # variables as leaves, because their metadata (axes, init) is lost where jax flattens them
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]:
        parts = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        # a variable holds one array, or none where optax masks it out
        raw += [(parts, value, _axes(node, value), _init(node)) for value in jax.tree.leaves(node)]
    stacks = _stacks([(parts, value) for parts, value, _, _ in raw])
    walked = []
    for parts, value, axes, init in raw:
        # the outermost "slots" or "tail" that belongs to a stack: a module may have fields of these names
        at = next((i for i, part in enumerate(parts) if parts[:i] in stacks and part in ("slots", "tail")), None)
        if at is None:
            walked.append(_StoredLeaf(".".join(parts), value, axes, init))
            continue
        pattern, repeats = stacks[parts[:at]]
        path, index = ".".join(parts[:at] + parts[at + 2 :]), int(parts[at + 1])
        if parts[at] == "slots":
            walked.append(_StoredLeaf(path, value, axes, init, layer=index, repeats=repeats, step=pattern))
        else:
            walked.append(_StoredLeaf(path, value, axes, init, layer=pattern * repeats + index))
    return walked


def _stacks(raw: Sequence[tuple[tuple[str, ...], Any]]) -> dict[tuple[str, ...], tuple[int, int]]:
    """Returns {path of a stack: (P, R)}; P = R = 0 if all of its layers are in the tail."""
    slots: dict[tuple[str, ...], set[int]] = {}
    repeats: dict[tuple[str, ...], int] = {}
    for parts, value in raw:
        for i, part in enumerate(parts[:-1]):
            if part in ("slots", "tail") and parts[i + 1].isdigit():
                indices = slots.setdefault(parts[:i], set())
                if part == "slots":
                    indices.add(int(parts[i + 1]))
                    # the largest, at least 1: an optimizer may keep placeholders of shape [1] or [] for some leaves
                    repeats[parts[:i]] = max(repeats.get(parts[:i], 1), *(value.shape[:1] or (1,)))
    return {path: (len(indices), repeats.get(path, 0)) for path, indices in slots.items()}


def _axes(node: Any, value: Any) -> tuple[str | None, ...]:
    """Returns the logical axes of one layer, from the parameter's declaration, which stacking does not change."""
    axes = node.get_metadata().get("out_sharding") if isinstance(node, nnx.Variable) else None
    return (None,) * len(getattr(value, "shape", ())) if axes is None else tuple(axes)


def _init(node: Any) -> Callable[..., Any] | None:
    return node.get_metadata().get("init") if isinstance(node, nnx.Variable) else None


def _slice(value: Any, index: int) -> Any:
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape[1:], value.dtype)
    return value[index]


def _checked(value: Any, key: LeafKey, shape: tuple[int, ...], dtype: Any) -> Any:
    if value.shape != shape or value.dtype != dtype:
        raise ValueError(f"{name(key)} is {value.dtype}{list(value.shape)}; it must be {dtype}{list(shape)}")
    return value
