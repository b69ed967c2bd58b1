"""config.json: released files give the released sizes, and back; what cannot be computed is an error."""

import dataclasses
import json

import pytest

from t5g2.checkpoint import hf_config_reader, hf_config_writer
from t5g2.core.errors import UserError
from t5g2.models import config as configs
from t5g2.models.config import GEMMA3_PATTERN, Rope
from t5g2.models.sizes import SIZES, size
from tests import tiny

CONFIGS = {name: c for name, c in vars(tiny).items() if isinstance(c, tuple(configs.KINDS.values()))} | SIZES


def written(config):
    return json.loads(json.dumps(hf_config_writer.write(config, dtype="bfloat16")[1]))


def read(data):
    return hf_config_reader.read(data)[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(name):
    layout, data = hf_config_writer.write(CONFIGS[name], dtype="bfloat16")
    assert hf_config_reader.read(json.loads(json.dumps(data))) == (layout, CONFIGS[name])
    assert data["dtype"] == "bfloat16"


# ---- what files on the hub say, by the fields that count ----
SO400M = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}
GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.4",
    "use_cache": True,
    "vocab_size": 256000,
}
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
GEMMA3_270M = GEMMA3_1B | {
    "_sliding_window_pattern": 6,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "num_hidden_layers": 18,
    "use_bidirectional_attention": False,
}
GEMMA3_4B = {  # leaves most of its fields to the defaults
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": SO400M,
}
GEMMA3_27B = GEMMA3_4B | {
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
T5GEMMA_SIDE = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "layer_types": ["sliding_attention", "full_attention"] * 6,
    "model_type": "t5_gemma_module",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "num_key_value_heads": 12,
    "query_pre_attn_scalar": 64,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
T5GEMMA_BASE = {
    "architectures": ["T5GemmaForConditionalGeneration"],
    "decoder": T5GEMMA_SIDE | {"cross_attention_hidden_size": 768, "is_decoder": True},
    "encoder": T5GEMMA_SIDE,
    "is_encoder_decoder": True,
    "model_type": "t5gemma",
    "vocab_size": 256000,
}
T5GEMMA2_SIDE = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rope_parameters": {
        "full_attention": {"factor": 8.0, "rope_theta": 1000000, "rope_type": "linear"},
        "sliding_attention": {"rope_theta": 10000, "rope_type": "default"},
    },
    "sliding_window": 512,
    "vocab_size": 262144,
}
T5GEMMA2_270M = {
    "architectures": ["T5Gemma2ForConditionalGeneration"],
    "decoder": T5GEMMA2_SIDE | {"model_type": "t5gemma2_decoder"},
    "dtype": "bfloat16",
    "encoder": {
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,  # not what counts
        "mm_tokens_per_image": 256,
        "model_type": "t5gemma2_encoder",
        "text_config": T5GEMMA2_SIDE | {"model_type": "t5gemma2_text"},
        "vision_config": SO400M,
    },
    "eoi_token_index": 256000,
    "image_token_index": 256001,
    "model_type": "t5gemma2",
}
MEDSIGLIP = {
    "architectures": ["SiglipModel"],
    "model_type": "siglip",
    "text_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_text_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
    },
    "vision_config": {k: v for k, v in SO400M.items() if k != "vision_use_head"} | {"image_size": 448},
}
RELEASED = {
    "gemma2:2b": GEMMA2_2B,
    "gemma3:270m": GEMMA3_270M,
    "gemma3:1b": GEMMA3_1B,
    "gemma3:4b": GEMMA3_4B,
    "gemma3:27b": GEMMA3_27B,
    "t5gemma:b-b": T5GEMMA_BASE,
    "t5gemma2:270m-270m": T5GEMMA2_270M,
    "medsiglip:448": MEDSIGLIP,
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_files(name):
    assert read(RELEASED[name]) == size(name)


def test_an_empty_file_has_the_defaults_of_its_class():
    assert read({"model_type": "gemma2"}) == size("gemma2:2b")
    default = read({"model_type": "gemma3_text"})
    assert (default.vocab_size, default.window, default.pattern) == (262_208, 4096, GEMMA3_PATTERN)


def test_patterns():
    three = GEMMA3_1B | {"num_hidden_layers": 4, "sliding_window_pattern": 2}
    assert read(three).pattern == ("local", "global")
    odd = {**three, "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"]}
    del odd["sliding_window_pattern"]
    assert read(odd).pattern == ("global", "global", "local")
    short = GEMMA3_270M | {"num_hidden_layers": 2, "layer_types": ["sliding_attention"] * 2}
    assert read(short).pattern == GEMMA3_PATTERN  # as it would be with more layers


