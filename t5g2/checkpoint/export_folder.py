"""Writes a model as a Hugging Face folder that transformers loads, one tensor in memory at a time."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from t5g2.checkpoint import folder as folders
from t5g2.checkpoint import hf_config_writer, import_folder, names, safetensors_io
from t5g2.checkpoint.folder import ModelFolder
from t5g2.checkpoint.hf_config_fields import CONFIG_FILE
from t5g2.checkpoint.tensor import Tensor, cast_tensor, tensor_from_leaf, zero_tensor
from t5g2.core import files
from t5g2.core.tree import Leaf, LeafKey
from t5g2.models.config import DualEncoderConfig

GENERATION_FILE = "generation_config.json"


def export_model(
    model_dir: str | PathLike, out: str | PathLike, *, dtype: Any = None, shard_bytes: int = 5 * 10**9
) -> list[str]:
    """Writes a model as a Hugging Face folder: config.json, safetensors, and the tokenizer's and processor's files.

    Returns a line for each kind of input on which transformers computes something else.

    Args:
      model_dir: a model folder, or any folder that open_foreign opens.
      out: path of the new folder; it must not exist.
      dtype: dtype of the weights; None = each as it is stored.
      shard_bytes: largest size of a weights file.

    Raises:
      UserError: `out` exists; transformers has no architecture for this model; an unknown dtype; as open_any.
    """
    dtype = folders.weight_dtype(dtype)
    files.refuse_existing(out)
    opened = import_folder.open_any(model_dir)
    # config.json repeats the ids of generation_config.json, so both must agree
    special_tokens, generation = _generation_config(opened)
    dtypes = {str(cast_tensor(tensor_from_leaf(leaf), dtype).dtype) for leaf in opened.leaves.values()}
    # transformers casts all weights to one dtype when it loads them; float32 holds every other
    config_dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    tensor_format, data = hf_config_writer.write(opened.config, dtype=config_dtype, special_tokens=special_tokens)
    tensors = {
        match.name: cast_tensor(_join_leaves(match, opened.leaves), dtype)
        for match in names.match_tensors(tensor_format, opened.leaves)
    }
    # transformers initialises missing tensors at random, with a warning, so its placeholders are written too
    for name, shape in hf_config_writer.placeholders(tensor_format, opened.config).items():
        tensors.setdefault(name, zero_tensor(shape, config_dtype))
    folders.write_folder(
        Path(out).absolute(),
        tensors,
        {CONFIG_FILE: data, GENERATION_FILE: generation},
        extra_files=opened.extra_files,
        shard_bytes=shard_bytes,
        single_file=safetensors_io.SINGLE,
        metadata={"format": "pt"},
    )
    return hf_config_writer.deviations(opened.config)


def _generation_config(opened: ModelFolder) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns (ids of the special tokens, the generation_config.json to write).

    The second is None if the folder has this file already, because it is copied, or if the model does not generate.
    """
    special_tokens = dict(hf_config_writer.SPECIAL_TOKEN_IDS)
    file = next((file for file in opened.extra_files if file.name == GENERATION_FILE), None)
    if file is not None:
        stored = files.read_json_object(file, fix=import_folder.DAMAGED_JSON)
        return special_tokens | {name: stored[name] for name in special_tokens if stored.get(name) is not None}, None
    return special_tokens, None if isinstance(opened.config, DualEncoderConfig) else special_tokens


def _join_leaves(match: names.TensorMatch, leaves: Mapping[LeafKey, Leaf]) -> Tensor:
    parts = [leaves[key] for key in match.keys]
    return Tensor(match.shape, np.dtype(parts[0].dtype), lambda: match.axes.to_tensor([part.read() for part in parts]))
