"""Model folders: everything it takes to use a model, and nothing of the run that made it.

model.json                        the architecture: its kind and every field
model-00001-of-0000N.safetensors  one tensor per (path, layer), named as in core/tree.py: decoder.layers.mlp.up.7
model.safetensors.index.json      which tensor is in which file
t5g2_tokenizer.json               the tokenizer, if there is one
provenance.json                   where the weights come from, if it was told
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from t5g2.checkpoint import safetensors_io
from t5g2.core import mesh as meshes
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.core.tree import Leaf, LeafKey
from t5g2.models import build
from t5g2.models.config import ModelConfig, from_dict, to_dict

MODEL = "model.json"
TOKENIZER = "t5g2_tokenizer.json"
PROVENANCE = "provenance.json"


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """A model folder that was opened: what it says, and its weights, read when they are asked for.

    Attributes:
      tokenizer, provenance: plain data as they were saved, None = none was.
      leaves: (path, layer) -> Leaf with the shape that the config asks for and the dtype that is stored.
    """

    path: Path
    config: ModelConfig
    tokenizer: dict[str, Any] | None
    provenance: dict[str, Any] | None
    leaves: Mapping[LeafKey, Leaf] = field(repr=False)


def save_model(
    directory: str | PathLike,
    model: Any,
    *,
    tokenizer: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model folder; it appears under its name only when it is complete. All processes call it, one writes.

    Raises:
      UserError: the directory exists already.
    """
    target = Path(directory).absolute()
    # one process looks and all go by it: the others might look when it has begun to write
    exists = target.exists()
    if multihost_utils.broadcast_one_to_all(np.asarray(exists)) if jax.process_count() > 1 else exists:
        raise _exists(target)
    temporary = target.with_name(f".{target.name}.tmp")
    tensors = {tree.name(key): _tensor(leaf) for key, leaf in tree.leaves(model).items()}
    notes = {MODEL: to_dict(model.config), TOKENIZER: tokenizer, PROVENANCE: provenance}
    if jax.process_index() > 0:
        for tensor in tensors.values():
            tensor.read()  # takes part in gathering it
        return
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir(parents=True)
    try:
        safetensors_io.write(temporary, tensors, shard_bytes=shard_bytes)
        for name, note in notes.items():
            if note is not None:
                (temporary / name).write_text(json.dumps(note, indent=1) + "\n")
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_existing(directory: str | PathLike) -> None:
    """Raises UserError if the directory exists: call it before the work whose result is to go there."""
    if Path(directory).exists():
        raise _exists(Path(directory))


def open_model(directory: str | PathLike) -> ModelFolder:
    """Opens a model folder and checks it: that all of its weights are there, and no others, in the right shapes.

    Raises:
      UserError: it does not exist, is not a model folder, is damaged, or its weights are not those of its model.json.
    """
    path = Path(directory).absolute()
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a model folder, which `t5g2 train` writes at the end of a run")
    if not (path / MODEL).is_file():
        raise UserError(
            f"{path} is not a model folder: it has no {MODEL}. Model folders are what train and adapt write"
        )
    config = from_dict(_json(path / MODEL), where=str(path / MODEL))
    expected = {tree.name(key): leaf for key, leaf in tree.leaves(build.abstract(config)).items()}
    tensors = safetensors_io.read(path)
    wanted = {name: list(leaf.shape) for name, leaf in expected.items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        raise UserError(
            f"the weights in {path} are not those that its {MODEL} describes (described -> found):\n"
            f"{tree.difference(wanted, found)}\nUse the {MODEL} that belongs to them, or write the folder again"
        )
    leaves = {
        leaf.key: Leaf(leaf.path, leaf.layer, leaf.shape, tensors[name].dtype, leaf.axes, tensors[name].read)
        for name, leaf in expected.items()
    }
    tokenizer, provenance = (
        _json(path / name) if (path / name).is_file() else None for name in (TOKENIZER, PROVENANCE)
    )
    return ModelFolder(path, config, tokenizer, provenance, leaves)


def load_model(folder: ModelFolder | str | PathLike, *, mesh: Mesh | None = None, param_dtype: Any = None) -> Any:
    """The model of a folder, on the mesh if one is given.

    Args:
      folder: a model folder, or one that is open already.
      mesh: where the weights go, cut as core/mesh.py says; None = the default device.
      param_dtype: what the weights are cast to; None = as they are stored.

    Raises:
      UserError: as open_model.
    """
    folder = folder if isinstance(folder, ModelFolder) else open_model(folder)
    abstract = build.abstract(folder.config, dtype_of(folder, param_dtype))
    shardings = None if mesh is None else meshes.shardings(abstract, mesh)
    leaves = tree.leaves(abstract)
    return tree.build(abstract, lambda key: folder.leaves[key].read().astype(leaves[key].dtype), shardings=shardings)


def dtype_of(folder: ModelFolder, chosen: Any = None) -> np.dtype:
    """The dtype that was chosen, or else the one that all weights of the folder have.

    Raises:
      UserError: none was chosen, and they have several.
    """
    if chosen is not None:
        return np.dtype(chosen)
    dtypes = {str(leaf.dtype): leaf.dtype for leaf in folder.leaves.values()}
    if len(dtypes) > 1:
        names = ", ".join(sorted(dtypes))
        raise UserError(f"the weights in {folder.path} have several dtypes: {names}; say which to use (param_dtype)")
    return next(iter(dtypes.values()))


def _exists(directory: Path) -> UserError:
    return UserError(f"{directory.absolute()} exists already and is not overwritten; give another one, or remove it")


def _tensor(leaf: Leaf) -> safetensors_io.Tensor:
    return safetensors_io.Tensor(leaf.shape, np.dtype(leaf.dtype), _on_host(leaf.read))


def _on_host(read: Callable[[], Any]) -> Callable[[], np.ndarray]:
    def gather() -> np.ndarray:
        array = read()
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            array = multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(array)

    return gather


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); write the folder again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds {type(data).__name__}, not an object; write the folder again")
    return data
