"""The key-value cache of decoding, an explicit pytree that is passed in and returned.

B batch, T length of the cache, t new tokens, S encoder length, K key/value heads, H head size.

Beside the keys of every layer, a cache holds their tokens with segments and positions, from which the masks follow. So
rows may be padded anywhere (with segment 0) and may be at different positions. All rows fill the same slots: `extend`
writes t new tokens to the slots used .. used + t - 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5g2.core.batch import Sequences
from t5g2.core.scopes import scope
from t5g2.models.attention import KeyValues
from t5g2.models.layers import Compute
from t5g2.models.stack import Block, LayerInputs, PerLayer, Stack


class Cache(NamedTuple):
    """A decoder's key-value cache.

    Attributes:
      past: per layer, KeyValues of B rows and T slots.
      tokens: int32[B, T] each, the tokens of the slots; segment 0 = empty or padding.
      used: int32[], number of slots written so far.
      memory: per layer, KeyValues of the encoder's states, None where the layer does not attend to them; None for a
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
    """Returns an empty cache of `length` slots; it holds every layer's keys and values of `memory_BSD`, if any."""
    config = stack.config
    dtype = jnp.dtype(compute.dtype)

    def empty(block: Block) -> KeyValues:
        shape = (rows, length, config.kv_heads, config.head_size)
        return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    # segment 0 hides the empty slots, whatever their keys are
    zeros_BT = jnp.zeros((rows, length), jnp.int32)
    memory = None
    if memory_BSD is not None:
        memory = stack.layers.map(lambda block: block.encoder_keys_values(memory_BSD, compute=compute))
    tokens = Sequences(zeros_BT, zeros_BT, zeros_BT, zeros_BT)
    return Cache(stack.layers.map(empty), tokens, jnp.zeros((), jnp.int32), memory, encoder)


def extend(
    stack: Stack, x_BtD: Float[Array, "B t D"], inputs: LayerInputs, cache: Cache, *, compute: Compute
) -> tuple[Float[Array, "B t D"], Cache]:
    """Returns the final-normed states of new tokens, and the cache extended by them.

    The new tokens attend to the cache, to each other and to the encoder. Every layer reads the old cache and its new
    keys as two sources; the new keys of all layers are written together afterwards. So the loop over layers copies
    nothing, and a donated cache is updated in place.

    Raises:
      ValueError: more new tokens than the cache has slots. (The number of used slots is unknown while tracing: the
        caller makes the cache long enough for all tokens; past its end the last slots would be overwritten.)
    """
    length, new = cache.tokens.segments.shape[1], x_BtD.shape[1]
    if new > length:
        raise ValueError(f"{new} new tokens do not fit a cache of {length} slots; start it with a greater length")

    def step(block: Block, x_BtD, stored):
        past, memory = stored
        encoder_keys = None if memory is None else memory.as_keys(cache.encoder)
        with scope(block.kind):
            return block.forward(x_BtD, inputs, past=past.as_keys(cache.tokens), memory=encoder_keys, compute=compute)

    # the scan takes one pytree for each layer, so past and memory are zipped layer by layer
    memory = cache.memory or jax.tree.map(lambda _: None, cache.past, is_leaf=lambda x: isinstance(x, KeyValues))
    stored = PerLayer(*(tuple(zip(p, m, strict=True)) for p, m in zip(cache.past, memory, strict=True)))
    x_BtD, keys_values = stack.layers.scan(step, x_BtD, stored, compute=compute)
    return stack.final_norm.normalize(x_BtD, compute), _write(cache, keys_values, inputs.tokens)


def _write(cache: Cache, keys_values: PerLayer, tokens: Sequences) -> Cache:
    """Returns the cache with new keys and values, and their tokens, in the slots after the used ones."""

    def put(old, new, axis: int):
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), cache.used, axis=axis)

    # the leaves of `slots` have a leading axis of repeats, so the length is one axis further
    past = PerLayer(
        jax.tree.map(lambda old, new: put(old, new, 2), cache.past.slots, keys_values.slots),
        jax.tree.map(lambda old, new: put(old, new, 1), cache.past.tail, keys_values.tail),
    )
    blocks = jnp.zeros_like(tokens.segments) if tokens.blocks is None else tokens.blocks
    stored = Sequences(
        *(put(old, new, 1) for old, new in zip(cache.tokens, tokens._replace(blocks=blocks), strict=True))
    )
    return cache._replace(past=past, tokens=stored, used=cache.used + tokens.segments.shape[1])
