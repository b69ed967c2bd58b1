"""A model from its config, with weights or as shapes only."""

import jax
import jax.numpy as jnp

from t5g2.models.config import EncoderDecoderConfig, ModelConfig
from t5g2.models.gemma import Gemma
from t5g2.models.t5gemma import T5Gemma


def make(config: ModelConfig, *, key: jax.Array, param_dtype=jnp.float32) -> Gemma | T5Gemma:
    """The model that `config` describes, freshly initialised from `key` (jax.random.key)."""
    if isinstance(config, EncoderDecoderConfig):
        return T5Gemma(config, key=key, param_dtype=param_dtype)
    return Gemma(config, key=key, param_dtype=param_dtype)


def abstract(config: ModelConfig, param_dtype=jnp.float32) -> Gemma | T5Gemma:
    """The same model with a jax.ShapeDtypeStruct for every weight: nothing is computed, no memory is taken."""
    return jax.eval_shape(lambda: make(config, key=jax.random.key(0), param_dtype=param_dtype))
