"""Opens folders of other formats as model folders, and writes them as such, one tensor in memory at a time.

The formats are Hugging Face folders (config.json, safetensors), GGUF files, and the official Flax trees of
google-deepmind/gemma.
hf_names.py and flax_names.py map tensors to leaves, hf_config_reader.py and flax_config.py find the architecture.
Values are never computed, only rearranged, so import, export and import again give the same bits.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from t5g2.checkpoint import (
    accounting,
    flax_config,
    flax_names,
    flax_tree,
    generation_ids,
    gguf_folder,
    hf_config_reader,
    hf_config_writer,
    hf_names,
    hub,
    names,
    safetensors_io,
    source_folder,
    unreadable_folders,
)
from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.folder import ModelFolder
from t5g2.checkpoint.hf_config_fields import CONFIG_FILE
from t5g2.checkpoint.tensor import Tensor, cast_tensor, tensor_from_leaf
from t5g2.core import files, settings, tree
from t5g2.core.errors import UserError
from t5g2.core.tree import Leaf, LeafKey
from t5g2.models import build, sizes
from t5g2.models.config import (
    DualEncoderConfig,
    ModelConfig,
    VisionConfig,
    from_dict,
    text_only,
)
from t5g2.models.siglip import VisionTower

# tensors of a tower and its projector in every format that has one
TOWER_TENSORS = re.compile(r"vision_tower|vision_encoder|multi_modal_projector|mm_input_projection|mm_soft_embedding")
DAMAGED_JSON = "download it again"
ConfigChoice = ModelConfig | str | PathLike | None


def open_any(directory: str | PathLike) -> ModelFolder:
    """Opens a model folder, a Hugging Face folder, an official Flax one, a GGUF file, or one of these at the hub.

    No weight is read yet.

    Raises:
      UserError: the folder is none of them; as open_model and open_foreign.
    """
    directory = source_folder.local(directory)
    path = Path(directory).expanduser().absolute()
    if not (path / folders.MODEL).is_file():
        return open_foreign(directory)
    return replace(folders.open_model(path), origin=hub.recorded(path))


def read_architecture(source: str | PathLike) -> ModelConfig:
    """Returns the architecture of what open_any opens, or of a folder or file with no more than a model.json.

    Raises:
      UserError: as open_any; a model.json does not exist, or is damaged.
    """
    source = source_folder.local(source)
    path = Path(source).expanduser().absolute()
    if path.suffix == ".json" or (path / folders.MODEL).is_file():
        return folders.read_architecture(path)
    return open_any(source).config


def open_foreign(directory: str | PathLike, config: ConfigChoice = None) -> ModelFolder:
    """Opens a Hugging Face or an official Flax folder, or a GGUF file, as if it were a model folder.

    No weight is read yet, but for stored copies of tied weights, which are compared.

    Args:
      directory: a folder with config.json and safetensors, or an Orbax checkpoint; or a GGUF file, or its folder; or
        the address of one of them at the hub (hub.py).
      config: the architecture, the name of a size, or a file like model.json. None = the one that config.json
        describes, or the released size whose shapes a Flax tree has.

    Raises:
      UserError: the folder is neither; a file is missing or damaged; the architecture is unsupported or undetermined;
        tensors are missing, surplus or have other shapes; copies of tied weights differ.
    """
    directory = source_folder.local(directory)
    path = gguf_folder.folder_of(directory)
    gguf, origin = gguf_folder.source_of(path), source_folder.recorded(directory)
    if gguf is None:
        _refuse_unreadable(directory, path)
    chosen = _chosen_config(config)
    if (path / CONFIG_FILE).is_file() or any(path.glob("*.safetensors")):
        tensors = safetensors_io.read(path, origin=origin) if gguf is None else gguf.tensors
        weights = _read_hugging_face(path, origin, chosen, tensors)
    elif flax_tree.is_flax(path):
        weights = _read_flax(path, origin, chosen)
    elif any(next(path.glob(pattern), None) for pattern in safetensors_io.PICKLES):
        raise safetensors_io.no_weights(path, origin)
    else:
        raise UserError(
            f"{origin} holds no known model: neither {CONFIG_FILE} and safetensors (Hugging Face), nor an Orbax "
            f"checkpoint (official Flax), nor a GGUF file, nor {folders.MODEL} (a model folder)"
        )
    tensor_format, config = weights.tensor_format, weights.config
    tensors, notes = accounting.with_canonical_names(origin, tensor_format, weights.tensors)
    notes += _ignored_config_notes(path, chosen)
    if gguf is not None:
        notes += gguf.notes
    if (path / "adapter_config.json").is_file():
        notes.append("the adapter (peft) in the folder was left out: these are the weights without it")
    if text_only(config) != config and not any(TOWER_TENSORS.search(name) for name in tensors):
        config = text_only(config)
        notes.append(f"{weights.config_source} has an image tower and the folder no weights of it: text only")
    abstract = tree.leaves(build.abstract(config))
    # the shapes decide between alternative rows of the table, so matching comes after the names are settled
    matches = names.match_tensors(tensor_format, abstract, {name: tensor.shape for name, tensor in tensors.items()})
    tensors, tied_notes = accounting.with_originals(tensor_format, matches, tensors)
    notes += tied_notes
    where = f"{origin}, according to {weights.config_source}"
    notes += accounting.check_tensors(where, tensor_format, config, matches, tensors)
    provenance = {
        "kind": "import",
        "source": origin,
        "layout": tensor_format.title if gguf is None else f"GGUF of {tensor_format.title}",
        "tensors": len(matches),
        "parameters": sum(math.prod(leaf.shape) for leaf in abstract.values()),
        "notes": notes,
    }
    leaves = _leaves_of_tensors(matches, tensors, abstract)
    return ModelFolder(path, origin, config, _tokenizer(path), provenance, leaves, folders.extra_files(path))


@dataclass(frozen=True, eq=False)
class TowerFolder:
    """A folder that was opened for its image tower.

    Attributes:
      origin: what records and messages name the folder by: its path, or its address at the hub.
      config: the tower's architecture as it is stored; `pool` is True if it has the pooling head.
      leaves: every leaf of the folder, the tower's under "vision."; loaded by Leaf.read.
      notes: on the import, as of a ModelFolder.
    """

    path: Path
    origin: str
    config: VisionConfig
    leaves: Mapping[LeafKey, Leaf] = field(repr=False)
    notes: tuple[str, ...] = ()


def open_tower(directory: str | PathLike) -> TowerFolder:
    """Opens any folder that has an image tower; no weight is read yet.

    Args:
      directory: as in open_any: Gemma 3 with images, MedGemma, T5Gemma 2 with images, SigLIP, MedSigLIP; or the tower
        alone, as transformers saves it (model_type siglip_vision_model).

    Raises:
      UserError: the folder has no image tower; as open_any.
    """
    directory = source_folder.local(directory)
    path = Path(directory).expanduser().absolute()
    if (path / CONFIG_FILE).is_file() and not (path / folders.MODEL).is_file():
        data = _read_json(path / CONFIG_FILE)
        if data.get("model_type") == "siglip_vision_model":
            return _open_single_tower(path, data)
    opened = open_any(directory)
    config = opened.config
    if isinstance(config, DualEncoderConfig):
        return TowerFolder(path, opened.origin, config.vision, opened.leaves, opened.notes)
    images = config.image_stack.images
    if images is None:
        raise UserError(
            f"{opened.origin} is a language model without an image tower; give the folder of one that has it: "
            f"Gemma 3 with images (4b and larger), MedGemma, T5Gemma 2 with images, SigLIP, MedSigLIP, or a tower "
            f"alone, as transformers saves it (siglip_vision_model)"
        )
    return TowerFolder(path, opened.origin, images.vision, opened.leaves, opened.notes)


def import_model(
    source: str | PathLike,
    out: str | PathLike,
    *,
    config: ConfigChoice = None,
    dtype: Any = None,
    image_size: int | None = None,
) -> ModelFolder:
    """Writes a Hugging Face folder, an official Flax one or a GGUF file as a model folder, and opens that.

    Args:
      source, config: as in open_foreign.
      out: path of the new model folder; it must not exist.
      dtype: dtype of the weights: "float32", "bfloat16", "float16"; None = each as it is stored.
      image_size: size in pixels of the images that the model will read, if not the size it was trained with; the
        position embeddings of its tower are resampled.

    Raises:
      UserError: as open_foreign; `out` exists; an unknown dtype, an image size that does not fit.
    """
    # arguments are checked before any weight is read, because an import takes minutes
    dtype = folders.weight_dtype(dtype)
    files.refuse_existing(out)
    local = source_folder.local(source)
    if (Path(local).expanduser() / folders.MODEL).is_file():
        raise UserError(f"{source} is a model folder already: it has a {folders.MODEL}. Use it as it is, or copy it")
    opened = open_foreign(local, config)
    if image_size is not None:
        opened = folders.with_image_size(opened, image_size)
    tensors = {
        name: cast_tensor(tensor_from_leaf(leaf), dtype, name=f"{opened.origin}: {name}")
        for name, leaf in ((tree.name(key), leaf) for key, leaf in opened.leaves.items())
    }
    json_files = {
        folders.MODEL: folders.to_dict(opened.config),
        folders.TOKENIZER: opened.tokenizer,
        folders.PROVENANCE: opened.provenance,
        generation_ids.GENERATION_FILE: generation_ids.completed(opened.path),
    }
    folders.write_folder(Path(out).absolute(), tensors, json_files, extra_files=opened.extra_files)
    return folders.open_model(out)


class _ForeignWeights(NamedTuple):
    """A foreign folder as it is stored: format, architecture and the source of that, tensors by stored name."""

    tensor_format: names.TensorFormat
    config: ModelConfig
    config_source: str
    tensors: Mapping[str, Tensor]


def _chosen_config(config: ConfigChoice) -> ModelConfig | None:
    """Returns the architecture that a caller chose: a config as it is, a size by its name, or read from a file."""
    if config is None or isinstance(config, ModelConfig):
        return config
    path = Path(config)
    if path.suffix != ".json":
        return sizes.size(str(config))
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a size's name, such as gemma3:1b, or a file like model.json")
    return from_dict(_read_json(path), where=str(path))


def _read_hugging_face(
    path: Path, origin: str, chosen: ModelConfig | None, tensors: Mapping[str, Tensor]
) -> _ForeignWeights:
    if chosen is not None:
        # only the format is used, so the dtype of the config.json is arbitrary
        tensor_format, _ = hf_config_writer.write(chosen, dtype="float32")
        return _ForeignWeights(tensor_format, chosen, "the chosen config", tensors)
    if not (path / CONFIG_FILE).is_file():
        raise UserError(
            f"{origin} has safetensors but no {CONFIG_FILE}, so its architecture is unknown; put the {CONFIG_FILE} "
            f"beside them, or name the architecture: config = a size's name, such as gemma3:1b, or a file like "
            f"model.json"
        )
    try:
        tensor_format, config = hf_config_reader.read(_read_json(path / CONFIG_FILE))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    return _ForeignWeights(tensor_format, config, _config_name(path), tensors)


def _read_flax(path: Path, origin: str, chosen: ModelConfig | None) -> _ForeignWeights:
    tensors = flax_tree.read(path)
    # the two official formats differ in the names of their roots
    has_decoder = any(name.startswith("decoder/") for name in tensors)
    tensor_format = flax_names.T5GEMMA if has_decoder else flax_names.GEMMA
    if chosen is not None:
        return _ForeignWeights(tensor_format, chosen, "the chosen config", tensors)
    # a Flax tree has no config, so the released size with these shapes is taken
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return _ForeignWeights(tensor_format, flax_config.find(origin, tensor_format, shapes), "its size", tensors)


def _ignored_config_notes(path: Path, chosen: ModelConfig | None) -> list[str]:
    """Returns a line for each field of the folder's config.json that the model does not follow."""
    if not (path / CONFIG_FILE).is_file():
        return []
    data = _read_json(path / CONFIG_FILE)
    notes = hf_config_reader.dropout_notes(data)
    if chosen is None:
        return notes
    try:
        _, described = hf_config_reader.read(data)
    except UserError as error:
        return [*notes, f"{_config_name(path)} was not used: {error}"]
    # a caller may mean to overrule the file, so differences are notes, not errors
    lines = tree.difference(settings.flatten(folders.to_dict(described)), settings.flatten(folders.to_dict(chosen)))
    return [*notes, *(f"the chosen config overrules {_config_name(path)}: {line}" for line in lines.splitlines())]


