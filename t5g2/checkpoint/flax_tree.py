"""Official Gemma and T5Gemma weights in Flax's layout, as on Kaggle: Orbax checkpoints, read leaf by leaf.

A checkpoint is a folder with `_METADATA`, JSON that lists every leaf by its keys. The bytes of a leaf are stored under
its keys joined with '.', as a zarr array, either in a folder of that name or in one OCDBT database for all of them
(orbax.readthedocs.io, "Checkpoint format"). Orbax restores whole trees; TensorStore, on which it is built, also
opens one leaf, or a part of one, and so is used here directly.

Released trees come in four forms (google-deepmind/gemma, gm/ckpts/_checkpoint.py: _CheckpointType); all are read under
the names of the first, which are those of `model.init()` of the official Flax modules:

    NESTED   layer_3/attn/q_einsum/w                                          encoder/layer_3/… of an encoder-decoder
    FLAT     'transformer/layer_3/attn/q_einsum' -> w                         SigLiPFromPatches_0/… is vision_encoder/…
    STACKED  'transformer/stacked_layers/attention_type_1/attn/q_einsum' -> w [slices, …]; layer = slice * types + type
    trainer  params/…, beside opt_state, step and collections, which are not read
"""

import re
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from t5g2.checkpoint.safetensors_io import MAX_JSON_BYTES
from t5g2.checkpoint.tensor import Tensor
from t5g2.core import files
from t5g2.core.errors import UserError

METADATA = "_METADATA"
# files that mark a folder as a checkpoint, even if its metadata is lost
MARKS = (METADATA, "manifest.ocdbt", "_sharding", "array_metadatas")
DEPTH = 3  # a download's folder / a step / an item
# names that trainers give to the item with the weights; of several items of a step, the first of these is read
ITEMS = ("params", "default", "state")
STACKED = re.compile(r"(?P<prefix>|.*/)stacked_layers/attention_type_(?P<type>\d+)/(?P<rest>.+)")
# errors of TensorStore on damaged files
DAMAGE = (ValueError, OSError, IndexError, KeyError, TypeError, NotImplementedError)


class _FlaxLeaf(NamedTuple):
    """A stored leaf: its name, joined by '/', and the TensorStore spec of its array."""

    name: str
    spec: dict[str, Any]


def is_flax(directory: str | PathLike) -> bool:
    """True if the folder or one of its subfolders is an Orbax checkpoint, whole or damaged."""
    return next(_roots(Path(directory), DEPTH), None) is not None


def read(directory: str | PathLike) -> dict[str, Tensor]:
    """Returns the weights of a checkpoint by their NESTED names ('layer_0/attn/q_einsum/w'), none of them read yet.

    Each `read` opens only its leaf, or one layer's slice of a stacked leaf (of which TensorStore decodes the chunks
    that overlap the slice; a leaf saved from one device is one chunk).

    Args:
      directory: the checkpoint, or a folder that holds just one, at most three levels down; of several items of a step,
        `params`, `default` or `state` is read.

    Raises:
      UserError: the folder holds no checkpoint, or several; metadata or a leaf is missing or damaged. A leaf whose
        bytes are missing or damaged raises when it is read.
    """
    root = _root(Path(directory).absolute())
    metadata = _metadata(root)
    leaves = [_leaf(root, metadata, keys) for keys in _keys(root, metadata)]
    # leaves are opened concurrently, because a checkpoint has hundreds of them, often on a network disk
    opening = [ts.open(leaf.spec, open=True, read=True) for leaf in leaves]
    stored = {leaf.name: _checked(root, leaf.name, future.result) for leaf, future in zip(leaves, opening, strict=True)}
    # the number of attention types in a stack: from one slice to the next, the layer number grows by it
    types: dict[str, int] = {}
    for name in stored:
        if match := STACKED.fullmatch(name):
            types[match["prefix"]] = max(types.get(match["prefix"], 0), int(match["type"]) + 1)
    tensors: dict[str, Tensor] = {}
    for name, array in stored.items():
        for new, tensor in _layers(root, name, array, types):
            if new in tensors:
                raise _damaged(root, f"two of its leaves are called {new}")
            tensors[new] = tensor
    return tensors