def test_a_softcap_that_transformers_ignores_is_ignored():
    assert read(GEMMA3_1B | {"attn_logit_softcapping": 50.0}) == size("gemma3:1b")
    assert read(GEMMA3_1B | {"final_logit_softcapping": 30.0}).final_softcap == 30.0
    assert read(changed(GEMMA3_4B, "text_config.final_logit_softcapping", 30.0)) == size("gemma3:4b")


def test_an_older_name_of_the_kind_of_scaling():
    assert read(GEMMA3_1B | {"rope_scaling": {"factor": 8.0, "type": "linear"}}).rope_global == Rope(1e6, factor=8.0)


def test_untied():
    assert not read(GEMMA3_1B | {"tie_word_embeddings": False}).tied_head
    two = read(T5GEMMA2_270M | {"tie_word_embeddings": False})
    assert (two.tied_embedding, two.decoder.tied_head) == (False, False)
    assert read(T5GEMMA2_270M | {"tie_word_embeddings": None}) == size("t5gemma2:270m-270m")


def changed(data, path, value):
    """A copy of the data with one field, "a.b.c", changed."""
    head, _, rest = path.partition(".")
    return data | {head: changed(data[head], rest, value) if rest else value}


WRONG = [
    (
        GEMMA3_1B,
        "model_type",
        "llama",
        r"unknown model_type 'llama' in config.json. Allowed: gemma2, gemma3, gemma3_text",
    ),
    (GEMMA3_1B, "model_type", "gemma3n", r"unknown model_type 'gemma3n' in config.json; did you mean 'gemma3'"),
    (GEMMA3_1B, "model_type", None, r"unknown model_type 'None' in config.json"),
    (
        MEDSIGLIP,
        "model_type",
        "siglip_vision_model",
        r"'siglip_vision_model', one tower of a model; supported are whole",
    ),
    (GEMMA3_1B, "quantization_config", {"bits": 4}, r"quantization_config = {'bits': 4}; weights in whole float32, b"),
    (GEMMA3_1B, "hidden_size", "1152", r"config.json: hidden_size = '1152'; supported: a whole number"),
    (GEMMA3_1B, "num_hidden_layers", 26.5, r"num_hidden_layers = 26.5; supported: a whole number"),
    (GEMMA3_1B, "head_dim", None, r"head_dim = None; supported: a whole number"),
    (GEMMA3_1B, "rms_norm_eps", "small", r"rms_norm_eps = 'small'; supported: a number"),
    (GEMMA3_1B, "hidden_activation", "silu", r"hidden_activation = 'silu'; supported: 'gelu_pytorch_tanh'"),
    (GEMMA3_1B, "attention_bias", True, r"attention_bias = True; supported: False"),
    (GEMMA3_1B, "use_bidirectional_attention", True, r"use_bidirectional_attention = True; supported: False"),
    (
        GEMMA3_1B,
        "rope_scaling",
        {"rope_type": "yarn", "factor": 4.0},
        r"'yarn'.*supported: rope_type 'default' and 'lin",
    ),
    (GEMMA3_1B, "rope_scaling", {"factor": 8.0}, r"'factor': 8.0.*rope_type 'default' has no factor; set rope_type"),
    (GEMMA2_2B, "rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4}, r"'dynamic'.*supported: rope_type"),
    (GEMMA3_1B, "rope_parameters", {"rope_type": "linear"}, r"rope_parameters = .*an object for each kind of layer"),
    (
        GEMMA3_1B,
        "rope_parameters",
        {"full_attention": {"rope_type": "default", "rope_theta": 5e5}},
        r"rope_theta = 1000000 and in rope_parameters 500000.0; they are the same number, so remove one",
    ),
    (
        GEMMA3_270M,
        "layer_types",
        ["full_attention"] * 3,
        r"layer_types = .*; supported: 18 \(num_hidden_layers\) of sl",
    ),
    (
        GEMMA3_270M,
        "layer_types",
        ["chunked_attention"] * 18,
        r"supported: 18 .* of sliding_attention and full_attention",
    ),
    (GEMMA3_270M, "layer_types", ["full_attention"] * 18, r"layer_types = .* and sliding_window_pattern = 6, which"),
    (GEMMA3_4B, "text_config", None, r"text_config = None; it must be an object that holds a config"),
    (GEMMA3_4B, "text_config.attention_bias", True, r"text_config.attention_bias = True; supported: False"),
    (GEMMA3_4B, "vision_config.vision_use_head", 1, r"vision_config.vision_use_head = 1; supported: true or false"),
    (GEMMA3_4B, "image_token_id", 5, r"image_token_id = 5 and image_token_index = 262144; they are one field, so"),
    (T5GEMMA2_270M, "encoder.boi_token_id", 5, r"encoder.boi_token_id = 5 and encoder.boi_token_index = 255999"),
    (
        GEMMA3_4B,
        "vision_config.hidden_act",
        "relu",
        r"vision_config.hidden_act = 'relu'; supported: 'gelu_pytorch_tanh'",
    ),
    (GEMMA3_4B, "vision_config.num_channels", 1, r"vision_config.num_channels = 1; supported: 3"),
    (MEDSIGLIP, "text_config.hidden_act", "relu", r"text_config.hidden_act = 'relu'; supported: 'gelu_pytorch_tanh'"),
    (
        T5GEMMA_BASE,
        "decoder.cross_attention_hidden_size",
        512,
        r"decoder.cross_attention_hidden_size = 512 and encoder.hidden_size = 768",
    ),
    (
        T5GEMMA2_270M,
        "decoder.vocab_size",
        7,
        r"encoder.text_config.vocab_size = 262144 and decoder.vocab_size = 7; T5Gemma 2 has one vocabulary",
    ),
    (T5GEMMA2_270M, "eoi_token_index", 5, r"eoi_token_index = 5 and encoder.eoi_token_index = 256000"),
    (T5GEMMA2_270M, "decoder.hidden_size", 320, r"encoder width 640 and decoder width 320 differ"),
]


@pytest.mark.parametrize(("data", "path", "value", "message"), WRONG, ids=[f"{w[1]}={w[2]}"[:50] for w in WRONG])
def test_what_cannot_be_computed_is_an_error(data, path, value, message):
    with pytest.raises(UserError, match=message):
        read(changed(data, path, value))


def test_fields_that_change_nothing_are_passed_over():
    data = changed(T5GEMMA2_270M, "decoder.attention_dropout", 0.1) | {"quantum": 3, "dropout_rate": 0.1}
    assert read(data) == size("t5gemma2:270m-270m")


def test_a_pooling_head_that_gemma_does_not_use():
    assert read(changed(GEMMA3_4B, "vision_config.vision_use_head", True)) == size("gemma3:4b")


@pytest.mark.parametrize("data", [GEMMA3_4B, T5GEMMA2_270M])
def test_the_other_names_of_image_tokens(data):
    text = json.dumps(data).replace("_token_index", "_token_id")
    assert "_index" not in text
    assert read(json.loads(text)) == read(data)
    assert read(json.loads(text) | data) == read(data)


def test_t5gemma_is_read_as_it_was_trained():
    config = dataclasses.replace(tiny.T5GEMMA, encoder_window="each_side_inclusive")
    assert read(written(config)).encoder_window == "each_side"


def test_without_images_or_end_of_image_token():
    config = dataclasses.replace(tiny.T5GEMMA2, eoi_id=None)
    data = written(config)
    assert (data["eoi_token_index"], data["encoder"]["vision_config"]["num_hidden_layers"]) == (-1, 0)
    assert read(data) == config


def replaced(config, **changes):
    return dataclasses.replace(config, **changes)


def test_transformers_4_finds_the_rotary_embedding_too():
    """It knows neither rope_parameters nor an error: it would run with its defaults."""
    text = written(size("gemma3:4b"))["text_config"]
    assert (text["rope_theta"], text["rope_local_base_freq"]) == (1e6, 1e4)
    assert text["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert written(size("gemma2:2b"))["rope_theta"] == 1e4


INEXPRESSIBLE = [
    (replaced(tiny.T5GEMMA2, cross_layers="global"), r"T5Gemma 2 .* not have cross_layers = 'global' \(it has 'all'\)"),
    (replaced(tiny.T5GEMMA, cross_layers="global"), r"T5Gemma \(.* not have cross_layers = 'global' \(it has 'all'\)"),
    (replaced(tiny.T5GEMMA2, tied_embedding=False), r"decoder.tied_head = True \(it has False\)"),
    (replaced(tiny.T5GEMMA2, encoder_window="each_side"), r"encoder_window = 'each_side' \(it has 'around'\)"),
    (replaced(tiny.T5GEMMA2_IMAGES, eoi_id=9), r"encoder.images.end = 7 \(it has 9\)"),
    (replaced(tiny.T5GEMMA, encoder_window="around"), r"encoder_window = 'around' \(it has 'each_side'\)"),
    (
        replaced(tiny.T5GEMMA2, encoder_attention="causal"),
        r"T5Gemma 2 .* encoder_attention = 'causal' \(it has 'bidirectional'\)",
    ),
    (
        replaced(tiny.T5GEMMA, encoder_attention="causal"),
        r"T5Gemma \(.* encoder_attention = 'causal' \(it has 'bidirec",
    ),
    (replaced(tiny.T5GEMMA, eoi_id=3), r"eoi_id = 3 \(it has None\)"),
    (replaced(tiny.GEMMA2, rope_local=Rope(7.0)), r"Gemma 2 .*rope_local = Rope\(base=7.0, factor=1.0\) \(it has Rope"),
    (replaced(tiny.GEMMA2, images=tiny.IMAGES), r"Gemma 2 .*images = ImageConfig.* \(it has None\)"),
    (replaced(tiny.GEMMA3, attention_softcap=5.0), r"Gemma 3 .*attention_softcap = 5.0 \(it has None\)"),
    (replaced(tiny.GEMMA3_IMAGES, final_softcap=3.0), r"Gemma 3 with images.*final_softcap = 3.0 \(it has None\)"),
    (replaced(tiny.GEMMA3, query_scalar=12.5), r"query_scalar = 12.5 \(it has 12\)"),
    (replaced(tiny.GEMMA3, width=30), r"width = 30 \(it has 32\)"),
    (
        replaced(tiny.T5GEMMA2, decoder=replaced(tiny.GEMMA3, qk_norm=False, attention_softcap=5.0)),
        r"decoder.qk_norm = False \(it has True\), decoder.attention_softcap = 5.0 \(it has None\)",
    ),
]


@pytest.mark.parametrize(("config", "message"), INEXPRESSIBLE, ids=[m[:40] for _, m in INEXPRESSIBLE])
def test_what_transformers_cannot_express_is_an_error(config, message):
    with pytest.raises(UserError, match=rf"transformers cannot express this model: .*{message}"):
        hf_config_writer.write(config, dtype="float32")
