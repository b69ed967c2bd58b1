"""The key-value cache of decoding, an explicit pytree that is passed in and returned.

B batch, T slots of one kind of layer, t new tokens, S encoder length, K key/value heads, H head size.

Beside the keys of every layer, a cache holds the tokens of the slots with segments and positions, from which the masks
follow. So rows may be padded anywhere (with segment 0) and may be at different positions.

A global layer has a slot for every token: all rows fill the same slots, `used .. used + t - 1`. A local layer has no
more slots than its window: each row writes its own tokens one after the other, without padding, and begins again at the
first slot when all are full. Window 4, a prompt of 5 tokens, and one of 2 that is padded to 5 on the right:

    after the prompt     4 1 2 3     0 1 . .
    after two tokens     4 5 6 3     0 1 2 3
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5g2.core.batch import Sequences
from t5g2.core.scopes import scope
from t5g2.models.attention import KeyValues
from t5g2.models.config import LayerKind
from t5g2.models.layers import Compute
from t5g2.models.stack import ENCODER, Block, LayerInputs, PerLayer, Stack


class Cache(NamedTuple):
    """A decoder's key-value cache.

    Attributes:
      past: per layer, KeyValues of B rows and T slots.
      tokens: by kind of layer, int32[B, T] each, the tokens of its slots; segment 0 = empty or padding.
      used: int32[], number of tokens written so far, padding included.
      written_B: int32[B], number of tokens of each row written so far, without padding.
      memory: per layer, KeyValues of the encoder's states, None where the layer does not attend to them; None for a
        decoder-only model. They have P rows, of which each serves B / P consecutive ones of the decoder.
      encoder: the encoder's tokens, of P rows too, or None.
    """

    past: PerLayer
    tokens: dict[LayerKind, Sequences]
    used: Array
    written_B: Array
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
    """Returns an empty cache for `length` tokens; it holds every layer's keys and values of `memory_BSD`, if any."""
    config = stack.config
    dtype = jnp.dtype(compute.dtype)
    slots: dict[LayerKind, int] = {
        kind: length if kind == "global" else min(length, config.window) for kind in config.pattern
    }

    def empty(block: Block) -> KeyValues:
        shape = (rows, slots[block.kind], config.kv_heads, config.head_size)
        return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    # segment 0 hides the empty slots, whatever their keys are
    memory = None
    if memory_BSD is not None:
        memory = stack.layers.map(lambda block: block.encoder_keys_values(memory_BSD, compute=compute))
    tokens: dict[LayerKind, Sequences] = {
        kind: Sequences(*(jnp.zeros((rows, number), jnp.int32) for _ in range(4))) for kind, number in slots.items()
    }
    used, written_B = jnp.zeros((), jnp.int32), jnp.zeros((rows,), jnp.int32)
    return Cache(stack.layers.map(empty), tokens, used, written_B, memory, encoder)


def extend(
    stack: Stack,
    x_BtD: Float[Array, "B t D"],
    inputs: LayerInputs,
    cache: Cache,
    *,
    first: bool = False,
    compute: Compute,
) -> tuple[Float[Array, "B t D"], Cache]:
    """Returns the final-normed states of new tokens, and the cache extended by them.

    The new tokens attend to the cache, to each other and to the encoder. Every layer reads the old cache and its new
    keys as two sources; the new keys of all layers are written together afterwards. So the loop over layers copies
    nothing, and a donated cache is updated in place.

    Args:
      first: the cache is empty, and is not read.

    Raises:
      ValueError: more new tokens than a global layer has slots. (The number of used slots is unknown while tracing: the
        caller makes the cache long enough for all tokens; past its end the last slots would be overwritten.)
    """
    new = x_BtD.shape[1]
    if "global" in cache.tokens and new > (length := cache.tokens["global"].segments.shape[1]):
        raise ValueError(f"{new} new tokens do not fit a cache of {length} slots; start it with a greater length")

    def step(block: Block, x_BtD, stored):
        past, memory = stored
        encoder_keys = None if memory is None else memory.as_keys(cache.encoder, ENCODER)
        keys = None if first else past.as_keys(cache.tokens[block.kind])
        with scope(block.kind):
            return block.forward(x_BtD, inputs, past=keys, memory=encoder_keys, compute=compute)

    # the scan takes one pytree for each layer, so past and memory are zipped layer by layer
    memory = cache.memory or jax.tree.map(lambda _: None, cache.past, is_leaf=lambda x: isinstance(x, KeyValues))
    stored = PerLayer(*(tuple(zip(p, m, strict=True)) for p, m in zip(cache.past, memory, strict=True)))
    x_BtD, keys_values = stack.layers.scan(step, x_BtD, stored, compute=compute)
    return stack.final_norm.normalize(x_BtD, compute), _write(stack, cache, keys_values, inputs.tokens)


