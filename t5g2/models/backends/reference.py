"""Attention with a dense mask, the reference for every other backend; no other file builds dense masks.

B batch, T queries, S keys of one source, N query heads, K key/value heads, G = N / K, H head size.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from t5g2.core.batch import Sequences
from t5g2.models.kept import kept
from t5g2.models.masks import Keys, Mask


def visible(query: Sequences, keys: Sequences, mask: Mask) -> Bool[Array, "B T S"]:
    """Returns True where a query may attend to a key; t5g2.models.masks has the rule."""

    def pairs(q_BT, k_BS):
        return q_BT[:, :, None], k_BS[:, None, :]

    q_segment, k_segment = pairs(query.segments, keys.segments)
    q_position, k_position = pairs(query.positions, keys.positions)
    ahead_BTS = k_position - q_position
    # of the same example, and not padding
    visible_BTS = (q_segment == k_segment) & (k_segment != 0)
    if mask.left is not None:
        visible_BTS &= ahead_BTS >= -mask.left
    if mask.right is not None:
        visible_BTS &= ahead_BTS <= mask.right
    if mask.causal:
        allowed_BTS = ahead_BTS <= 0  # or within one block, which is bidirectional
        if query.blocks is not None and keys.blocks is not None:
            q_block, k_block = pairs(query.blocks, keys.blocks)
            allowed_BTS |= (q_block == k_block) & (k_block != 0)
        visible_BTS &= allowed_BTS
    return visible_BTS


def attend(
    q_BTNH: Float[Array, "B T N H"],
    query: Sequences,
    sources: Sequence[tuple[Keys, Mask]],
    *,
    scale: float,
    softcap: float | None,
    dtype: str,
) -> Float[Array, "B T N H"]:
    """Returns attention over the visible keys of all sources, under one softmax; zeros where none is visible.

    Scores and softmax are of type `dtype`, sums over keys float32. Weights are rounded to the dtype of the values.
    Sources may have fewer rows, P: each serves B / P consecutive rows of queries (samples that share an encoder).
    """
    rows, length, heads, size = q_BTNH.shape
    kv_heads = sources[0][0].k_BSKH.shape[2]
    # queries of one key/value head are the rows of one matrix, so the products below transpose no scores
    q_BKTGH = q_BTNH.reshape(rows, length, kv_heads, heads // kv_heads, size).swapaxes(1, 2)
    # a finite stand-in for -inf: a row without a visible key must not become inf - inf
    hidden = float(jnp.finfo(dtype).min)
    scores = []
    for keys, mask in sources:
        s_BKTGS = _product("BKTGH,BSKH->BKTGS", q_BKTGH, keys.k_BSKH)
        s_BKTGS = s_BKTGS.astype(dtype) * scale
        if softcap is not None:
            s_BKTGS = softcap * jnp.tanh(s_BKTGS / softcap)
        if keys.score_offset is not None:
            s_BKTGS += jax.lax.stop_gradient(keys.score_offset).astype(dtype)
        tokens = jax.tree.map(lambda x_PS: jnp.repeat(x_PS, rows // len(x_PS), axis=0), keys.tokens)
        visible_B1T1S = visible(query, tokens, mask)[:, None, :, None]
        scores.append(jnp.where(visible_B1T1S, s_BKTGS, hidden))
    # the maximum over all sources, which keeps exp in range and cancels out, so it needs no gradient
    peaks = [jnp.max(s, axis=-1, keepdims=True) for s in scores]
    peak_BKTG1 = jax.lax.stop_gradient(functools.reduce(jnp.maximum, peaks))
    # the output is divided by the sum of the weights, instead of the weights, whose array is S / H times larger
    total_BKTG1, o_BKTGH = 0.0, 0.0
    for (keys, _), s_BKTGS in zip(sources, scores, strict=True):
        w_BKTGS = jnp.exp(s_BKTGS - peak_BKTG1)
        total_BKTG1 += jnp.sum(w_BKTGS, axis=-1, keepdims=True, dtype=jnp.float32)
        rounded_BKTGS = w_BKTGS.astype(keys.v_BSKH.dtype)
        o_BKTGH += _product("BKTGS,BSKH->BKTGH", rounded_BKTGS, keys.v_BSKH)
    # without a visible key every weight is exp(0): these rows are set to zero here, and so are their gradients
    o_BKTGH = jnp.where(peak_BKTG1 > hidden, o_BKTGH / total_BKTG1, 0.0)
    return kept(o_BKTGH.swapaxes(1, 2).reshape(q_BTNH.shape).astype(q_BTNH.dtype))


def _product(equation: str, x_B: Array, y_P: Array) -> Array:
    """Returns the einsum of rows in float32; each row of y is multiplied with B / P consecutive rows of x, uncopied."""
    product = functools.partial(jnp.einsum, equation, preferred_element_type=jnp.float32)
    if len(x_B) == len(y_P):
        return product(x_B, y_P)
    x_Pn = x_B.reshape(len(y_P), -1, *x_B.shape[1:])
    result_Pn = jax.vmap(product, (1, None), out_axes=1)(x_Pn, y_P)
    return result_Pn.reshape(len(x_B), *result_Pn.shape[2:])
