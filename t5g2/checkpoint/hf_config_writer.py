"""Writes the config.json with which transformers builds the same model, for every architecture that it supports.

Source: transformers 5.23.0, models/*/configuration_*.py. hf_config_reader.py is the inverse, and lists the
settings that have no field.
"""

from collections.abc import Sequence
from typing import Any

from t5g2.checkpoint import hf_names, names
from t5g2.checkpoint.hf_config_fields import ACTIVATION, LAYER_TYPES
from t5g2.core.errors import UserError
from t5g2.models.config import (
    DualEncoderConfig,
    EncoderDecoderConfig,
    ImageConfig,
    ModelConfig,
    Rope,
    TextConfig,
    VisionConfig,
)

SPECIAL_TOKEN_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
# transformers' T5Gemma 2 always has an image tower: no images are written as these sizes with num_hidden_layers = 0
EMPTY_TOWER = VisionConfig(width=1, layers=1, mlp_width=1, heads=1, image_size=1, patch_size=1)
Requirement = tuple[str, Any, Any]  # a setting, its value here, the value that an architecture of transformers needs
FormatAndConfig = tuple[names.TensorFormat, dict[str, Any]]  # the tensors' format, the content of config.json


def write(config: ModelConfig, *, dtype: str, special_tokens: dict[str, Any] = SPECIAL_TOKEN_IDS) -> FormatAndConfig:
    """Returns (the format of the model's tensors in transformers, its config.json).

    Args:
      dtype: dtype of the weights: "bfloat16".
      special_tokens: ids by name, as in generation_config.json.

    Raises:
      UserError: transformers has no architecture with these settings; the message lists those that do not fit.
    """
    if isinstance(config, DualEncoderConfig):
        tensor_format, data = _siglip(config)
    elif config.probe is not None:
        raise UserError(
            "the model has a probe, for which transformers' classes have no place; export the model that it was "
            "trained from, or keep this one as a model folder"
        )
    elif isinstance(config, TextConfig):
        tensor_format, data = _gemma(config, special_tokens)
    elif config.cross == "separate":
        tensor_format, data = _t5gemma(config, special_tokens)
    else:
        tensor_format, data = _t5gemma2(config, special_tokens)
    return tensor_format, data | {"dtype": dtype}


def deviations(config: ModelConfig) -> list[str]:
    """Returns a line for each kind of input on which transformers, for lack of a setting, differs from the model."""
    notes = []
    if isinstance(config, EncoderDecoderConfig) and config.encoder_window == "each_side":
        notes.append(
            f"inputs longer than {config.encoder.window} tokens: the encoder's window was trained with "
            f"{config.encoder.window - 1} tokens on each side, transformers 5.8 to 5.23 takes {config.encoder.window}"
        )
    if isinstance(config, TextConfig) and config.images is not None:
        tokens, window = config.images.tokens, config.window
        if config.images.window and tokens > window:
            notes.append(f"an image of {tokens} tokens, which is bounded by the window of {window} here and not there")
    return notes


