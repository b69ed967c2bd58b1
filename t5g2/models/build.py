"""Construction of a model from its config, with weights or as shapes only."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from t5g2.models.config import DualEncoderConfig, EncoderDecoderConfig, ModelConfig, TextConfig
from t5g2.models.gemma import Gemma
from t5g2.models.siglip import Siglip
from t5g2.models.t5gemma import T5Gemma

MODELS: dict[type, Callable[..., Any]] = {TextConfig: Gemma, EncoderDecoderConfig: T5Gemma, DualEncoderConfig: Siglip}


def make(config: ModelConfig, *, key: jax.Array, param_dtype=jnp.float32) -> Any:
    """Returns the model that `config` describes, initialised from `key` (jax.random.key)."""
    return MODELS[type(config)](config, key=key, param_dtype=param_dtype)


def abstract(config: ModelConfig, param_dtype=jnp.float32) -> Any:
    """Returns the same model with a jax.ShapeDtypeStruct for every weight: nothing is computed or allocated."""
    leaves, structure = _shapes(config, jnp.dtype(param_dtype))
    return jax.tree.unflatten(structure, leaves)


@functools.lru_cache(maxsize=128)
def _shapes(config: ModelConfig, param_dtype: jnp.dtype) -> tuple[list[jax.ShapeDtypeStruct], Any]:
    """Returns the leaves and the structure; kept, because tracing takes tenths of a second and a run asks often."""
    return jax.tree.flatten(jax.eval_shape(lambda: make(config, key=jax.random.key(0), param_dtype=param_dtype)))
