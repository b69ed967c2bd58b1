"""Tensors of other formats: a table of names and axes per format (hf_names.py, flax_names.py) in both directions.

A row matches one tensor with one or several leaves of our models, and describes the tensor's axes by a pattern:
"D N H -> (N H) D" is a linear layer [out, in] whose outputs are heads. Values are never computed: axes are moved,
split, merged, stacked and sliced, so every row is exact in every dtype, both ways.

    tensor                                  leaf                     pattern
    model.layers.{i}.mlp.up_proj.weight     layers.mlp.up, layer i   "I O -> O I"
    layer_{i}/attn/kv_einsum/w              layers.attention.k, .v   "D K H -> * K D H"     (* = which leaf)

Sources: transformers 5.23.0 (modeling_*.py, conversion_mapping.py) and the files of its hub; google-deepmind/gemma
@ 7691fd4 (gm/nn, gm/ckpts). A table holds the rows of every variant (text only or with images, tied or not, with or
without norms of queries and keys); a model uses those whose leaves it has.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from t5g2.core.errors import UserError
from t5g2.core.tree import Leaf, LeafKey, Shape, name


@dataclass(frozen=True)
class AxisPattern:
    """Axes of a tensor, from those of its leaves: "axes of a leaf -> axes of the tensor"; "" = the same axes.

    A name is an axis, (a b) two merged into one, 1 an axis of size 1, and * the axis over the leaves, outermost in
    whatever it is merged into.

    Attributes:
      rows: {V: V'}: a table of V rows is stored with V' rows; the surplus ones are never looked up, and are cut.
    """

    pattern: str
    rows: Mapping[int, int] = field(default_factory=dict)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Returns the shape of the tensor, from those of its leaves, which are all the same."""
        if len(set(shapes)) != 1:
            raise ValueError(f"leaves of shapes {list(shapes)} cannot share a tensor")
        if not self.pattern:
            return (self.rows.get(shapes[0][0], shapes[0][0]), *shapes[0][1:]) if self.rows else shapes[0]
        sizes = self._axis_sizes(shapes)
        return tuple(prod(sizes[axis] for axis in group) for group in self._tensor_groups)

    def to_tensor(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the tensor of these leaves; surplus rows are not added."""
        if not self.pattern:
            return leaves[0]
        is_stacked = "*" in self.pattern
        array = np.stack(leaves) if is_stacked else leaves[0]
        axes = ["*", *self._leaf_axes] if is_stacked else self._leaf_axes
        order = [axes.index(axis) for axis in self._tensor_axes]
        return array.transpose(order).reshape(self.shape([leaf.shape for leaf in leaves]))

    def to_leaf(self, tensor: np.ndarray, shapes: Sequence[Shape], leaf_index: int) -> np.ndarray:
        """Returns one of the leaves of a tensor, contiguous and without a reference to the rest of it."""
        if not self.pattern:
            return tensor[: shapes[0][0]] if self.rows else tensor
        sizes = self._axis_sizes(shapes)
        axes = self._tensor_axes
        array = tensor.reshape([sizes[axis] for axis in axes])
        if "*" in axes:  # always the outermost axis
            array, axes = array[leaf_index], axes[1:]
        leaf = array.transpose([axes.index(axis) for axis in self._leaf_axes])
        # one leaf of several is copied: a view would keep the whole tensor in memory
        return np.array(leaf, order="C", copy=True if "*" in self._tensor_axes else None)

    @property
    def _leaf_axes(self) -> list[str]:
        return self.pattern.split("->")[0].split()

    @property
    def _tensor_groups(self) -> list[list[str]]:
        right = re.findall(r"\(([^)]*)\)|(\S+)", self.pattern.split("->")[1])
        return [merged.split() if merged else [alone] if alone != "1" else [] for merged, alone in right]

    @property
    def _tensor_axes(self) -> list[str]:
        return [axis for group in self._tensor_groups for axis in group]

    def _axis_sizes(self, shapes: Sequence[Shape]) -> dict[str, int]:
        return dict(zip(self._leaf_axes, shapes[0], strict=True)) | {"*": len(shapes)}


SAME = AxisPattern("")
LINEAR = AxisPattern("I O -> O I")
TO_HEADS = AxisPattern("D N H -> (N H) D")
FROM_HEADS = AxisPattern("N H D -> D (N H)")
HEADS_BIAS = AxisPattern("N H -> (N H)")
CONV = AxisPattern("h w c D -> D c h w")
PACKED = AxisPattern("D N H -> (* N H) D")
PACKED_BIAS = AxisPattern("N H -> (* N H)")
PROBE = AxisPattern("D -> 1 1 D")
SCALAR = AxisPattern(" -> 1")

# google-deepmind/gemma: einsum weights have an axis of heads; keys and values, or all three, are stacked
EINSUM = AxisPattern("D N H -> N D H")
EINSUMS = AxisPattern("D N H -> * N D H")
GATES = AxisPattern("D F -> * D F")
GATES_TRANSPOSED = AxisPattern("D F -> * F D")
BATCHED = AxisPattern("P D -> 1 P D")
# the tables of Gemma 2 and T5Gemma were padded to a multiple of 256 rows for the hardware
PADDED = AxisPattern("", rows={256_000: 256_128})

LeafPaths = str | tuple[str, ...]
FormatRow = tuple[str, LeafPaths, AxisPattern]  # tensor, leaf or leaves, axes


# buffers that versions of transformers have saved; they follow from the config
BUFFERS = r"\.rotary_emb\w*\.(\w+_)?inv_freq$|\.embeddings\.position_ids$|\.embed_scale$"


@dataclass(frozen=True)
class TensorFormat:
    """A format: its table, and other tensors and names that its files may hold.

    Attributes:
      title: name of the format in messages and provenance.
      rows: (tensor, leaf or leaves, axes); {i} is the number of the layer. If two rows have the same leaves, either
        tensor may be stored.
      copies: {a tensor that may be stored again: the tensor that it repeats}, for tied weights.
      aliases: (regular expression, replacement), applied in turn to a name before it is looked up.
      unused: regular expression of the table's names for tensors that the model does not read, such as buffers.
    """

    title: str
    rows: tuple[FormatRow, ...]
    copies: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[tuple[str, str], ...] = ()
    unused: str = BUFFERS

    def canonical_name(self, name: str) -> str:
        """Returns the table's name for a tensor that is stored under that name or an alias."""
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name


@dataclass(frozen=True)
class TensorMatch:
    """One tensor and the leaves that it holds.

    Attributes:
      name: canonical name of the tensor.
      keys, shapes: those of its leaves, in the order of the * axis.
    """

    name: str
    keys: tuple[LeafKey, ...]
    shapes: tuple[Shape, ...]
    axes: AxisPattern

    @property
    def shape(self) -> Shape:
        """Shape of the tensor."""
        return self.axes.shape(self.shapes)


def match_tensors(
    tensor_format: TensorFormat, leaves: Mapping[LeafKey, Leaf], tensor_shapes: Mapping[str, Shape] | None = None
) -> list[TensorMatch]:
    """Matches tensors with leaves, every leaf once, layer by layer in the order of the table.

    Args:
      tensor_format: the format of the tensors.
      leaves: the leaves of a model, which may be abstract.
      tensor_shapes: shapes of the stored tensors, by the table's names; they decide between two rows for the same
        leaves. None = the first row is taken.

    Raises:
      UserError: the shape of a tensor fits two rows, so its axes are ambiguous; the format has no row for a leaf,
        because the model is of another kind.
    """
    candidates = list(_candidates(tensor_format.rows, leaves))
    fitting = [match for match in candidates if tensor_shapes and tensor_shapes.get(match.name) == match.shape]
    # square sizes can fit a pattern and its transpose alike; a guess would silently transpose the weights
    for match in fitting:
        other = next((m for m in fitting if m.name == match.name and m.axes.pattern != match.axes.pattern), None)
        if other is not None:
            raise UserError(
                f"{match.name} has shape {list(match.shape)}, which can be read as {match.axes.pattern!r} and as "
                f"{other.axes.pattern!r} alike, so its axes are ambiguous; convert it from another format"
            )
    # matches of name and shape come first, then those of the name alone, whose shape is reported by check_tensors
    stored = [match for match in candidates if tensor_shapes and match.name in tensor_shapes]
    chosen: dict[LeafKey, TensorMatch] = {}
    for match in [*fitting, *stored, *candidates]:
        if not any(key in chosen for key in match.keys):
            chosen |= dict.fromkeys(match.keys, match)
    unmatched = sorted(name(key) for key in leaves.keys() - chosen.keys())
    if unmatched:
        raise UserError(
            f"{tensor_format.title} has no tensor for {len(unmatched)} weights of this architecture: "
            f"{', '.join(unmatched[:8])}{', …' if len(unmatched) > 8 else ''}; give the architecture of the folder's "
            f"weights"
        )
    return [match for match in candidates if chosen[match.keys[0]] is match]


def _candidates(rows: Sequence[FormatRow], leaves: Mapping[LeafKey, Leaf]) -> Iterable[TensorMatch]:
    """Yields a match for each row of each layer whose leaves exist; the rows of one layer stand together."""
    layers: dict[str, list[int | None]] = {}
    for path, layer in leaves:
        layers.setdefault(path, []).append(layer)
    matches = []
    for order, (tensor_name, leaf_paths, axes) in enumerate(rows):
        paths = (leaf_paths,) if isinstance(leaf_paths, str) else leaf_paths
        for layer in layers.get(paths[0], ()):
            keys = tuple((path, layer) for path in paths)
            shapes = tuple(leaves[key].shape for key in keys if key in leaves)
            if len(shapes) == len(keys) and len(set(shapes)) == 1:
                place = (-1 if layer is None else layer, order)
                matches.append((place, TensorMatch(tensor_name.replace("{i}", str(layer)), keys, shapes, axes)))
    return (match for _, match in sorted(matches, key=lambda entry: entry[0]))


def with_prefix(tensor_prefix: str, leaf_prefix: str, rows: Iterable[FormatRow]) -> tuple[FormatRow, ...]:
    """Returns the rows with a prefix before each name of a tensor and of a leaf."""
    prefixed: list[FormatRow] = []
    for tensor_name, leaf_paths, axes in rows:
        if isinstance(leaf_paths, str):
            paths: LeafPaths = leaf_prefix + leaf_paths
        else:
            paths = tuple(leaf_prefix + path for path in leaf_paths)
        prefixed.append((tensor_prefix + tensor_name, paths, axes))
    return tuple(prefixed)