def empty_tower(width: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes, by name, of the tower of zeros that transformers' T5Gemma 2 has even without images.

    Args:
      width: D, the model's width.
    """
    vision, projector = "model.encoder.vision_tower.vision_model.", "model.encoder.multi_modal_projector."
    return {
        vision + "embeddings.patch_embedding.weight": (1, 3, 1, 1),
        vision + "embeddings.patch_embedding.bias": (1,),
        vision + "embeddings.position_embedding.weight": (1, 1),
        vision + "post_layernorm.weight": (1,),
        vision + "post_layernorm.bias": (1,),
        projector + "mm_input_projection_weight": (1, width),
        projector + "mm_soft_emb_norm.weight": (1,),
    }


def placeholders(tensor_format: names.TensorFormat, config: ModelConfig | None) -> dict[str, tuple[int, ...]]:
    """Returns the shapes, by name, of tensors that transformers' class needs although the model has no such weights.

    A T5Gemma 2 may have no images or no end-of-image token here; transformers' class always has both.
    """
    if tensor_format is not hf_names.T5GEMMA2 or not isinstance(config, EncoderDecoderConfig):
        return {}
    width = config.encoder.width
    tower = empty_tower(width) if config.encoder.images is None else {}
    sides = ("encoder",) if config.tied_embedding else ("encoder", "decoder")
    eoi = {f"model.{side}.embed_tokens.eoi_embedding": (width,) for side in sides} if config.eoi_id is None else {}
    return tower | eoi


def _gemma(config: TextConfig, special_tokens: dict[str, Any]) -> FormatAndConfig:
    tied = {"tie_word_embeddings": config.tied_head}
    if not config.qk_norm:
        _require("Gemma 2 (qk_norm = False)", [*_gemma2_requirements("", config), ("images", config.images, None)])
        return hf_names.GEMMA, _header("Gemma2ForCausalLM", "gemma2") | _stack(config) | tied | special_tokens
    _require("Gemma 3 (qk_norm = True)", _gemma3_requirements("", config))
    text = {"model_type": "gemma3_text"} | _stack(config) | tied | special_tokens
    if config.images is None:
        return hf_names.GEMMA, _header("Gemma3ForCausalLM", "gemma3_text") | text
    # transformers' class for images has no cap, whatever its config says
    _require("Gemma 3 with images", [("final_softcap", config.final_softcap, None)])
    images = _images(config.images) | {"image_token_index": config.images.token, "eoi_token_index": config.images.end}
    head = _header("Gemma3ForConditionalGeneration", "gemma3")
    return hf_names.GEMMA3_IMAGES, head | {"text_config": text} | images | tied | special_tokens


def _t5gemma(config: EncoderDecoderConfig, special_tokens: dict[str, Any]) -> FormatAndConfig:
    encoder, decoder = config.encoder, config.decoder
    # transformers' window is "each_side" to 5.0 and "each_side_inclusive" since 5.8: it has no setting for it
    window = "each_side" if config.encoder_window == "around" else config.encoder_window
    _require(
        "T5Gemma (cross = 'separate')",
        [
            *_gemma2_requirements("encoder.", encoder),
            *_gemma2_requirements("decoder.", decoder),
            ("cross_layers", config.cross_layers, "all"),
            ("tied_embedding", config.tied_embedding, False),
            ("eoi_id", config.eoi_id, None),
            ("encoder.images", encoder.images, None),
            ("encoder_window", config.encoder_window, window),
            ("encoder_attention", config.encoder_attention, "bidirectional"),
        ],
    )
    tied = {"tie_word_embeddings": decoder.tied_head}
    sides = {
        "encoder": {"model_type": "t5_gemma_module", "is_decoder": False} | _stack(encoder) | special_tokens,
        "decoder": {"model_type": "t5_gemma_module", "is_decoder": True}
        | {"cross_attention_hidden_size": encoder.width}
        | (_stack(decoder) | tied | special_tokens),
    }
    head = _header("T5GemmaForConditionalGeneration", "t5gemma") | {"is_encoder_decoder": True}
    return hf_names.T5GEMMA, head | sides | {"vocab_size": decoder.vocab_size} | tied | special_tokens


def _t5gemma2(config: EncoderDecoderConfig, special_tokens: dict[str, Any]) -> FormatAndConfig:
    encoder, decoder, images = config.encoder, config.decoder, config.encoder.images
    _require(
        "T5Gemma 2 (cross = 'merged')",
        [
            *_gemma3_requirements("encoder.", encoder),
            *_gemma3_requirements("decoder.", decoder),
            ("cross_layers", config.cross_layers, "all"),
            ("encoder_window", config.encoder_window, "around"),
            ("encoder_attention", config.encoder_attention, "bidirectional"),
            ("decoder.tied_head", decoder.tied_head, config.tied_embedding),
            ("encoder.vocab_size", encoder.vocab_size, decoder.vocab_size),
            *([] if images is None else [("encoder.images.end", images.end, config.eoi_id)]),
        ],
    )
    tied = {"tie_word_embeddings": decoder.tied_head}
    # -1 is no token, so transformers' vector for it is never used
    eoi = {"eoi_token_index": -1 if config.eoi_id is None else config.eoi_id}
    token = {"image_token_index": 256_001 if images is None else images.token}
    side = _no_images() if images is None else _images(images)
    text = {"model_type": "t5gemma2_text"} | _stack(encoder) | tied | special_tokens
    sides = {
        "encoder": {"model_type": "t5gemma2_encoder", "text_config": text} | side | eoi | token | tied,
        "decoder": {"model_type": "t5gemma2_decoder"} | _stack(decoder) | tied | special_tokens,
    }
    head = _header("T5Gemma2ForConditionalGeneration", "t5gemma2") | {"is_encoder_decoder": True}
    return hf_names.T5GEMMA2, head | sides | token | eoi | tied | special_tokens


def _siglip(config: DualEncoderConfig) -> FormatAndConfig:
    text = config.text
    text_config = {
        "model_type": "siglip_text_model",
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": text.mlp_width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "max_position_embeddings": text.length,
        "projection_size": text.projection,
        "hidden_act": ACTIVATION,
        "layer_norm_eps": text.norm_eps,
        "attention_dropout": 0.0,
        # of SigLIP's vocabulary: </s> ends a text and also fills it up
        "pad_token_id": 1,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    towers = {"text_config": text_config, "vision_config": _vision(config.vision)}
    return hf_names.SIGLIP, _header("SiglipModel", "siglip") | towers


def _header(architecture: str, model_type: str) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type}


def _stack(config: TextConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "query_pre_attn_scalar": int(config.query_scalar or config.head_size),
        "sliding_window": config.window,
        "layer_types": [LAYER_TYPES[config.kind(layer)] for layer in range(config.layers)],
        **_ropes(config),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
        "rms_norm_eps": config.norm_eps,
        "hidden_activation": ACTIVATION,
        "max_position_embeddings": config.context,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
    }


def _ropes(config: TextConfig) -> dict[str, Any]:
    """Returns rope_parameters, and the same in the fields of transformers 4, which would otherwise use its defaults."""
    global_rope = _rope(config.rope_global)
    older: dict[str, Any] = {"rope_theta": config.rope_global.base, "rope_scaling": None}
    if config.rope_global.factor != 1:
        older["rope_scaling"] = {"rope_type": "linear", "factor": config.rope_global.factor}
    if not config.qk_norm:  # Gemma 2 has one rotary embedding for all layers
        return {"rope_parameters": global_rope} | older
    older["rope_local_base_freq"] = config.rope_local.base
    return {
        "rope_parameters": {LAYER_TYPES["local"]: _rope(config.rope_local), LAYER_TYPES["global"]: global_rope}
    } | older


def _rope(rope: Rope) -> dict[str, Any]:
    if rope.factor == 1:
        return {"rope_type": "default", "rope_theta": rope.base}
    return {"rope_type": "linear", "rope_theta": rope.base, "factor": rope.factor}


def _images(images: ImageConfig) -> dict[str, Any]:
    return {
        "vision_config": _vision(images.vision),
        "mm_tokens_per_image": images.tokens,
        "boi_token_index": images.begin,
    }


def _no_images() -> dict[str, Any]:
    tower = _vision(EMPTY_TOWER) | {"num_hidden_layers": 0}
    return {"vision_config": tower, "mm_tokens_per_image": 1, "boi_token_index": 255_999}


def _vision(vision: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": ACTIVATION,
        "layer_norm_eps": vision.norm_eps,
        "attention_dropout": 0.0,
        "vision_use_head": vision.pool,
    }


def _gemma2_requirements(prefix: str, stack: TextConfig) -> list[Requirement]:
    return [
        (f"{prefix}qk_norm", stack.qk_norm, False),
        (f"{prefix}rope_local", stack.rope_local, stack.rope_global),
        *_stack_requirements(prefix, stack),
    ]


def _gemma3_requirements(prefix: str, stack: TextConfig) -> list[Requirement]:
    return [
        (f"{prefix}qk_norm", stack.qk_norm, True),
        (f"{prefix}attention_softcap", stack.attention_softcap, None),
        *_stack_requirements(prefix, stack),
    ]


def _stack_requirements(prefix: str, stack: TextConfig) -> list[Requirement]:
    # transformers declares the scalar as a whole number
    whole_scalar = None if stack.query_scalar is None else int(stack.query_scalar)
    return [
        (f"{prefix}query_scalar", stack.query_scalar, whole_scalar),
        # transformers requires a multiple of the number of heads, although the head size is a setting of its own
        (f"{prefix}width", stack.width, -(-stack.width // stack.heads) * stack.heads),
    ]


def _require(architecture: str, requirements: Sequence[Requirement]) -> None:
    """Raises UserError if a setting has another value than the architecture needs."""
    wrong = [f"{name} = {value!r} (it has {needed!r})" for name, value, needed in requirements if value != needed]
    if wrong:
        raise UserError(
            f"transformers cannot express this model: the nearest of its architectures is {architecture}, which does "
            f"not have {', '.join(wrong)}. A model folder keeps it; to export it, train it with settings that fit"
        )
