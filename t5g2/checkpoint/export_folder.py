"""Writes a model as a Hugging Face folder that transformers loads, one tensor in memory at a time."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from t5g2.checkpoint import bos, generation_ids, hf_config_writer, import_folder, names, safetensors_io
from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.folder import ModelFolder
from t5g2.checkpoint.generation_ids import GENERATION_FILE
from t5g2.checkpoint.hf_config_fields import CONFIG_FILE
from t5g2.checkpoint.tensor import Tensor, cast_tensor, zero_tensor
from t5g2.core import files
from t5g2.core.tree import Leaf, LeafKey
from t5g2.models.config import DualEncoderConfig


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
    config_dtype = _config_dtype(opened, dtype)
    tensor_format, data = _config_json(opened, dtype)
    tensors = {
        match.name: cast_tensor(_join_leaves(match, opened.leaves), dtype, name=f"{opened.origin}: {match.name}")
        for match in names.match_tensors(tensor_format, opened.leaves)
    }
    # transformers initialises missing tensors at random, with a warning, so its placeholders are written too
    for name, shape in hf_config_writer.placeholders(tensor_format, opened.config).items():
        tensors.setdefault(name, zero_tensor(shape, config_dtype))
    folders.write_folder(
        Path(out).absolute(),
        tensors,
        # config.json repeats the ids of generation_config.json
        {CONFIG_FILE: data, GENERATION_FILE: _generation_config(opened), **_tokenizer_files(opened)},
        extra_files=opened.extra_files,
        shard_bytes=shard_bytes,
        single_file=safetensors_io.SINGLE,
        metadata={"format": "pt"},
    )
    return hf_config_writer.deviations(opened.config)


def check_model(model_dir: str | PathLike, *, dtype: Any = None) -> None:
    """Checks that a model can be exported, without reading its weights.

    Raises:
      UserError: as `export_model`, but for `out`.
    """
    opened, dtype = import_folder.open_any(model_dir), folders.weight_dtype(dtype)
    tensor_format, _ = _config_json(opened, dtype)
    names.match_tensors(tensor_format, opened.leaves)


def _config_dtype(opened: ModelFolder, dtype: Any) -> str:
    """Returns the dtype that config.json names: transformers casts all weights to one when it loads them."""
    dtypes = {str(leaf.dtype if dtype is None else dtype) for leaf in opened.leaves.values()}
    # float32 holds every other
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _config_json(opened: ModelFolder, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the format of the tensors and the content of config.json."""
    dtype = _config_dtype(opened, dtype)
    return hf_config_writer.write(opened.config, dtype=dtype, special_tokens=_special_tokens(opened))


def _special_tokens(opened: ModelFolder) -> dict[str, Any]:
    """Returns the ids of the special tokens, as config.json has them."""
    return hf_config_writer.SPECIAL_TOKEN_IDS | _ids_json(opened)


def _generation_config(opened: ModelFolder) -> dict[str, Any] | None:
    """Returns the generation_config.json to write; None if the model does not generate."""
    if isinstance(opened.config, DualEncoderConfig):
        return None
    fields = (generation_ids.completed(opened.path) or {}) | _special_tokens(opened)
    start = {"decoder_start_token_id": fields["bos_token_id"]} if opened.config.is_encoder_decoder else {}
    return start | fields


def _ids_json(opened: ModelFolder) -> dict[str, Any]:
    ids = generation_ids.read_with_tokenizer(opened.path)
    return generation_ids.to_json(ids._replace(decoder_start=None))


def _tokenizer_files(opened: ModelFolder) -> dict[str, Any]:
    """Returns tokenizer.json and tokenizer_config.json changed so that they add BOS if our generation adds one.

    Encoders that were trained here read no BOS, those of an import do; transformers 5 goes by the first file
    and earlier versions by the second. No file = nothing to change.
    """
    if isinstance(opened.config, DualEncoderConfig):
        return {}
    wanted = bos.is_read(opened)
    by_name = {file.name: file for file in opened.extra_files}
    changed = {}
    if bos.TOKENIZER_FILE in by_name:
        tokenizer = files.read_json_object(by_name[bos.TOKENIZER_FILE], fix=import_folder.DAMAGED_JSON)
        rewritten = bos.with_bos(tokenizer, added=wanted)
        # otherwise the file is copied as it is
        if bos.is_added(tokenizer) != wanted and rewritten != tokenizer:
            changed[bos.TOKENIZER_FILE] = rewritten
        # a file that is there comes before ours
        changed[bos.CONFIG_FILE] = _tokenizer_config(tokenizer, _ids_json(opened)) | {"add_bos_token": wanted}
    if bos.CONFIG_FILE in by_name:
        config = files.read_json_object(by_name[bos.CONFIG_FILE], fix=import_folder.DAMAGED_JSON)
        changed[bos.CONFIG_FILE] = config | {"add_bos_token": wanted}
    return changed


def _tokenizer_config(tokenizer: Mapping[str, Any], ids: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tokenizer_config.json of a tokenizer.json that has none beside it.

    Without one, transformers knows no token to pad with, and gives its models inputs that they do not take.
    """
    spelling = {token["id"]: token["content"] for token in tokenizer.get("added_tokens") or ()}
    tokens = {"unk_token": (tokenizer.get("model") or {}).get("unk_token")}
    for name in ("bos", "eos", "pad"):
        value = ids.get(f"{name}_token_id")
        tokens[f"{name}_token"] = spelling.get(value[0] if isinstance(value, list) else value)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        **{name: spelled for name, spelled in tokens.items() if spelled is not None},
    }


def _join_leaves(match: names.TensorMatch, leaves: Mapping[LeafKey, Leaf]) -> Tensor:
    parts = [leaves[key] for key in match.keys]
    return Tensor(match.shape, np.dtype(parts[0].dtype), lambda: match.axes.to_tensor([part.read() for part in parts]))
