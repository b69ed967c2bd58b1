"""Model folders: everything that is needed to use a model, and nothing of the run that trained it.

model.json                        the architecture: its kind and every field
model-00001-of-0000N.safetensors  one tensor per (path, layer), named as in core/tree.py: decoder.layers.mlp.up.7
model.safetensors.index.json      which tensor is in which file
t5g2_tokenizer.json               the tokenizer, if there is one
provenance.json                   the origin of the weights, if it is known
tokenizer.json, …                 files that are copied from the folder of the source model: EXTRA_FILES
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from t5g2.checkpoint import safetensors_io
from t5g2.checkpoint.generation_ids import GENERATION_FILE
from t5g2.checkpoint.tensor import Tensor, tensor_from_leaf
from t5g2.core import files, sharding, tree
from t5g2.core.casting import cast_weights
from t5g2.core.errors import UserError, unknown
from t5g2.core.tree import Leaf, LeafKey
from t5g2.models import build
from t5g2.models.config import DualEncoderConfig, ModelConfig, VisionConfig, from_dict, text_only, to_dict
from t5g2.models.position_embeddings import resample_positions

MODEL = "model.json"
TOKENIZER = "t5g2_tokenizer.json"
PROVENANCE = "provenance.json"
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
# files beside the weights that are copied and not read: the tokenizer and the settings of the processors
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
    GENERATION_FILE,
)


JsonFiles = Mapping[str, Mapping[str, Any] | None]


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """A model folder that was opened: its config is read, its weights are read when they are needed.

    Attributes:
      path: folder of the files beside the weights; of a GGUF file, one in the cache.
      origin: what records and messages name the weights by: a folder, a GGUF file, or an address of the hub.
      tokenizer, provenance: plain data as they were saved; None = not saved.
      leaves: (path, layer) -> Leaf with the shape from the config and the stored dtype.
      extra_files: files of the folder that are copied when the model is written elsewhere.
    """

    path: Path
    origin: str
    config: ModelConfig
    tokenizer: dict[str, Any] | None
    provenance: dict[str, Any] | None
    leaves: Mapping[LeafKey, Leaf] = field(repr=False)
    extra_files: tuple[Path, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the import that the weights come from: how they were quantised, what was assumed."""
        record = self.provenance or {}
        # of a run, whose weights began as imported ones
        record = record["weights"] if isinstance(record.get("weights"), dict) else record
        notes = record.get("notes")
        return tuple(map(str, notes)) if isinstance(notes, list) else ()


def save_model(
    directory: str | PathLike,
    model: Any,
    *,
    tokenizer: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    shard_bytes: int = 5 * 10**9,
    extra_files: Sequence[Path] = (),
) -> None:
    """Writes a model as a model folder. All processes call it, one writes.

    Args:
      model: a language model or a dual encoder.
      tokenizer, provenance, generation_config: plain data, None = none.
      shard_bytes, extra_files: as in save_leaves.

    Raises:
      UserError: the directory exists already.
    """
    save_leaves(
        directory,
        model.config,
        tree.leaves(model),
        json_files={TOKENIZER: tokenizer, PROVENANCE: provenance, GENERATION_FILE: generation_config},
        shard_bytes=shard_bytes,
        extra_files=extra_files,
    )


def save_leaves(
    directory: str | PathLike,
    config: ModelConfig,
    leaves: Mapping[LeafKey, Leaf],
    *,
    json_files: JsonFiles = MappingProxyType({}),
    shard_bytes: int = 5 * 10**9,
    extra_files: Sequence[Path] = (),
) -> None:
    """Writes a model folder; it appears under its name only when it is complete. All processes call it, one writes.

    Leaves are read one after the other, and one is in memory at a time.

    Args:
      directory: path of the new folder; it must not exist.
      config: the architecture.
      leaves: all leaves of a model of this architecture.
      json_files: file name -> plain data, None = no such file: TOKENIZER, PROVENANCE, GENERATION_FILE. They replace
        extra_files of the same name.
      shard_bytes: largest size of a weights file.
      extra_files: files that are copied into the folder.

    Raises:
      UserError: the directory exists already.
    """
    target = Path(directory).absolute()
    needed, actual = _shapes(tree.leaves(build.abstract(config))), _shapes(leaves)
    assert actual == needed, tree.difference(needed, actual)
    # one process checks for all: the others might check after it has begun to write
    exists = target.exists()
    if multihost_utils.broadcast_one_to_all(np.asarray(exists)) if jax.process_count() > 1 else exists:
        raise files.already_exists(target)
    tensors = {tree.name(key): tensor_from_leaf(leaf) for key, leaf in leaves.items()}
    if jax.process_index() > 0:
        for tensor in tensors.values():
            tensor.read()  # a collective operation: every process takes part in gathering the leaf
        return
    json_files = {MODEL: to_dict(config), **json_files}
    write_folder(target, tensors, json_files, shard_bytes=shard_bytes, extra_files=extra_files)