def _config_name(path: Path) -> str:
    """Returns what messages call a folder's config.json, which a GGUF file does not have."""
    return "the metadata" if (path / gguf_folder.INDEX).is_file() else CONFIG_FILE


def _open_single_tower(path: Path, data: Mapping[str, Any]) -> TowerFolder:
    """Opens a folder that holds an image tower and nothing else."""
    origin = hub.recorded(path)
    try:
        config = hf_config_reader.read_tower(data)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    # under "vision.", the path that the tower has in every model
    abstract = tree.leaves({"vision": jax.eval_shape(lambda: VisionTower(config, key=jax.random.key(0)))})
    tensor_format = hf_names.SIGLIP_VISION
    stored = safetensors_io.read(path, origin=origin)
    tensors, notes = accounting.with_canonical_names(origin, tensor_format, stored)
    matches = names.match_tensors(tensor_format, abstract, {name: tensor.shape for name, tensor in tensors.items()})
    accounting.check_tensors(f"{origin}, according to {CONFIG_FILE}", tensor_format, None, matches, tensors)
    leaves = _leaves_of_tensors(matches, tensors, abstract)
    return TowerFolder(path, origin, config, leaves, tuple(notes))


def _leaves_of_tensors(
    matches: list[names.TensorMatch], tensors: Mapping[str, Tensor], abstract: Mapping[LeafKey, Leaf]
) -> dict[LeafKey, Leaf]:
    """Returns the leaves that the tensors hold, in the order of the tensors, so that files are read front to back."""
    cache = _LastTensor()
    leaves = {}
    for match in matches:
        stored = tensors[match.name]
        # a tensor that holds several leaves (keys and values in one) is read once for all of them
        read = stored.read if len(match.keys) == 1 else cache.cached(match.name, stored.read)
        for index, key in enumerate(match.keys):
            leaves[key] = replace(abstract[key], dtype=stored.dtype, read=_leaf_reader(match, index, read))
    return leaves