def _layers(root: Path, name: str, array: ts.TensorStore, types: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors that a stored leaf holds: itself, or a slice for each layer."""
    match = STACKED.fullmatch(name)
    if not match:
        yield name, _tensor(root, name, array, lambda: array)
        return
    if not array.shape:
        raise _damaged(root, f"{name} has no axis of layers")
    first, step = int(match["type"]), types[match["prefix"]]
    for slice_ in range(array.shape[0]):
        layer = slice_ * step + first
        part = lambda slice_=slice_: array[slice_]  # noqa: E731
        yield f"{match['prefix']}layer_{layer}/{match['rest']}", _tensor(root, name, array, part, axes=1)


def _tensor(
    root: Path, name: str, array: ts.TensorStore, part: Callable[[], ts.TensorStore], *, axes: int = 0
) -> Tensor:
    """Returns a tensor of `part` of an array, which has the array's shape without the first `axes`."""

    def get() -> np.ndarray:
        return np.asarray(_checked(root, name, lambda: part().read(order="C").result()))

    return Tensor(tuple(array.shape[axes:]), np.dtype(array.dtype.numpy_dtype), get)


def _root(directory: Path) -> Path:
    """Returns the one checkpoint in a folder."""
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist; give a folder with a Flax checkpoint")
    roots = sorted(_roots(directory, DEPTH))
    if not roots:
        raise UserError(
            f"{directory} is not a Flax checkpoint: neither it nor a folder up to {DEPTH} levels down has {METADATA}; "
            f"give the folder that was downloaded and unpacked"
        )
    if len({root.parent for root in roots}) == 1 and len(roots) > 1:
        items = {root.name: root for root in roots}
        roots = next(([items[name]] for name in ITEMS if name in items), roots)
    if len(roots) > 1:
        names = ", ".join(str(root.relative_to(directory)) for root in roots)
        raise UserError(f"{directory} holds several checkpoints: {names}; give the folder of one of them")
    return roots[0]


def _roots(directory: Path, depth: int) -> Iterator[Path]:
    """Yields the checkpoints in a folder, down to `depth` levels, except those that are still being written."""
    if any((directory / mark).exists() for mark in MARKS):
        yield directory
        return
    if depth and directory.is_dir():
        for folder in directory.iterdir():
            if folder.is_dir() and not folder.name.startswith(".") and "orbax-checkpoint-tmp" not in folder.name:
                yield from _roots(folder, depth - 1)


def _metadata(root: Path) -> dict[str, Any]:
    path = root / METADATA
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{METADATA} has over {MAX_JSON_BYTES} bytes")
        metadata = files.parse_json(path.read_bytes())
    except FileNotFoundError:
        raise _damaged(root, f"{METADATA} is missing") from None
    except (ValueError, OSError) as error:
        raise _damaged(root, f"{METADATA} cannot be read: {error}") from None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("tree_metadata"), dict):
        raise _damaged(root, f"{METADATA} holds no tree_metadata")
    return metadata


def _keys(root: Path, metadata: dict[str, Any]) -> list[list[str]]:
    """Returns the keys of every leaf of the weights, as Orbax writes them."""
    leaves = []
    for entry in metadata["tree_metadata"].values():
        try:
            keys = [str(part["key"]) for part in entry["key_metadata"]]
            empty = entry["value_metadata"].get("skip_deserialize")  # an empty dict or None, which has no bytes
        except (KeyError, TypeError, AttributeError):
            raise _damaged(root, f"{METADATA} describes a leaf in an unknown way") from None
        # untrusted: a key must not lead out of the checkpoint
        if not keys or {"", ".", ".."} & set("/".join(keys).split("/")):
            raise _damaged(root, f"{METADATA} has a leaf without a name, or with '..' in it: {'/'.join(keys)!a}")
        if not empty:
            leaves.append(keys)
    # a trainer's checkpoint has other items beside the weights
    if any(keys[0] == "params" for keys in leaves):
        leaves = [keys for keys in leaves if keys[0] == "params"]
    if not leaves:
        raise _damaged(root, f"{METADATA} lists no leaves")
    return leaves


def _leaf(root: Path, metadata: dict[str, Any], keys: list[str]) -> _FlaxLeaf:
    file = {"driver": "file", "path": f"{root}/"}
    path = ".".join(keys) + "/"
    ocdbt = metadata.get("use_ocdbt")
    if ocdbt or (ocdbt is None and (root / "manifest.ocdbt").is_file()):  # older checkpoints lack the field
        store = {"driver": "ocdbt", "base": file, "path": path}
    else:
        store = file | {"path": f"{root}/{path}"}
    spec = {
        "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
        "kvstore": store,
        # missing bytes stand for zeros only if the metadata has this field; otherwise they are damage
        "fill_missing_data_reads": metadata.get("store_array_data_equal_to_fill_value") is not True,
    }
    return _FlaxLeaf(_nested("/".join(keys)), spec)


def _nested(name: str) -> str:
    """Returns the NESTED name of a leaf; stacked layers keep their stack.

    >>> _nested("params/layer_0/mlp/linear"), _nested("transformer/layer_0/mlp/linear/w")
    ('layer_0/mlp/linear', 'layer_0/mlp/linear')
    """
    name = name.removeprefix("params/")
    name = name.removeprefix("transformer/")
    name = re.sub(r"^SigLiPFromPatches_0/", "vision_encoder/", name)
    return re.sub(r"(^|/)mlp/(gating_einsum|linear)/w$", r"\1mlp/\2", name)


def _checked(root: Path, name: str, get: Callable[[], Any]) -> Any:
    try:
        return get()
    except DAMAGE as error:
        reason = str(error).split(" [", 1)[0]  # TensorStore appends its settings and a line of its source
        raise _damaged(root, f"{name} cannot be read: {reason}") from None


def _damaged(root: Path, detail: str) -> UserError:
    return UserError(f"the checkpoint {root} is damaged ({detail}); download or unpack it again")
