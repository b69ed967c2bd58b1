"""Fields of transformers' config.json: the defaults of those that a file leaves out, and checked access to them.

Source: transformers 5.23.0, models/*/configuration_*.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from t5g2.core.errors import UserError
from t5g2.models.config import LayerKind

CONFIG_FILE = "config.json"
LAYER_KINDS: dict[str, LayerKind] = {"sliding_attention": "local", "full_attention": "global"}
LAYER_TYPES = {kind: name for name, kind in LAYER_KINDS.items()}
ACTIVATION = "gelu_pytorch_tanh"

# ---- defaults, by class ----
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
IMAGE_TOKENS = {
    "mm_tokens_per_image": 256,
    "boi_token_index": 255_999,
    "eoi_token_index": 256_000,
    "image_token_index": 262_144,
}


# transformers reads and writes these fields under either name
OTHER_NAMES = {name.replace("_index", "_id"): name for name in IMAGE_TOKENS if name.endswith("_index")}


def with_index_names(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a config.json with image_token_index for image_token_id, and so on, in it and the objects within it.

    Raises:
      UserError: the two names of a field have different values.
    """
    named: dict[str, Any] = {}
    for key, value in data.items():
        name = OTHER_NAMES.get(key, key)
        if name != key and data.get(name, value) != value:
            raise UserError(
                f"{CONFIG_FILE}: {prefix}{key} = {value!r} and {prefix}{name} = {data[name]!r}; they are one field, so "
                f"remove one of them"
            )
        named[name] = with_index_names(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
    return named


@dataclass(frozen=True)
class ConfigFields:
    """One object of a config.json, with defaults for the fields that it leaves out.

    Attributes:
      prefix: path of the object, which stands before a field's name in messages: "encoder.text_config.".
    """

    data: Mapping[str, Any]
    defaults: Mapping[str, Any]
    prefix: str = ""

    def value(self, name: str) -> Any:
        """Returns the field, or its default."""
        return self.data[name] if name in self.data else self.defaults[name]

    def number(self, name: str, kind: type = int) -> Any:
        """Returns the field as a finite number, a whole one if kind is int.

        Raises:
          UserError: the value is something else.
        """
        value = self.value(name)
        # Python counts True as an int, and JSON as Python reads it may hold NaN
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or kind(value) != value:
            raise self.unsupported(name, "a whole number" if kind is int else "a number")
        return kind(value)

    def boolean(self, name: str) -> bool:
        """Returns the field, true or false.

        Raises:
          UserError: the value is something else, such as the text "false".
        """
        value = self.value(name)
        if not isinstance(value, bool):
            raise self.unsupported(name, "true or false")
        return value

    def child(self, name: str, defaults: Mapping[str, Any]) -> "ConfigFields":
        """Returns the object in a field.

        Raises:
          UserError: the field is absent or something else.
        """
        node = self.data.get(name)
        if not isinstance(node, Mapping):
            raise UserError(f"{CONFIG_FILE}: {self.prefix}{name} = {node!r}; it must be an object that holds a config")
        return ConfigFields(node, defaults, f"{self.prefix}{name}.")

    def require(self, name: str, *allowed: Any) -> None:
        """Raises UserError if the field has another value than the allowed ones."""
        if name in self.defaults and self.value(name) not in allowed:
            raise self.unsupported(name, f"{allowed[0]!r}; no other value is implemented")

    def unsupported(self, name: str, allowed: str) -> UserError:
        """Returns the error for a field whose value is not supported."""
        return UserError(f"{CONFIG_FILE}: {self.prefix}{name} = {self.value(name)!r}; supported: {allowed}")
