"""GGUF files of Gemma 2 and Gemma 3: their architecture, tensors and tokenizer, in the terms of a Hugging Face folder.

A file is read by the library gguf. Weights are dequantised one tensor at a time, when they are read; norms hold
1 + scale, from which 1 is taken. The metadata lacks some fields of a config.json, for which those of the releases are
taken, as llama.cpp does (ASSUMED).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from t5g2.checkpoint.gguf_tokenizer import tokenizer_json
from t5g2.checkpoint.tensor import Tensor
from t5g2.core.errors import UserError, unknown
from t5g2.core.optional import require

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# fields of a config.json that a file does not have, by architecture
ASSUMED = {
    "gemma3": {"rope_local_base_freq": 10_000.0, "sliding_window_pattern": 6},
    "gemma2": {"rope_theta": 10_000.0, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
}
MODEL_TYPES = {"gemma3": "gemma3_text", "gemma2": "gemma2"}
# of the 27b sizes, whose queries are scaled by width / heads and not by the head size (llama.cpp, LLM_TYPE_27B)
LAYERS_OF_27B = {"gemma3": 62, "gemma2": 46}
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class StoredTensor(NamedTuple):
    """A tensor of a file: its type by the name of the library, its shape, and the place of its bytes."""

    type: str
    shape: tuple[int, ...]
    offset: int
    size: int


class Description(NamedTuple):
    """Contents of a file beside its weights.

    Attributes:
      config, generation, tokenizer: as config.json, generation_config.json and tokenizer.json have it.
      tensors: the stored tensors by the names of a Hugging Face folder.
      notes: what was assumed, and how the weights are quantised.
    """

    config: dict[str, Any]
    generation: dict[str, Any]
    tokenizer: dict[str, Any]
    tensors: dict[str, StoredTensor]
    notes: list[str]


def describe(path: Path) -> Description:
    """Reads all of a file but its weights.

    Raises:
      UserError: the library is not installed; the file is damaged, cut short, one part of several, or of another
        architecture; a tensor is not one of the architecture's, or its type is one that the library cannot dequantise.
    """
    library = require("gguf", "gguf")
    try:
        reader = library.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is no whole GGUF file ({error}); download it again") from None
    field = _fields(path, reader)
    architecture = field("general.architecture")
    if architecture not in MODEL_TYPES:
        raise unknown("architecture", str(architecture), MODEL_TYPES, where=f"of {path}")
    if (field("split.count") or 1) > 1:
        raise UserError(f"{path} is one of {field('split.count')} parts; merge them first: llama-gguf-split --merge")
    tensors = {}
    for stored in reader.tensors:
        name, kind = _name(path, stored.name), stored.tensor_type.name
        if stored.data_offset + stored.n_bytes > path.stat().st_size:
            raise UserError(f"{path} ends within the tensor {stored.name}; download it again")
        _check_type(library, path, stored)
        tensors[name] = StoredTensor(
            kind, tuple(reversed(stored.shape.tolist())), int(stored.data_offset), int(stored.n_bytes)
        )
    if "model.embed_tokens.weight" not in tensors:
        raise UserError(f"{path} has no tensor token_embd.weight; download it again")
    config, assumed = _config(architecture, field, tensors)
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    special = {name: field(f"tokenizer.ggml.{key}_token_id") for name, key in ids.items()}
    special = {name: value for name, value in special.items() if value is not None}
    types = Counter(tensor.type for tensor in tensors.values() if tensor.type not in FLOATS)
    counts = ", ".join(f"{number} tensors are {kind}" for kind, number in types.most_common())
    notes = [
        *([f"weights were quantised: {counts}, of {len(tensors)}"] if types else []),
        *(f"not in the file, and assumed: {name} = {value}" for name, value in assumed.items()),
    ]
    tokenizer = tokenizer_json(path, field, adds_bos=field("tokenizer.ggml.add_bos_token") is not False)
    return Description(config | special, special, tokenizer, tensors, notes)


def read_tensors(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Returns the tensors of a file, none of them read yet.

    All are float32; or bfloat16 where all matrices are, whose norms are 1 + a bfloat16.
    """
    kinds = {stored.type for stored in tensors.values() if len(stored.shape) > 1}
    dtype = FLOATS["BF16" if kinds == {"BF16"} else "F32"]
    return {name: _tensor(path, name, stored, dtype) for name, stored in tensors.items()}