def write_folder(
    directory: Path,
    tensors: Mapping[str, Tensor],
    json_files: JsonFiles,
    *,
    extra_files: Sequence[Path] = (),
    **options: Any,
) -> None:
    """Writes a folder of tensors, JSON files and copies of other files; it appears under its name only when complete.

    Args:
      json_files: file name -> plain data, None = no such file.
      extra_files: files to copy.
      options: other arguments of safetensors_io.write.
    """
    with files.new_folder(directory) as temporary:
        safetensors_io.write(temporary, tensors, **options)
        for file in extra_files:
            shutil.copyfile(file, temporary / file.name)
        for name, data in json_files.items():
            if data is not None:
                files.write_json(temporary / name, data)


def open_model(directory: str | PathLike) -> ModelFolder:
    """Opens a model folder and checks that it holds exactly the weights of its architecture, in the right shapes.

    Raises:
      UserError: the folder does not exist, is not a model folder or is damaged; its weights do not fit model.json.
    """
    path = Path(directory).absolute()
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a model folder, which `t5g2 train` writes at the end of a run")
    if not (path / MODEL).is_file():
        raise UserError(
            f"{path} is not a model folder: it has no {MODEL}. Model folders are written by train and adapt, and "
            f"by `t5g2 import` from a Hugging Face folder, an official Flax one or a GGUF file"
        )
    config = from_dict(_read_json(path / MODEL), where=str(path / MODEL))
    # the abstract model defines the tensors that the folder must hold
    expected = {tree.name(key): leaf for key, leaf in tree.leaves(build.abstract(config)).items()}
    tensors = safetensors_io.read(path)
    described = {name: list(leaf.shape) for name, leaf in expected.items()}
    stored = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if described != stored:
        raise UserError(
            f"the weights in {path} are not those that its {MODEL} describes (described -> stored):\n"
            f"{tree.difference(described, stored)}\nUse the {MODEL} that belongs to them, or write the folder again"
        )
    leaves = {
        leaf.key: Leaf(leaf.path, leaf.layer, leaf.shape, tensors[name].dtype, leaf.axes, tensors[name].read)
        for name, leaf in expected.items()
    }
    tokenizer, provenance = (
        _read_json(path / name) if (path / name).is_file() else None for name in (TOKENIZER, PROVENANCE)
    )
    return ModelFolder(path, str(path), config, tokenizer, provenance, leaves, extra_files(path))


def read_architecture(path: str | PathLike) -> ModelConfig:
    """Returns the config of a model folder, or of a file like its model.json; no weights are needed.

    Raises:
      UserError: there is no such file, or it is damaged.
    """
    file = Path(path).expanduser().absolute()
    file = file / MODEL if file.is_dir() else file
    if not file.is_file():
        raise UserError(
            f"{file} does not exist; give a file like the {MODEL} of a model folder, or the folder of a model, or its "
            f"GGUF file"
        )
    return from_dict(_read_json(file), where=str(file))


def extra_files(directory: Path) -> tuple[Path, ...]:
    """Returns the files of a folder that are copied with its model: those of EXTRA_FILES, sorted by name.

    Raises:
      UserError: a file is a link that leads out of the folder, other than to the blobs of the hub's cache.
    """
    matching = {path for pattern in EXTRA_FILES for path in directory.glob(pattern) if path.is_file()}
    # a folder of unknown origin could otherwise have any file of this machine copied, and published with the model
    whole = directory.resolve()
    # a snapshot, or a folder in one
    snapshots = next((parent for parent in whole.parents if parent.name == "snapshots"), None)
    roots = [whole, *([] if snapshots is None else [snapshots.parent / "blobs"])]
    for path in sorted(matching):
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise UserError(
                f"{path} is a link to {path.resolve()}, outside of the folder, and is copied with the model; put a "
                f"copy in its place if it belongs to it, or remove it"
            )
    return tuple(sorted(matching))


