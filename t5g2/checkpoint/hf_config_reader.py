"""config.json of transformers and the architectures of ours that it describes, both ways.

Reading takes both spellings: the one of released files (rope_theta, rope_local_base_freq, rope_scaling,
sliding_window_pattern) and that of transformers 5 (rope_parameters and layer_types by kind of layer); a field that is
absent has the default of its class there. Writing uses both. Fields that change nothing we compute are passed
over; one that does, with a value we cannot compute, is an error. Dropout is told: it changes only training.

Source: transformers 5.23.0, models/*/configuration_*.py, and modeling_*.py for what is made of the fields.

Known deviations: attn_logit_softcapping of Gemma 3 and T5Gemma 2 is ignored, as transformers ignores it, and so is
final_logit_softcapping of Gemma 3 with images. T5Gemma is read with encoder_window="each_side", as it was trained and
as transformers 4 runs it; transformers 5.8 to 5.23 runs it with one key more on each side. Images are read with
window=True, as trained; transformers does not bound an image by the window, which is the same where an image fits into
it. Neither has a field, so what was exported with another value is read back with these.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from t5g2.checkpoint import names
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

LAYER_KINDS: dict[str, LayerKind] = {"sliding_attention": "local", "full_attention": "global"}
LAYER_TYPES = {kind: name for name, kind in LAYER_KINDS.items()}
ACTIVATION = "gelu_pytorch_tanh"
GEMMA2_PATTERN: tuple[LayerKind, ...] = ("local", "global")

# ---- what an absent field is ----
_TEXT = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "hidden_activation": ACTIVATION,
    "attention_bias": False,
    "use_bidirectional_attention": None,
}
GEMMA2_DEFAULTS = _TEXT | {
    "vocab_size": 256_000,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "rope_theta": 10_000.0,
}
GEMMA3_DEFAULTS = _TEXT | {
    "vocab_size": 262_208,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": ACTIVATION,
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}
SIGLIP_TEXT_DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": ACTIVATION,
    "layer_norm_eps": 1e-6,
    "projection_size": None,
}


@dataclass(frozen=True)
class ConfigFields:
    """One object of a config.json, and the values of the fields that it leaves out.

    Attributes:
      where: what stands before a field's name in a message: "encoder.text_config.".
    """

    data: Mapping[str, Any]
    defaults: Mapping[str, Any]
    prefix: str = ""

    def value(self, name: str) -> Any:
        """The field, or its default."""
        return self.data[name] if name in self.data else self.defaults[name]

    def number(self, name: str, kind: type = int) -> Any:
        """The field as a number; a whole one if kind is int.

        Raises:
          UserError: it is something else.
        """
        value = self.value(name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or kind(value) != value:
            raise self.unsupported(name, "a whole number" if kind is int else "a number")
        return kind(value)

    def boolean(self, name: str) -> bool:
        """The field, true or false.

        Raises:
          UserError: it is something else, such as the text "false".
        """
        value = self.value(name)
        if not isinstance(value, bool):
            raise self.unsupported(name, "true or false")
        return value

    def child(self, name: str, defaults: Mapping[str, Any]) -> "ConfigFields":
        """The object in a field.

        Raises:
          UserError: it is absent or something else.
        """
        node = self.data.get(name)
        if not isinstance(node, Mapping):
            raise UserError(f"config.json: {self.prefix}{name} = {node!r}; it must be an object that holds a config")
        return ConfigFields(node, defaults, f"{self.prefix}{name}.")

    def require(self, name: str, *allowed: Any) -> None:
        """Raises UserError if the field has another value than the allowed ones."""
        if name in self.defaults and self.value(name) not in allowed:
            raise self.unsupported(name, f"{allowed[0]!r}; nothing else is computed here")

    def unsupported(self, name: str, allowed: str) -> UserError:
        """An error: a field has a value that is none of the allowed ones."""
        return UserError(f"config.json: {self.prefix}{name} = {self.value(name)!r}; supported: {allowed}")


# ---- reading ----
def read(data: Mapping[str, Any]) -> tuple[names.TensorFormat, ModelConfig]:
    """The layout of the tensors beside a config.json, and the architecture of ours that it describes.

    Raises:
      UserError: an architecture, or a value of a field, that is not supported; two fields that contradict each other.
    """
    kind = data.get("model_type")
    if kind in ("siglip_vision_model", "siglip_text_model"):
        raise UserError(
            f"config.json: model_type = {kind!r}, one tower of a model; supported are whole ones: SigLIP with both of "
            f"its towers (model_type 'siglip'), or a language model that holds a tower (gemma3, t5gemma2). An image "
            f"tower alone can be given to a language model: t5g2 adapt --vision=DIR"
        )
    _refuse_quantized(data)
    if not isinstance(kind, str) or kind not in READERS:
        raise unknown("model_type in config.json", str(kind), READERS)
    layout, reader = READERS[kind]
    return layout, reader(data)


def read_tower(data: Mapping[str, Any]) -> VisionConfig:
    """The architecture of an image tower alone (model_type siglip_vision_model).

    Raises:
      UserError: as read.
    """
    _refuse_quantized(data)
    return _vision(ConfigFields(data, VISION_DEFAULTS))


def dropout_notes(data: Mapping[str, Any]) -> list[str]:
    """What to say of fields that ask for dropout, of which there is none here; sorted."""
    found, nodes = [], [("", data)]
    while nodes:
        where, node = nodes.pop()
        for name, value in node.items():
            if isinstance(value, Mapping):
                nodes.append((f"{where}{name}.", value))
            elif "dropout" in name and value not in (None, 0):
                found.append(f"config.json: {where}{name} = {value!r}; training here is without dropout")
    return sorted(found)


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
    side = top.child("encoder", IMAGE_TOKENS)
    encoder = _gemma3_stack(side.child("text_config", GEMMA3_DEFAULTS))
    decoder = _gemma3_stack(top.child("decoder", GEMMA3_DEFAULTS))
    if encoder.vocab_size != decoder.vocab_size:
        raise UserError(
            f"config.json: encoder.text_config.vocab_size = {encoder.vocab_size} and decoder.vocab_size = "
            f"{decoder.vocab_size}; T5Gemma 2 has one vocabulary, so they must be equal"
        )
    eoi, said = side.number("eoi_token_index"), data.get("eoi_token_index")
    if said not in (None, eoi):
        raise UserError(
            f"config.json: eoi_token_index = {said} and encoder.eoi_token_index = {eoi}; they are one token, so they "
            f"must be equal"
        )
    # the token at the top counts: transformers overwrites the encoder's with it
    images = _images(side, top.number("image_token_index")) if _has_tower(side) else None
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
    """The outermost field counts, in transformers too; true where it is absent."""
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
    said = fields.data.get("rope_parameters") or {}
    if not isinstance(said, Mapping) or (said and not set(said) & set(LAYER_KINDS)):
        raise fields.unsupported("rope_parameters", "an object for each kind of layer: " + ", ".join(LAYER_KINDS))
    scaling = fields.data.get("rope_scaling")
    ropes: dict[LayerKind, Rope] = {
        "local": _rope(fields, said.get("sliding_attention"), None, "rope_local_base_freq"),
        "global": _rope(fields, said.get("full_attention"), scaling, "rope_theta"),
    }
    period = fields.data.get("sliding_window_pattern", fields.data.get("_sliding_window_pattern"))
    if period is not None and (type(period) is not int or not 1 <= period <= 1000):
        raise UserError(
            f"config.json: {fields.prefix}sliding_window_pattern = {period!r}; supported: a whole number from 1 to 1000"
        )
    local: tuple[LayerKind, ...] = ("local",)
    pattern = GEMMA3_PATTERN if period is None else (*local * (period - 1), "global")
    return _stack(fields, pattern, ropes)


def _stack(fields: ConfigFields, pattern: Sequence[LayerKind], ropes: Mapping[LayerKind, Rope]) -> TextConfig:
    fields.require("hidden_activation", ACTIVATION)
    fields.require("attention_bias", False, None)
    fields.require("use_bidirectional_attention", False, None)
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
        query_scalar=None if scalar == head_size else scalar,
        final_softcap=_softcap(fields, "final_logit_softcapping"),
        norm_eps=fields.number("rms_norm_eps", float),
    )


def _pattern(fields: ConfigFields, layers: int, usual: tuple[LayerKind, ...]) -> tuple[LayerKind, ...]:
    """The shortest pattern that gives the layer_types, the usual one if it does; with no layer_types, the usual one."""
    types = fields.data.get("layer_types")
    if types is None:
        return usual
    known = isinstance(types, list | tuple) and all(isinstance(kind, str) and kind in LAYER_KINDS for kind in types)
    if not known or len(types) != layers:
        raise fields.unsupported("layer_types", f"{layers} (num_hidden_layers) of {' and '.join(LAYER_KINDS)}")
    kinds = tuple(LAYER_KINDS[name] for name in types)
    periods = [usual, *(kinds[:period] for period in range(1, layers + 1))]
    said = "sliding_window_pattern" in fields.data
    if said and kinds != tuple(usual[layer % len(usual)] for layer in range(layers)):
        raise UserError(
            f"config.json: {fields.prefix}layer_types = {list(types)} and sliding_window_pattern = "
            f"{fields.value('sliding_window_pattern')}, under which every so many-th layer is full; remove one of them"
        )
    return next(p for p in periods if kinds == tuple(p[layer % len(p)] for layer in range(layers)))


def _rope(fields: ConfigFields, said: Any, scaling: Any, theta: str) -> Rope:
    """The rotary embedding of a kind of layer, from its rope_parameters and from the fields of older files."""
    for node in (scaling, said):
        if node is not None and not isinstance(node, Mapping):
            raise UserError(f"config.json: {fields.prefix}rope_parameters or rope_scaling = {node!r}; give an object")
    parameters = {**(scaling or {}), **(said or {})}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear") or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"config.json: {fields.prefix}rope_parameters or rope_scaling = {parameters}; supported: rope_type "
            f"'default' and 'linear', over the whole head"
        )
    if kind == "default" and parameters.get("factor", 1.0) != 1.0:
        raise UserError(
            f"config.json: {fields.prefix}rope_parameters or rope_scaling = {parameters}: rope_type 'default' has no "
            f"factor; say rope_type 'linear', or remove the factor"
        )
    base = parameters.get("rope_theta", fields.value(theta))
    if theta in fields.data and fields.data[theta] != base:
        raise UserError(
            f"config.json: {fields.prefix}{theta} = {fields.data[theta]} and rope_parameters say {base}; they are the "
            f"same number, so remove one of them"
        )
    numbers = ConfigFields({"rope_theta": base, "factor": parameters.get("factor", 1.0)}, {}, fields.prefix)
    return Rope(numbers.number("rope_theta", float), numbers.number("factor", float) if kind == "linear" else 1.0)


def _softcap(fields: ConfigFields, name: str) -> float | None:
    return None if fields.value(name) is None else fields.number(name, float)


IMAGE_TOKENS = {
    "mm_tokens_per_image": 256,
    "boi_token_index": 255_999,
    "eoi_token_index": 256_000,
    "image_token_index": 262_144,
}


def _has_tower(fields: ConfigFields) -> bool:
    """Whether there is an image tower; transformers' T5Gemma 2 always makes one, so one without layers is none."""
    return fields.child("vision_config", VISION_DEFAULTS).value("num_hidden_layers") != 0


def _images(fields: ConfigFields, token: int) -> ImageConfig:
    vision = fields.child("vision_config", VISION_DEFAULTS | {"vision_use_head": False})
    vision.require("vision_use_head", False)
    return ImageConfig(
        vision=_vision(vision),
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
    "gemma2": (names.HF_GEMMA, _gemma2),
    "gemma3_text": (names.HF_GEMMA, _gemma3),
    "gemma3": (names.HF_GEMMA3_IMAGES, _gemma3_images),
    "t5gemma": (names.HF_T5GEMMA, _t5gemma),
    "t5gemma2": (names.HF_T5GEMMA2, _t5gemma2),
    "siglip": (names.HF_SIGLIP, _siglip),
}
