"""Model folders: everything it takes to use a model, and nothing of the run that made it.

model.json                        the architecture: its kind and every field
model-00001-of-0000N.safetensors  one tensor per (path, layer), named as in core/tree.py: decoder.layers.mlp.up.7
model.safetensors.index.json      which tensor is in which file
t5g2_tokenizer.json               the tokenizer, if there is one
provenance.json                   where the weights come from, if it was told
tokenizer.json, …                 files that were carried along from where the model was made: CARRIED
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from t5g2.checkpoint import safetensors_io
from t5g2.core import sharding as meshes
from t5g2.core import tree
from t5g2.core.errors import UserError, unknown
from t5g2.core.files import already_exists, new_folder
from t5g2.core.tree import Leaf, LeafKey
from t5g2.models import build
from t5g2.models.config import DualEncoderConfig, EncoderDecoderConfig, ModelConfig, from_dict, text_only, to_dict
from t5g2.models.siglip import resample_positions

MODEL = "model.json"
TOKENIZER = "t5g2_tokenizer.json"
PROVENANCE = "provenance.json"
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
# what belongs to a model besides its weights and is not read here: the tokenizer, how text and images are prepared
EXTRA_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """A model folder that was opened: what it says, and its weights, read when they are asked for.

    Attributes:
      tokenizer, provenance: plain data as they were saved, None = none was.
      leaves: (path, layer) -> Leaf with the shape that the config asks for and the dtype that is stored.
      carried: files of the folder that go along when the model is written elsewhere.
    """

    path: Path
    config: ModelConfig
    tokenizer: dict[str, Any] | None
    provenance: dict[str, Any] | None
    leaves: Mapping[LeafKey, Leaf] = field(repr=False)
    extra_files: tuple[Path, ...] = ()


def save_model(
    directory: str | PathLike,
    model: Any,
    *,
    tokenizer: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    shard_bytes: int = 5 * 10**9,
    extra_files: Sequence[Path] = (),
) -> None:
    """Writes a model as a model folder. All processes call it, one writes.

    Args:
      model: a model of ours.
      others: as in save_leaves.

    Raises:
      UserError: the directory exists already.
    """
    how = {"tokenizer": tokenizer, "provenance": provenance, "shard_bytes": shard_bytes, "carry": extra_files}
    save_leaves(directory, model.config, tree.leaves(model), **how)


def save_leaves(
    directory: str | PathLike,
    config: ModelConfig,
    leaves: Mapping[LeafKey, Leaf],
    *,
    tokenizer: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    shard_bytes: int = 5 * 10**9,
    extra_files: Sequence[Path] = (),
) -> None:
    """Writes a model folder; it appears under its name only when it is complete. All processes call it, one writes.

    A leaf is read when it is its turn, and one is in memory at a time.

    Args:
      directory: where; it does not exist.
      config: the architecture.
      leaves: all those of a model of it.
      tokenizer, provenance: plain data, None = none.
      shard_bytes: where the next file of weights begins.
      carry: files that are copied into it, as a ModelFolder's `carried`.

    Raises:
      UserError: the directory exists already.
    """
    target = Path(directory).absolute()
    wanted, given = _shapes(tree.leaves(build.abstract(config))), _shapes(leaves)
    assert given == wanted, tree.difference(wanted, given)
    # one process looks and all go by it: the others might look when it has begun to write
    exists = target.exists()
    if multihost_utils.broadcast_one_to_all(np.asarray(exists)) if jax.process_count() > 1 else exists:
        raise already_exists(target)
    tensors = {tree.name(key): _tensor(leaf) for key, leaf in leaves.items()}
    if jax.process_index() > 0:
        for tensor in tensors.values():
            tensor.read()  # takes part in gathering it
        return
    notes = {MODEL: to_dict(config), TOKENIZER: tokenizer, PROVENANCE: provenance}
    write_folder(target, tensors, notes, shard_bytes=shard_bytes, extra_files=extra_files)


def write_folder(
    directory: Path,
    tensors: Mapping[str, safetensors_io.Tensor],
    notes: Mapping[str, Mapping[str, Any] | None],
    *,
    extra_files: Sequence[Path] = (),
    **options: Any,
) -> None:
    """Writes tensors, notes (file name -> plain data, None = no such file) and copies of the files in `carry`.

    The folder appears under its name only when it is complete. `how` is what safetensors_io.write takes.
    """
    with new_folder(directory) as temporary:
        safetensors_io.write(temporary, tensors, **options)
        for file in extra_files:
            shutil.copyfile(file, temporary / file.name)
        for name, note in notes.items():
            if note is not None:
                (temporary / name).write_text(json.dumps(note, indent=1) + "\n")


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
            f"{path} is not a model folder: it has no {MODEL}. Model folders are what train and adapt write, and what "
            f"`t5g2 import` makes of a Hugging Face or an official Flax folder"
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
    return ModelFolder(path, config, tokenizer, provenance, leaves, extra_files(path))


def extra_files(directory: Path) -> tuple[Path, ...]:
    """The files of a folder that go along with its model: those named in CARRIED, sorted by name."""
    found = {path for pattern in EXTRA_FILES for path in directory.glob(pattern) if path.is_file()}
    return tuple(sorted(found))


def without_images(folder: ModelFolder) -> ModelFolder:
    """The same folder as a text-only model: the weights of its image tower and projector are left out, and not read."""
    kept = {key: leaf for key, leaf in folder.leaves.items() if not key[0].startswith(("vision.", "projector."))}
    config = text_only(folder.config)
    return folder if config == folder.config else replace(folder, config=config, leaves=kept)


def weight_dtype(dtype: Any) -> np.dtype | None:
    """The dtype of weights that was chosen by name or as such; None stays None.

    Raises:
      UserError: weights are not kept in it.
    """
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in WEIGHT_DTYPES:
        raise unknown("dtype of weights", name, WEIGHT_DTYPES)
    return jnp.dtype(name)


def with_image_size(folder: ModelFolder, size: int) -> ModelFolder:
    """The same folder with an image tower for images of another size: its position embeddings are resampled when read.

    Args:
      size: in pixels, a multiple of the patch size: 896 and 448 for Gemma's tower of 14.

    Raises:
      UserError: there is no image tower, or the size does not fit its patches or its tokens.
    """
    config = folder.config
    if isinstance(config, DualEncoderConfig):
        vision = replace(config.vision, image_size=size)
        config = replace(config, vision=vision)
    else:
        stack = config.encoder if isinstance(config, EncoderDecoderConfig) else config
        if stack.images is None:
            raise UserError(f"image_size = {size}, and {folder.path} has no image tower; leave it out")
        vision = replace(stack.images.vision, image_size=size)
        stack = replace(stack, images=replace(stack.images, vision=vision))
        config = replace(config, encoder=stack) if isinstance(config, EncoderDecoderConfig) else stack
    old = folder.leaves["vision.positions", None]
    new = replace(
        old,
        shape=(vision.patches, vision.width),
        read=lambda: resample_positions(old.read(), vision.side).astype(old.dtype),
    )
    return replace(folder, config=config, leaves={**folder.leaves, new.key: new})


def load_model(folder: ModelFolder | str | PathLike, *, mesh: Mesh | None = None, param_dtype: Any = None) -> Any:
    """The model of a folder, on the mesh if one is given.

    Args:
      folder: a model folder, or one that is open already.
      mesh: where the weights go, cut as core/sharding.py says; None = the default device.
      param_dtype: what the weights are cast to; None = as they are stored.

    Raises:
      UserError: as open_model.
    """
    folder = folder if isinstance(folder, ModelFolder) else open_model(folder)
    abstract = build.abstract(folder.config, common_dtype(folder, param_dtype))
    shardings = None if mesh is None else meshes.shardings(abstract, mesh)
    leaves = tree.leaves(abstract)
    return tree.build(abstract, lambda key: folder.leaves[key].read().astype(leaves[key].dtype), shardings=shardings)


def common_dtype(folder: ModelFolder, chosen: Any = None) -> np.dtype:
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


def _tensor(leaf: Leaf) -> safetensors_io.Tensor:
    return safetensors_io.Tensor(leaf.shape, np.dtype(leaf.dtype), _on_host(leaf.read))


def _shapes(leaves: Mapping[LeafKey, Leaf]) -> dict[str, list[int]]:
    return {tree.name(key): list(leaf.shape) for key, leaf in leaves.items()}


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