def without_images(folder: ModelFolder) -> ModelFolder:
    """Returns the folder as a text-only model: the weights of image tower and projector are left out, and not read."""
    # leaves are lazy, so leaving them out saves reading them
    kept = {key: leaf for key, leaf in folder.leaves.items() if not key[0].startswith(("vision.", "projector."))}
    config = text_only(folder.config)
    return folder if config == folder.config else replace(folder, config=config, leaves=kept)


def weight_dtype(dtype: Any) -> np.dtype | None:
    """Returns the dtype for weights from its name or a dtype; None stays None.

    Raises:
      UserError: it is not one of WEIGHT_DTYPES.
    """
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in WEIGHT_DTYPES:
        raise unknown("dtype", name, WEIGHT_DTYPES, where="of weights")
    return jnp.dtype(name)


def with_image_size(folder: ModelFolder, size: int) -> ModelFolder:
    """Returns the folder with an image tower for another image size; its position embeddings are resampled when read.

    Args:
      size: in pixels, a multiple of the patch size: 896 and 448 for Gemma's tower of 14.

    Raises:
      UserError: there is no image tower, or the size does not fit its patches or its tokens.
    """
    config = folder.config
    if isinstance(config, DualEncoderConfig):
        vision = _resized(config.vision, size)
        config = replace(config, vision=vision)
    else:
        stack = config.image_stack
        if stack.images is None:
            raise UserError(f"image_size = {size}, and {folder.origin} has no image tower; leave it out")
        vision = _resized(stack.images.vision, size)
        stack = replace(stack, images=replace(stack.images, vision=vision))
        config = replace(config, encoder=stack) if config.is_encoder_decoder else stack
    # only the position embeddings depend on the image size
    old = folder.leaves["vision.positions", None]
    new = replace(
        old,
        shape=(vision.patches, vision.width),
        read=lambda: resample_positions(old.read(), vision.side).astype(old.dtype),
    )
    return replace(folder, config=config, leaves={**folder.leaves, new.key: new})


def _resized(vision: VisionConfig, size: int) -> VisionConfig:
    # a released tower may cut off a remainder; a size that is chosen has no reason to
    if size != vision.image_size and size % vision.patch_size:
        near = max(1, round(size / vision.patch_size)) * vision.patch_size
        raise UserError(
            f"image_size = {size} is not a multiple of the tower's patch_size, {vision.patch_size}; give {near}"
        )
    return replace(vision, image_size=size)


def load_model(folder: ModelFolder | str | PathLike, *, mesh: Mesh | None = None, param_dtype: Any = None) -> Any:
    """Returns the model of a folder.

    Args:
      folder: path of a model folder, or a folder that is open already.
      mesh: devices over which the weights are sharded, by the rules of core/sharding.py; None = the default device.
      param_dtype: dtype of the weights; None = as they are stored.

    Raises:
      UserError: as open_model; a weight is not finite, or does not fit into param_dtype.
    """
    folder = folder if isinstance(folder, ModelFolder) else open_model(folder)
    abstract = build.abstract(folder.config, common_dtype(folder, param_dtype))
    # each leaf goes to its devices as it is read: the host never holds the whole model
    shardings = None if mesh is None else sharding.shardings(abstract, mesh)
    leaves = tree.leaves(abstract)

    def read(key: LeafKey) -> np.ndarray:
        return cast_weights(folder.leaves[key].read(), leaves[key].dtype, name=f"{folder.origin}: {tree.name(key)}")

    return tree.build(abstract, read, shardings=shardings)


def common_dtype(folder: ModelFolder, chosen: Any = None) -> np.dtype:
    """Returns the chosen dtype, or else the one that all weights of the folder have.

    Raises:
      UserError: no dtype was chosen, and the weights have several.
    """
    if chosen is not None:
        return np.dtype(chosen)
    dtypes = {str(leaf.dtype): leaf.dtype for leaf in folder.leaves.values()}
    if len(dtypes) > 1:
        names = ", ".join(sorted(dtypes))
        raise UserError(f"the weights in {folder.origin} have several dtypes: {names}; choose one (param_dtype)")
    return next(iter(dtypes.values()))


def _shapes(leaves: Mapping[LeafKey, Leaf]) -> dict[str, list[int]]:
    return {tree.name(key): list(leaf.shape) for key, leaf in leaves.items()}


def _read_json(path: Path) -> dict[str, Any]:
    return files.read_json_object(path, fix="write the folder again")