def repeat(cache: Cache, n: int) -> Cache:
    """Returns the cache with n copies of each row, one after the other; they share the row's encoder."""
    return cache if n == 1 else _with_rows(cache, lambda x: repeat_rows(x, n))


def select(cache: Cache, row_Pn: Int[Array, "P n"]) -> Cache:
    """Returns the cache of P * n rows, of which row p * n + i continues the old row p * n + row_Pn[p, i]."""
    return _with_rows(cache, lambda x: select_rows(x, row_Pn))


def repeat_rows(tree: Any, n: int) -> Any:
    """Returns the arrays with n copies of each row, one after the other."""
    return jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), tree)


def select_rows(tree: Any, row_Pn: Int[Array, "P n"]) -> Any:
    """Returns arrays of P * n rows, whose row p * n + i is the old row p * n + row_Pn[p, i]."""
    prompts, n = row_Pn.shape

    def select(x: Array) -> Array:
        # within each prompt, so that rows on several devices stay where they are
        x_Pn = x.reshape(prompts, n, *x.shape[1:])
        return jax.vmap(lambda x_n, row_n: x_n[row_n])(x_Pn, row_Pn).reshape(x.shape)

    return jax.tree.map(select, tree)


def _with_rows(cache: Cache, change: Callable[[Array], Array]) -> Cache:
    """Returns the cache with the rows of a decoder changed; those of the encoder stay."""
    # the leaves of `slots` have a leading axis of repeats
    past = PerLayer(jax.tree.map(jax.vmap(change), cache.past.slots), jax.tree.map(change, cache.past.tail))
    return cache._replace(past=past, tokens=jax.tree.map(change, cache.tokens), written_B=change(cache.written_B))


def _write(stack: Stack, cache: Cache, keys_values: PerLayer, tokens: Sequences) -> Cache:
    """Returns the cache with new keys and values, and their tokens, in the slots after the used ones."""
    config, real_Bt = stack.config, tokens.segments != 0
    # the number of each token among those of its row
    numbers_Bt = cache.written_B[:, None] + jnp.cumsum(real_Bt, axis=1) - 1
    written_B = cache.written_B + jnp.sum(real_Bt, axis=1)

    def put(kind: LayerKind, old: Array, new: Array, axis: int) -> Array:
        """Writes `new` into the slots `old`; rows are one axis before the slots."""
        new = new.astype(old.dtype)
        if kind == "global":
            return jax.lax.dynamic_update_slice_in_dim(old, new, cache.used, axis=axis)
        slots = old.shape[axis]
        # padding, and tokens that later ones would overwrite at once, go to no slot
        kept_Bt = real_Bt & (numbers_Bt >= written_B[:, None] - slots)
        slot_Bt = jnp.where(kept_Bt, numbers_Bt % slots, slots)
        put_rows = jax.vmap(_put_row)
        return put_rows(old, new, slot_Bt) if axis == 1 else jax.vmap(put_rows, (0, 0, None))(old, new, slot_Bt)

    # the leaves of `slots` have a leading axis of repeats, so the length is one axis further
    kinds: list[LayerKind] = [config.kind(layer) for layer in range(config.layers)]
    stored = []
    for layers, new_layers, axis in ((cache.past.slots, keys_values.slots, 2), (cache.past.tail, keys_values.tail, 1)):
        first = 0 if axis == 2 else config.layers - len(layers)
        stored.append(
            tuple(
                jax.tree.map(partial(put, kinds[first + i], axis=axis), old, new)
                for i, (old, new) in enumerate(zip(layers, new_layers, strict=True))
            )
        )
    blocks = jnp.zeros_like(tokens.segments) if tokens.blocks is None else tokens.blocks
    new_tokens = tokens._replace(blocks=blocks)
    slot_tokens: dict[LayerKind, Sequences] = {
        kind: jax.tree.map(partial(put, kind, axis=1), old, new_tokens) for kind, old in cache.tokens.items()
    }
    used = cache.used + tokens.segments.shape[1]
    return cache._replace(past=PerLayer(*stored), tokens=slot_tokens, used=used, written_B=written_B)


def _put_row(old: Array, new: Array, slot_t: Array) -> Array:
    """Returns the slots of one row with new entries; an index past the last slot = nowhere."""
    return old.at[slot_t].set(new, mode="drop", unique_indices=True)
