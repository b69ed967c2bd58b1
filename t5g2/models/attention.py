"""Attention over several sources of keys under one softmax, with grouped queries and normed queries and keys.

B batch, T queries, S keys of one source, D width, N query heads, K key/value heads, H head size.

One set of weights serves self-attention (one source: the tokens themselves), a decoding step (two: the cache and the
new tokens) and merged attention (one more: the encoder's states).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from t5g2.core.batch import Sequences
from t5g2.core.sharding import constrain
from t5g2.models.backends.by_name import BACKENDS
from t5g2.models.backends.choice import Site, choose
from t5g2.models.config import TextConfig
from t5g2.models.kept import PROJECTIONS, kept
from t5g2.models.layers import Compute, RMSNorm, apply_rotary, normal, param, project
from t5g2.models.masks import Keys, Mask


class KeyValues(NamedTuple):
    """Keys and values of one layer, normed and rotated: k_BSKH, v_BSKH."""

    k_BSKH: Array
    v_BSKH: Array

    def as_keys(self, tokens: Sequences, axis: str = "length") -> Keys:
        """Returns these keys and values as a source of attention; `tokens` has their segments, positions and blocks.

        Args:
          axis: logical axis of the tokens.
        """
        return Keys(self.k_BSKH, self.v_BSKH, tokens, axis)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    query: Sequences,
    sources: Sequence[tuple[Keys, Mask]],
    *,
    scale: float,
    softcap: float | None = None,
    compute: Compute,
) -> Float[Array, "B T N H"]:
    """Returns the attention of queries over the visible keys of all sources, with one softmax of scale * q k.

    A query without a visible key gets zeros, and zero gradients.

    Args:
      query: the tokens of the queries.
      sources: keys and values, each with its mask; t5g2.models.masks has the rule of visibility.
      softcap: scores become softcap * tanh(scores / softcap) before they are masked.
      compute: its backend and softmax_dtype are used.
    """
    backend = choose(compute.backend, Site.of(q_BTNH, query, sources, softcap)).name
    return BACKENDS[backend](q_BTNH, query, sources, scale=scale, softcap=softcap, dtype=compute.softmax_dtype)


class Attention(nnx.Module):
    """The projections and norms of one attention layer.

    Attributes:
      config: architecture of the stack that the queries come from.
      memory_width: size of the states that keys and values are projected from (cross-attention); None = the stack's
        width.
    """

    def __init__(self, config: TextConfig, *, key: jax.Array, param_dtype, memory_width: int | None = None):
        self.config = config
        width, size = config.width, config.head_size
        shape_q, shape_kv = (width, config.heads, size), (memory_width or width, config.kv_heads, size)
        axes_q, axes_kv = ("embed", "heads", "head_size"), ("embed", "kv_heads", "head_size")
        keys = jax.random.split(key, 4)
        self.q = param(keys[0], shape_q, axes=axes_q, init=normal, dtype=param_dtype)
        self.k = param(keys[1], shape_kv, axes=axes_kv, init=normal, dtype=param_dtype)
        self.v = param(keys[2], shape_kv, axes=axes_kv, init=normal, dtype=param_dtype)
        shape_o, axes_o = (config.heads, size, width), ("heads", "head_size", "embed")
        self.o = param(keys[3], shape_o, axes=axes_o, init=normal, dtype=param_dtype)
        if config.qk_norm:
            self.q_norm = RMSNorm(size, eps=config.norm_eps, param_dtype=param_dtype)
            self.k_norm = RMSNorm(size, eps=config.norm_eps, param_dtype=param_dtype)

    def queries(
        self,
        x_BTD: Float[Array, "B T D"],
        rotary: tuple[Array, Array] | None,
        *,
        axis: str = "length",
        compute: Compute,
    ) -> Float[Array, "B T N H"]:
        """Returns queries, normed and then rotated by `rotary` (cos, sin); not rotated if None (cross-attention).

        Args:
          axis: logical axis of the tokens, here and below.
        """
        q_BTNH = project(x_BTD, self.q[...])
        # only Gemma 3: Gemma 2 has a soft cap on the scores instead
        if self.config.qk_norm:
            q_BTNH = self.q_norm.normalize(q_BTNH, compute)
        if rotary is not None:
            q_BTNH = apply_rotary(q_BTNH, rotary)
        return kept(constrain(q_BTNH, "rows", axis, "heads_act", None), PROJECTIONS)

    def keys(
        self,
        x_BSD: Float[Array, "B S D"],
        rotary: tuple[Array, Array] | None,
        *,
        axis: str = "length",
        compute: Compute,
    ) -> KeyValues:
        """Returns keys, normed and then rotated by `rotary` (cos, sin), and values.

        The keys of encoder states are not rotated (None), in merged and in separate cross-attention.
        """
        k_BSKH, v_BSKH = project(x_BSD, self.k[...]), project(x_BSD, self.v[...])
        if self.config.qk_norm:
            k_BSKH = self.k_norm.normalize(k_BSKH, compute)
        if rotary is not None:
            k_BSKH = apply_rotary(k_BSKH, rotary)
        axes = ("rows", axis, "kv_heads_act", None)
        return KeyValues(*(kept(constrain(x_BSKH, *axes), PROJECTIONS) for x_BSKH in (k_BSKH, v_BSKH)))

    def attend(
        self,
        q_BTNH: Array,
        query: Sequences,
        sources: Sequence[tuple[Keys, Mask]],
        *,
        axis: str = "length",
        compute: Compute,
    ) -> Float[Array, "B T D"]:
        """Returns the attention of the queries over `sources`, projected to the width of the model."""
        config = self.config
        o_BTNH = attend(q_BTNH, query, sources, scale=config.scale, softcap=config.attention_softcap, compute=compute)
        return project(constrain(o_BTNH, "rows", axis, "heads_act", None), self.o[...], inputs=2)
