"""Reads the architecture that a config.json of transformers describes; hf_config_writer.py is the inverse.

Both spellings are read: the one of released files (rope_theta, rope_local_base_freq, rope_scaling,
sliding_window_pattern) and that of transformers 5 (rope_parameters and layer_types by kind of layer); a field that is
absent has the default of its class there. Fields that do not change what we compute are ignored; a field that does
change it, with a value we cannot compute, is an error. Dropout, which changes only training, is reported in a note.

Source: transformers 5.23.0, models/*/configuration_*.py, and modeling_*.py for the use of the fields.

Known deviations: attn_logit_softcapping of Gemma 3 and T5Gemma 2 is ignored, as transformers ignores it, and so is
final_logit_softcapping of Gemma 3 with images. T5Gemma is read with encoder_window="each_side", as it was trained and
as transformers 4 runs it; transformers 5.8 to 5.23 runs it with one key more on each side. Images are read with
window=True, as trained; transformers does not bound an image by the window, which is the same where an image fits into
it. config.json has no field for either setting, so a model that was exported with another value is read with these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from t5g2.checkpoint import hf_names, names
from t5g2.checkpoint.hf_config_fields import (
    ACTIVATION,
    GEMMA2_DEFAULTS,
    GEMMA3_DEFAULTS,
    IMAGE_TOKENS,
    LAYER_KINDS,
    SIGLIP_TEXT_DEFAULTS,
    VISION_DEFAULTS,
    ConfigFields,
    with_index_names,
)
from t5g2.core.errors import UserError, unknown
from t5g2.models.config import (
    GEMMA3_PATTERN,
    DualEncoderConfig,
    EncoderDecoderConfig,
    ImageConfig,
    LayerKind,
    ModelConfig,
    Rope,
    SiglipTextConfig,
    TextConfig,
    VisionConfig,
)

GEMMA2_PATTERN: tuple[LayerKind, ...] = ("local", "global")


def read(data: Mapping[str, Any]) -> tuple[names.TensorFormat, ModelConfig]:
    """Returns (the format of the tensors beside a config.json, the architecture that it describes).

    Raises:
      UserError: an architecture, or a value of a field, that is not supported; two fields that contradict each other.
    """
    kind, data = data.get("model_type"), with_index_names(data)
    if kind in ("siglip_vision_model", "siglip_text_model"):
        raise UserError(
            f"config.json: model_type = {kind!r}, one tower of a model; supported are whole ones: SigLIP with both of "
            f"its towers (model_type 'siglip'), or a language model that holds a tower (gemma3, t5gemma2). An image "
            f"tower alone can be added to a language model: t5g2 adapt --vision=DIR"
        )
    _refuse_quantized(data)
    if not isinstance(kind, str) or kind not in READERS:
        raise unknown("model_type", str(kind), READERS, where="in config.json")
    tensor_format, reader = READERS[kind]
    return tensor_format, reader(data)


def read_tower(data: Mapping[str, Any]) -> VisionConfig:
    """Returns the architecture of an image tower alone (model_type siglip_vision_model).

    Raises:
      UserError: as read.
    """
    _refuse_quantized(data)
    return _vision(ConfigFields(data, VISION_DEFAULTS))


def dropout_notes(data: Mapping[str, Any]) -> list[str]:
    """Returns a sorted line for each field that asks for dropout, which training here does not have."""
    notes, nodes = [], [("", data)]
    while nodes:
        prefix, node = nodes.pop()
        for name, value in node.items():
            if isinstance(value, Mapping):
                nodes.append((f"{prefix}{name}.", value))
            elif "dropout" in name and value not in (None, 0):
                notes.append(f"config.json: {prefix}{name} = {value!r}; training here is without dropout")
    return sorted(notes)


def _refuse_quantized(data: Mapping[str, Any]) -> None:
    if data.get("quantization_config"):
        raise UserError(
            f"config.json: quantization_config = {data['quantization_config']!r}; weights in whole float32, bfloat16 "
            f"or float16 are supported. Give the model that was quantized"
        )


def _gemma2(data: Mapping[str, Any]) -> TextConfig:
    return replace(_gemma2_stack(ConfigFields(data, GEMMA2_DEFAULTS)), tied_head=_tied(data))


def _gemma3(data: Mapping[str, Any]) -> TextConfig:
    return replace(_gemma3_stack(ConfigFields(data, GEMMA3_DEFAULTS)), tied_head=_tied(data))


def _gemma3_images(data: Mapping[str, Any]) -> TextConfig:
    top = ConfigFields(data, IMAGE_TOKENS)
    stack = _gemma3_stack(top.child("text_config", GEMMA3_DEFAULTS))
    images = _images(top, top.number("image_token_index"))
    return replace(stack, tied_head=_tied(data), images=images, final_softcap=None)


def _t5gemma(data: Mapping[str, Any]) -> EncoderDecoderConfig:
    top = ConfigFields(data, {})
    encoder, decoder = (top.child(side, GEMMA2_DEFAULTS) for side in ("encoder", "decoder"))
    # both sides are complete configs: the papers adapt encoders and decoders of different sizes
    stacks = _gemma2_stack(encoder), _gemma2_stack(decoder)
    cross = decoder.data.get("cross_attention_hidden_size")
    if cross not in (None, stacks[0].width):
        raise UserError(
            f"config.json: decoder.cross_attention_hidden_size = {cross} and encoder.hidden_size = {stacks[0].width}; "
            f"cross-attention reads the encoder's states, so they must be equal"
        )
    return EncoderDecoderConfig(
        encoder=stacks[0],
        decoder=replace(stacks[1], tied_head=_tied(data)),
        cross="separate",
        tied_embedding=False,
        encoder_window="each_side",
    )


def _t5gemma2(data: Mapping[str, Any]) -> EncoderDecoderConfig:
    top = ConfigFields(data, {"image_token_index": 256_001})
    encoder_side = top.child("encoder", IMAGE_TOKENS)
    # the text config of the encoder is nested, the decoder's is not
    encoder = _gemma3_stack(encoder_side.child("text_config", GEMMA3_DEFAULTS))
    decoder = _gemma3_stack(top.child("decoder", GEMMA3_DEFAULTS))
    if encoder.vocab_size != decoder.vocab_size:
        raise UserError(
            f"config.json: encoder.text_config.vocab_size = {encoder.vocab_size} and decoder.vocab_size = "
            f"{decoder.vocab_size}; T5Gemma 2 has one vocabulary, so they must be equal"
        )
    eoi, top_eoi = encoder_side.number("eoi_token_index"), data.get("eoi_token_index")
    if top_eoi not in (None, eoi):
        raise UserError(
            f"config.json: eoi_token_index = {top_eoi} and encoder.eoi_token_index = {eoi}; they are one token, so "
            f"they must be equal"
        )
    # the token at the top counts: transformers overwrites the encoder's with it
    images = _images(encoder_side, top.number("image_token_index")) if _has_tower(encoder_side) else None
    return EncoderDecoderConfig(
        encoder=replace(encoder, images=images),
        decoder=replace(decoder, tied_head=_tied(data)),
        tied_embedding=_tied(data),
        eoi_id=None if eoi < 0 else eoi,
    )


def _siglip(data: Mapping[str, Any]) -> DualEncoderConfig:
    top = ConfigFields(data, {})
    vision = _vision(top.child("vision_config", VISION_DEFAULTS))
    text = top.child("text_config", SIGLIP_TEXT_DEFAULTS)
    text.require("hidden_act", ACTIVATION)
    return DualEncoderConfig(
        vision=vision,
        text=SiglipTextConfig(
            vocab_size=text.number("vocab_size"),
            length=text.number("max_position_embeddings"),
            width=text.number("hidden_size"),
            layers=text.number("num_hidden_layers"),
            mlp_width=text.number("intermediate_size"),
            heads=text.number("num_attention_heads"),
            projection=text.number("hidden_size" if text.value("projection_size") is None else "projection_size"),
            norm_eps=text.number("layer_norm_eps", float),
        ),
    )


def _tied(data: Mapping[str, Any]) -> bool:
    """Returns the outermost tie_word_embeddings, the only one that transformers uses too; True where it is absent."""
    name = "tie_word_embeddings"
    return True if data.get(name) is None else ConfigFields(data, {}).boolean(name)


def _gemma2_stack(fields: ConfigFields) -> TextConfig:
    rope = _rope(fields, fields.data.get("rope_parameters"), fields.data.get("rope_scaling"), "rope_theta")
    return replace(
        _stack(fields, GEMMA2_PATTERN, {"local": rope, "global": rope}),
        qk_norm=False,
        attention_softcap=_softcap(fields, "attn_logit_softcapping"),
    )


def _gemma3_stack(fields: ConfigFields) -> TextConfig:
    parameters = fields.data.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or (parameters and not set(parameters) & set(LAYER_KINDS)):
        raise fields.unsupported("rope_parameters", "an object for each kind of layer: " + ", ".join(LAYER_KINDS))
    scaling = fields.data.get("rope_scaling")
    ropes: dict[LayerKind, Rope] = {
        "local": _rope(fields, parameters.get("sliding_attention"), None, "rope_local_base_freq"),
        "global": _rope(fields, parameters.get("full_attention"), scaling, "rope_theta"),
    }
    # a period is the number of layers from one global layer to the next; released files have one of two names for it
    period = fields.data.get("sliding_window_pattern", fields.data.get("_sliding_window_pattern"))
    if period is not None and (type(period) is not int or not 1 <= period <= 1000):
        raise UserError(
            f"config.json: {fields.prefix}sliding_window_pattern = {period!r}; supported: a whole number from 1 to 1000"
        )
    # the global layer is the last of each period, as in transformers
    local: tuple[LayerKind, ...] = ("local",)
    pattern = GEMMA3_PATTERN if period is None else (*local * (period - 1), "global")
    return _stack(fields, pattern, ropes)


def _stack(fields: ConfigFields, pattern: Sequence[LayerKind], ropes: Mapping[LayerKind, Rope]) -> TextConfig:
    fields.require("hidden_activation", ACTIVATION)
    fields.require("attention_bias", False, None)
    if fields.value("use_bidirectional_attention"):
        raise fields.unsupported(
            "use_bidirectional_attention",
            "False; an encoder without a decoder, such as EmbeddingGemma, is no model here, so give a causal one",
        )
    scalar, head_size = fields.number("query_pre_attn_scalar", float), fields.number("head_dim")
    layers = fields.number("num_hidden_layers")
    return TextConfig(
        vocab_size=fields.number("vocab_size"),
        width=fields.number("hidden_size"),
        layers=layers,
        mlp_width=fields.number("intermediate_size"),
        heads=fields.number("num_attention_heads"),
        kv_heads=fields.number("num_key_value_heads"),
        head_size=head_size,
        window=fields.number("sliding_window"),
        pattern=_pattern(fields, layers, tuple(pattern)),
        rope_local=ropes["local"],
        rope_global=ropes["global"],
        # None, the default, follows the head size, so that equal models have equal configs
        query_scalar=None if scalar == head_size else scalar,
        final_softcap=_softcap(fields, "final_logit_softcapping"),
        norm_eps=fields.number("rms_norm_eps", float),
    )


def _pattern(fields: ConfigFields, layers: int, default: tuple[LayerKind, ...]) -> tuple[LayerKind, ...]:
    """Returns the shortest pattern that gives the layer_types: the default one if it does, or if there are none."""
    types = fields.data.get("layer_types")
    if types is None:
        return default
    is_known = isinstance(types, list | tuple) and all(isinstance(kind, str) and kind in LAYER_KINDS for kind in types)
    if not is_known or len(types) != layers:
        raise fields.unsupported("layer_types", f"{layers} (num_hidden_layers) of {' and '.join(LAYER_KINDS)}")
    kinds = tuple(LAYER_KINDS[name] for name in types)
    # the shortest pattern lets the most layers share one compiled block
    patterns = [default, *(kinds[:period] for period in range(1, layers + 1))]
    # files may hold both; if they disagree, versions of transformers would run different models
    has_period = "sliding_window_pattern" in fields.data
    if has_period and kinds != tuple(default[layer % len(default)] for layer in range(layers)):
        raise UserError(
            f"config.json: {fields.prefix}layer_types = {list(types)} and sliding_window_pattern = "
            f"{fields.value('sliding_window_pattern')}, which gives other layers full attention; remove one of them"
        )
    return next(p for p in patterns if kinds == tuple(p[layer % len(p)] for layer in range(layers)))


def _rope(fields: ConfigFields, newer: Any, scaling: Any, theta: str) -> Rope:
    """Returns the rotary embedding of one kind of layer.

    Args:
      newer: entry of rope_parameters for this kind of layer; None = the file has none.
      scaling: the rope_scaling of older files.
      theta: name of the older field that holds the base.
    """
    for node in (scaling, newer):
        if node is not None and not isinstance(node, Mapping):
            raise UserError(f"config.json: {fields.prefix}rope_parameters or rope_scaling = {node!r}; give an object")
    # if a file holds both, the newer field counts
    parameters = {**(scaling or {}), **(newer or {})}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear") or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"config.json: {fields.prefix}rope_parameters or rope_scaling = {parameters}; supported: rope_type "
            f"'default' and 'linear', over the whole head"
        )
    if kind == "default" and parameters.get("factor", 1.0) != 1.0:
        raise UserError(
            f"config.json: {fields.prefix}rope_parameters or rope_scaling = {parameters}: rope_type 'default' has no "
            f"factor; set rope_type 'linear', or remove the factor"
        )
    # a wrong base gives plausible but bad outputs, so a contradiction is an error
    base = parameters.get("rope_theta", fields.value(theta))
    if theta in fields.data and fields.data[theta] != base:
        raise UserError(
            f"config.json: {fields.prefix}{theta} = {fields.data[theta]} and in rope_parameters {base}; they are the "
            f"same number, so remove one of them"
        )
    numbers = ConfigFields({"rope_theta": base, "factor": parameters.get("factor", 1.0)}, {}, fields.prefix)
    return Rope(numbers.number("rope_theta", float), numbers.number("factor", float) if kind == "linear" else 1.0)


def _softcap(fields: ConfigFields, name: str) -> float | None:
    return None if fields.value(name) is None else fields.number(name, float)


def _has_tower(fields: ConfigFields) -> bool:
    """True if there is an image tower; transformers' T5Gemma 2 always has one, without layers where there is none."""
    return fields.child("vision_config", VISION_DEFAULTS).value("num_hidden_layers") != 0


