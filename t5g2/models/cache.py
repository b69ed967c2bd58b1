"""Keys and values that decoding reuses, as an explicit pytree that goes in and comes out.

B batch, T length of the cache, t new tokens, S encoder length, K key/value heads, H head size.

A cache holds, beside the keys of every layer, the tokens they stand for: their segments and positions, from which the
masks follow. So rows may be padded anywhere (with segment 0) and may stand at different positions. All rows fill the
same slots: `extend` writes t new tokens to the slots used .. used + t - 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5g2.core.batch import Sequences
from t5g2.models.attention import KeyValues
from t5g2.models.layers import Compute
from t5g2.models.stack import Block, LayerInputs, PerLayer, Stack


class Cache(NamedTuple):
    """What a decoder remembers.

    Attributes:
      past: per layer, KeyValues of B rows and T slots.
      tokens: int32[B, T] each, what the slots hold; segment 0 = nothing.
      used: int32[], slots written so far.
      memory: per layer, KeyValues of the encoder's states, None where the layer does not see them; None for a
        decoder-only model.
      encoder: the encoder's tokens, or None.
    """

    past: PerLayer
    tokens: Sequences
    used: Array
    memory: PerLayer | None = None
    encoder: Sequences | None = None


def start(
    stack: Stack,
    rows: int,
    length: int,
    *,
    memory_BSD: Array | None = None,
    encoder: Sequences | None = None,
    compute: Compute,
) -> Cache:
    """An empty cache of `length` slots; with `memory_BSD`, its keys and values are computed once for every layer."""
    config = stack.config
    dtype = jnp.dtype(compute.dtype)

    def empty(block: Block) -> KeyValues:
        shape = (rows, length, config.kv_heads, config.head_size)
        return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    nothing = jnp.zeros((rows, length), jnp.int32)
    memory = None
    if memory_BSD is not None:
        memory = stack.layers.map(lambda block: block.encoder_keys_values(memory_BSD, compute=compute))
    tokens = Sequences(nothing, nothing, nothing, nothing)
    return Cache(stack.layers.map(empty), tokens, jnp.zeros((), jnp.int32), memory, encoder)


def extend(
    stack: Stack, x_BtD: Float[Array, "B t D"], site: LayerInputs, cache: Cache, *, compute: Compute
) -> tuple[Float[Array, "B t D"], Cache]:
    """Final-normed states of new tokens that see the cache, themselves and the encoder; and the cache with them in it.

    Every layer reads the old cache and its new keys as two sources; the new keys of all layers are written together
    afterwards. So the loop over layers copies nothing, and a donated cache is updated in place.

    Raises:
      ValueError: more new tokens than the cache has slots. (How many are used is not known while tracing: the caller
        makes the cache long enough for all that it will write; beyond the end the last slots would be overwritten.)
    """
    length, new = cache.tokens.segments.shape[1], x_BtD.shape[1]
    if new > length:
        raise ValueError(f"{new} new tokens do not fit a cache of {length} slots; start it with a greater length")

    def step(block: Block, x_BtD, stored):
        past, memory = stored
        seen = None if memory is None else memory.of(cache.encoder)
        return block.forward(x_BtD, site, past=past.of(cache.tokens), memory=seen, compute=compute)

    memory = cache.memory or jax.tree.map(lambda _: None, cache.past, is_leaf=lambda x: isinstance(x, KeyValues))
    stored = PerLayer(*(tuple(zip(p, m, strict=True)) for p, m in zip(cache.past, memory, strict=True)))
    x_BtD, own = stack.layers.scan(step, x_BtD, stored, compute=compute)
    return stack.final_norm.normalize(x_BtD, compute), _write(cache, own, site.tokens)


def _write(cache: Cache, own: PerLayer, tokens: Sequences) -> Cache:
    """The cache with new keys, and the tokens they stand for, in the slots after those used."""

    def put(old, new, axis: int):
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), cache.used, axis=axis)

    # slots have a leading axis of repeats, so length is one axis further
    past = PerLayer(
        jax.tree.map(lambda old, new: put(old, new, 2), cache.past.slots, own.slots),
        jax.tree.map(lambda old, new: put(old, new, 1), cache.past.tail, own.tail),
    )
    blocks = jnp.zeros_like(tokens.segments) if tokens.blocks is None else tokens.blocks
    stored = Sequences(
        *(put(old, new, 1) for old, new in zip(cache.tokens, tokens._replace(blocks=blocks), strict=True))
    )
    return cache._replace(past=past, tokens=stored, used=cache.used + tokens.segments.shape[1])