def _tensor(path: Path, name: str, stored: StoredTensor, dtype: np.dtype) -> Tensor:
    is_norm = "norm" in name

    def read() -> np.ndarray:
        data = np.fromfile(path, np.uint8, count=stored.size, offset=stored.offset)
        if data.size < stored.size:
            raise UserError(f"{path} ends within the tensor {name}; download it again")
        if stored.type in FLOATS:
            values = data.view(FLOATS[stored.type]).reshape(stored.shape)
        else:
            library = require("gguf", "gguf")
            kind = library.GGMLQuantizationType[stored.type]
            rows = data.reshape(*stored.shape[:-1], -1)
            values = library.quants.dequantize(rows, kind).reshape(stored.shape)
        return (values.astype(np.float32) - np.float32(1) if is_norm else values).astype(dtype)

    return Tensor(stored.shape, dtype, read)


def _fields(path: Path, reader: Any) -> Callable[[str], Any]:
    """Returns a function that returns the value of a field of the metadata, None if there is none."""

    def field(name: str) -> Any:
        stored = reader.get_field(name)
        if stored is None:
            return None
        try:
            return stored.contents()
        except (UnicodeDecodeError, ValueError, IndexError) as error:
            raise UserError(f"{path}: its field {name} is damaged ({error}); download it again") from None

    return field


def _name(path: Path, stored: str) -> str:
    """Returns the name of a tensor in a Hugging Face folder."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", stored)
    if layer and layer[2] in NAMES:
        return f"model.layers.{layer[1]}.{NAMES[layer[2]]}.weight"
    outer = stored.removesuffix(".weight")
    if outer in OUTER and stored != outer:
        return f"{OUTER[outer]}.weight"
    raise UserError(f"{path} has the tensor {stored}, which Gemma 2 and Gemma 3 do not have; give one of these")


def _check_type(library: Any, path: Path, stored: Any) -> None:
    if stored.tensor_type.name in FLOATS:
        return
    _, block_bytes = library.GGML_QUANT_SIZES[stored.tensor_type]
    try:
        library.quants.dequantize(np.zeros((1, block_bytes), np.uint8), stored.tensor_type)
    except NotImplementedError:
        raise UserError(
            f"{path}: the tensor {stored.name} is of type {stored.tensor_type.name}, which "
            f"the library gguf cannot dequantise; give a file of another quantisation, such as Q8_0"
        ) from None


def _config(
    architecture: str, field: Callable[[str], Any], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns config.json, and the fields of it that the file does not have."""

    def value(name: str) -> Any:
        return field(f"{architecture}.{name}")

    heads, width, layers = value("attention.head_count"), value("embedding_length"), value("block_count")
    stored = {
        "hidden_size": width,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv"),
        "head_dim": value("attention.key_length"),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": _shortest(value("attention.layer_norm_rms_epsilon")),
        "sliding_window": value("attention.sliding_window"),
        "rope_theta": value("rope.freq_base"),
        "rope_local_base_freq": value("rope.freq_base_swa"),
        "sliding_window_pattern": value("attention.sliding_window_pattern"),
        "attn_logit_softcapping": value("attn_logit_softcapping"),
        "final_logit_softcapping": value("final_logit_softcapping"),
    }
    missing = [name for name in list(stored)[:9] if stored[name] is None]
    if missing:
        raise UserError(f"its metadata has no {', '.join(missing)}; download another file")
    assumed = {name: default for name, default in ASSUMED[architecture].items() if stored.get(name) is None}
    is_27b = layers == LAYERS_OF_27B[architecture]
    assumed["query_pre_attn_scalar"] = width // heads if is_27b else stored["head_dim"]
    known = {name: number for name, number in stored.items() if number is not None}
    factor, scaling = value("rope.scaling.factor"), {}
    if factor is not None and value("rope.scaling.type") == "linear":
        scaling = {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    fixed = {
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    return fixed | assumed | known | scaling, assumed


def _shortest(number: float | None) -> float | None:
    """Returns the shortest decimal number that is this float32: 1e-6, not 9.999999974752427e-07."""
    return None if number is None or not math.isfinite(number) else float(str(np.float32(number)))