def _leaf_reader(match: names.TensorMatch, index: int, read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    return lambda: match.axes.to_leaf(read(), match.shapes, index)


class _LastTensor:
    """Cache of the one tensor that was read last; leaves that share a tensor are mostly read one after the other."""

    def __init__(self):
        self.name, self.array = "", np.empty(0)

    def cached(self, name: str, read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
        """Returns a function that calls `read` unless this tensor is the one that was read last."""

        def read_cached() -> np.ndarray:
            if self.name != name:
                self.array = np.empty(0)  # free the last tensor before the next one is loaded
                self.name, self.array = name, read()
            return self.array

        return read_cached


def read_tokenizer(directory: str | PathLike) -> dict[str, Any] | None:
    """Returns the tokenizer of any folder that open_any opens, as plain data; None if it has none. No weight is opened.

    Raises:
      UserError: the folder does not exist, or holds no model for a known reason.
    """
    directory = source_folder.local(directory)
    path = gguf_folder.folder_of(directory)
    if not (path / gguf_folder.INDEX).is_file():
        _refuse_unreadable(directory, path)
    if not (path / folders.MODEL).is_file():
        return _tokenizer(path)
    file = path / folders.TOKENIZER
    return _read_json(file) if file.is_file() else None


def _refuse_unreadable(directory: str | PathLike, path: Path) -> None:
    """Raises UserError for what holds no model for a known reason.

    Args:
      directory: what was given.
      path: its folder, which is no folder of a GGUF file (any more).
    """
    file = gguf_folder.file_of(directory)
    if file is not None:
        raise UserError(f"{path}, made of {file}, was removed from the cache meanwhile; give the file again")
    unreadable_folders.refuse(directory)


def _tokenizer(path: Path) -> dict[str, Any] | None:
    """Returns the tokenizer as plain data for data/tokenizers/registry.py; its file is beside the weights."""
    for kind, name in (("huggingface", "tokenizer.json"), ("sentencepiece", "tokenizer.model")):
        if (path / name).is_file():
            files.refuse_lfs_pointer(path / name)
            with (path / name).open("rb") as file:
                return {"kind": kind, "file": name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return None


def _read_json(path: Path) -> dict[str, Any]:
    return files.read_json_object(path, fix=DAMAGED_JSON)