def _images(fields: ConfigFields, token: int) -> ImageConfig:
    vision = fields.child("vision_config", VISION_DEFAULTS)
    return ImageConfig(
        # Gemma reads the patches, so a pooling head, which transformers' default has, is never used
        vision=replace(_vision(vision), pool=False),
        token=token,
        begin=fields.number("boi_token_index"),
        end=fields.number("eoi_token_index"),
        tokens=fields.number("mm_tokens_per_image"),
    )


def _vision(fields: ConfigFields) -> VisionConfig:
    fields.require("hidden_act", ACTIVATION)
    fields.require("num_channels", 3)
    return VisionConfig(
        width=fields.number("hidden_size"),
        layers=fields.number("num_hidden_layers"),
        mlp_width=fields.number("intermediate_size"),
        heads=fields.number("num_attention_heads"),
        image_size=fields.number("image_size"),
        patch_size=fields.number("patch_size"),
        norm_eps=fields.number("layer_norm_eps", float),
        pool=fields.boolean("vision_use_head"),
    )


READERS = {
    "gemma2": (hf_names.GEMMA, _gemma2),
    "gemma3_text": (hf_names.GEMMA, _gemma3),
    "gemma3": (hf_names.GEMMA3_IMAGES, _gemma3_images),
    "t5gemma": (hf_names.T5GEMMA, _t5gemma),
    "t5gemma2": (hf_names.T5GEMMA2, _t5gemma2),
    "siglip": (hf_names.SIGLIP, _siglip),
}
