"""Attention in plain JAX, block by block under one online softmax: no array holds the scores of all pairs.

A block of queries meets the blocks of keys of one source after the other, and keeps a maximum, a sum and an output for
each query (Milakov and Gimelshein, arXiv 1805.02867; Rabe and Staats, arXiv 2112.05682). The backward pass is written
by hand: it recomputes weights from the saved log-sum-exp (FlashAttention, arXiv 2205.14135, appendix B.2).

Blocks of keys that no query of a block sees are not computed: the causal half, what lies outside a window, padding, and
other examples of a packed row. They are found from the tokens themselves, so nothing is promised about them: where
the positions of an example rise by one from column to column, windows are cut by column; else by the range of positions
in a block, which hides fewer blocks and never too many.

B batch, T queries, S keys of one source, N query heads, K key/value heads, G = N / K, H head size; n blocks of t
queries, m blocks of s keys.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5g2.core.batch import Sequences
from t5g2.core.device import platform
from t5g2.models.backends import reference
from t5g2.models.backends.columns import in_order
from t5g2.models.backends.site import Site
from t5g2.models.kept import kept
from t5g2.models.masks import Keys, Mask


class BlockLimits(NamedTuple):
    """Limits of the sizes of blocks; all sizes are powers of two.

    Attributes:
      most: queries or keys of a block.
      least: those of a block in a window, if it is smaller.
      per_window: blocks that make up a window.
      scores: of a block of queries and one of keys, over all rows and heads of a device.
    """

    most: int
    least: int
    per_window: int
    scores: int


# On a CPU larger blocks are slower, as their scores leave the cache, and smaller products are slow too
# (bench/attention.py). Elsewhere a turn of the loop must fill the device; not measured on one yet.
CPU = BlockLimits(most=256, least=128, per_window=4, scores=2**62)
ACCELERATOR = BlockLimits(most=1024, least=128, per_window=2, scores=2**26)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    query: Sequences,
    sources: Sequence[tuple[Keys, Mask]],
    *,
    scale: float,
    softcap: float | None,
    dtype: str,
    combine: Any = None,
) -> Float[Array, "B T N H"]:
    """Returns what `reference.attend` returns, up to rounding.

    Args:
      combine: mesh axes, within jax.shard_map, over which the keys of the sources are parts of all keys.
    """
    rows, length, heads, _ = q_BTNH.shape
    masks, lengths = [mask for _, mask in sources], [keys.k_BSKH.shape[1] for keys, _ in sources]
    block, key_blocks = block_sizes(masks, rows * heads, length, lengths)
    shapes = tuple(map(SourceShape, masks, lengths, key_blocks, (keys.tokens is query for keys, _ in sources)))
    arrays = tuple((keys.k_BSKH, keys.v_BSKH) for keys, _ in sources)
    problem = Problem(scale, softcap, dtype, block, shapes, combine)
    tokens, offsets = zip(*((keys.tokens, keys.score_offset) for keys, _ in sources), strict=True)
    return _attend(problem, q_BTNH, arrays, query, tokens, offsets)


def tile(site: Site) -> int:
    """Returns the number of scores that exist at a time: those of a block of queries and one of keys, of all heads."""
    block, key_blocks = block_sizes(site.masks, site.rows * site.heads, site.queries, site.keys)
    return site.rows * site.heads * block * max(key_blocks)


def block_sizes(
    masks: Sequence[Mask], rows_heads: int, queries: int, keys: Sequence[int]
) -> tuple[int, tuple[int, ...]]:
    """Returns the queries of a block, and the keys of a block of each source, by shapes and platform.

    A window of W keys costs those of W and two blocks, so its blocks are a part of W. Queries are in blocks of the
    smallest of all sources, which meet a window best.
    """
    limits = CPU if platform() == "cpu" else ACCELERATOR
    fitting = 2 ** (int(math.log2(max(limits.scores // rows_heads, 1))) // 2)
    most = min(limits.most, max(fitting, limits.least))

    def size(mask: Mask) -> int:
        if mask.left is None:
            return most
        window = mask.left + 1 + (mask.right or 0)
        return min(max(2 ** math.ceil(math.log2(window / limits.per_window)), limits.least), most)

    sizes = [size(mask) for mask in masks]
    return min(queries, *sizes), tuple(min(block, length) for block, length in zip(sizes, keys, strict=True))


@dataclass(frozen=True)
class SourceShape:
    """The shape of a source of keys.

    Attributes:
      same: its tokens are those of the queries, column by column.
    """

    mask: Mask
    length: int
    block: int
    same: bool


@dataclass(frozen=True)
class Problem:
    """Everything about a call that is known while tracing."""

    scale: float
    softcap: float | None
    dtype: str
    block: int
    sources: tuple[SourceShape, ...]
    combine: Any = None


class _Running(NamedTuple):
    """The softmax of a block of queries over the keys so far: maximum, sum of weights, weighted sum of values."""

    peak_BKtG1: Array
    total_BKtG1: Array
    o_BKtGH: Array


# a gradient of our own: automatic differentiation would keep every block's weights for the backward pass
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem: Problem, q_BTNH, keys_values, query: Sequences, tokens: tuple[Sequences, ...], offsets):
    return _forward(problem, q_BTNH, keys_values, query, tokens, offsets)[0]


def _forward(problem: Problem, q_BTNH, keys_values, query: Sequences, tokens: tuple[Sequences, ...], offsets):
    """Returns the output, and the log-sum-exp of every query for the backward pass."""
    shape, kv_heads = q_BTNH.shape, keys_values[0][0].shape[2]
    blocks = _query_blocks(problem, q_BTNH, query, kv_heads)
    sources = _pad_sources(problem, keys_values, tokens)

    def query_block(_, inputs):
        (q_BKtGH, query_Bt), ranges = inputs
        running = _start(problem, q_BKtGH)
        for spec, source, offset, (first, end) in zip(problem.sources, sources, offsets, ranges, strict=True):

            def key_block(index, running, spec=spec, source=source, offset=offset):
                k_BKsH, v_BKsH, tokens_Bs = _take(source, index, spec.block)
                s_BKtGs = _scores(problem, spec.mask, q_BKtGH, k_BKsH, query_Bt, tokens_Bs, offset)[0]
                peak = jnp.maximum(running.peak_BKtG1, jnp.max(s_BKtGs, axis=-1, keepdims=True))
                w_BKtGs = jnp.exp(s_BKtGs - peak)
                shrink = jnp.exp(running.peak_BKtG1 - peak).astype(jnp.float32)
                total = running.total_BKtG1 * shrink + jnp.sum(w_BKtGs, axis=-1, keepdims=True, dtype=jnp.float32)
                o_BKtGH = _dot("BKtGs,BKsH->BKtGH", w_BKtGs.astype(v_BKsH.dtype), v_BKsH)
                return _Running(peak, total, running.o_BKtGH * shrink + o_BKtGH)

            running = jax.lax.fori_loop(first, end, key_block, running)
        return None, running if problem.combine is not None else _finish(running, q_BKtGH.dtype)

    result_n: Any = jax.lax.scan(query_block, None, (blocks, block_ranges(problem, query, tokens)))[1]
    if problem.combine is not None:
        # of all queries at once, because each sum over devices takes its time
        result_n = _finish(_combined(result_n, problem.combine), q_BTNH.dtype)
    o_nBKtGH, lse_nBKtG1 = result_n
    return _merge_queries(o_nBKtGH, shape), lse_nBKtG1


def _finish(running: _Running, dtype: Any) -> tuple[Array, Array]:
    """Returns output and log-sum-exp; without a visible key the sum is zero, and so are output and gradients."""
    blind = running.total_BKtG1 == 0
    o_BKtGH = jnp.where(blind, 0.0, running.o_BKtGH / jnp.where(blind, 1.0, running.total_BKtG1))
    lse_BKtG1 = jnp.where(blind, 0.0, running.peak_BKtG1.astype(jnp.float32) + jnp.log(running.total_BKtG1))
    return o_BKtGH.astype(dtype), lse_BKtG1


def _combined(part: _Running, axes: Any) -> _Running:
    """Returns the softmax over the keys of all devices along these mesh axes, from each device's part of it."""
    peak_BKtG1 = jax.lax.pmax(part.peak_BKtG1, axes)
    scale_BKtG1 = jnp.exp(part.peak_BKtG1 - peak_BKtG1).astype(jnp.float32)
    total_BKtG1, o_BKtGH = jax.lax.psum((part.total_BKtG1 * scale_BKtG1, part.o_BKtGH * scale_BKtG1), axes)
    return _Running(peak_BKtG1, total_BKtG1, o_BKtGH)


def _forward_with_residuals(problem: Problem, q_BTNH, keys_values, query, tokens, offsets):
    o_BTNH, lse_nBKtG1 = map(kept, _forward(problem, q_BTNH, keys_values, query, tokens, offsets))
    return o_BTNH, (q_BTNH, keys_values, query, tokens, offsets, o_BTNH, lse_nBKtG1)


def _backward(problem: Problem, residuals, do_BTNH):
    """Returns the gradients of queries, keys and values; tokens and offsets have none."""
    q_BTNH, keys_values, query, tokens, offsets, o_BTNH, lse_nBKtG1 = residuals
    if problem.combine is not None:
        # the output is a sum over devices, and so is the gradient by a device's part of it; log-sum-exp and output are
        # those of all keys, so that each device computes the gradients of its own
        do_BTNH = jax.lax.psum(do_BTNH, problem.combine)
    kv_heads = keys_values[0][0].shape[2]
    blocks = _query_blocks(problem, q_BTNH, query, kv_heads)
    do_nBKtGH = _split_queries(problem, do_BTNH, kv_heads)
    # the part of the softmax's gradient that all keys of a query share
    delta_BTN1 = jnp.sum(do_BTNH.astype(jnp.float32) * o_BTNH.astype(jnp.float32), axis=-1, keepdims=True)
    delta_nBKtG1 = _split_queries(problem, delta_BTN1, kv_heads)
    sources = _pad_sources(problem, keys_values, tokens)

    def query_block(gradients, inputs):
        (q_BKtGH, query_Bt), do_BKtGH, delta_BKtG1, lse_BKtG1, ranges = inputs
        dq_BKtGH, updated = jnp.zeros(q_BKtGH.shape, jnp.float32), []
        parts = zip(problem.sources, sources, offsets, ranges, gradients, strict=True)
        for spec, source, offset, (first, end), gradient in parts:

            def key_block(index, carry, spec=spec, source=source, offset=offset):
                dq_BKtGH, dk_BKSH, dv_BKSH = carry
                k_BKsH, v_BKsH, tokens_Bs = _take(source, index, spec.block)
                s_BKtGs, slope = _scores(problem, spec.mask, q_BKtGH, k_BKsH, query_Bt, tokens_Bs, offset)
                p_BKtGs = jnp.exp(s_BKtGs.astype(jnp.float32) - lse_BKtG1)
                dv_BKsH = _dot("BKtGs,BKtGH->BKsH", p_BKtGs.astype(do_BKtGH.dtype), do_BKtGH)
                dp_BKtGs = _dot("BKtGH,BKsH->BKtGs", do_BKtGH, v_BKsH)
                ds_BKtGs = (p_BKtGs * (dp_BKtGs - delta_BKtG1) * slope).astype(q_BKtGH.dtype)
                dk_BKsH = _dot("BKtGs,BKtGH->BKsH", ds_BKtGs, q_BKtGH)
                dq_BKtGH += _dot("BKtGs,BKsH->BKtGH", ds_BKtGs, k_BKsH)
                return dq_BKtGH, _add(dk_BKSH, dk_BKsH, index), _add(dv_BKSH, dv_BKsH, index)

            dq_BKtGH, *gradient = jax.lax.fori_loop(first, end, key_block, (dq_BKtGH, *gradient))
            updated.append(tuple(gradient))
        return tuple(updated), dq_BKtGH.astype(q_BKtGH.dtype)

    zeros = tuple((jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)) for k, v, _ in sources)
    inputs = (blocks, do_nBKtGH, delta_nBKtG1, lse_nBKtG1, block_ranges(problem, query, tokens))
    gradients, dq_nBKtGH = jax.lax.scan(query_block, zeros, inputs)
    dkv = tuple(
        tuple(_unpad(d_BKSH, spec.length).astype(x_BSKH.dtype) for d_BKSH, x_BSKH in zip(pair, arrays, strict=True))
        for spec, pair, arrays in zip(problem.sources, gradients, keys_values, strict=True)
    )
    return _merge_queries(dq_nBKtGH, q_BTNH.shape), dkv, None, None, None


_attend.defvjp(_forward_with_residuals, _backward)


def _scores(problem: Problem, mask: Mask, q_BKtGH, k_BKsH, query: Sequences, keys: Sequences, offset: Array | None):
    """Returns the masked scores of two blocks, and their derivative by the product of query and key."""
    s_BKtGs = _dot("BKtGH,BKsH->BKtGs", q_BKtGH, k_BKsH).astype(problem.dtype) * problem.scale
    slope = problem.scale
    if problem.softcap is not None:
        s_BKtGs = problem.softcap * jnp.tanh(s_BKtGs / problem.softcap)
        slope = problem.scale * (1.0 - jnp.square(s_BKtGs.astype(jnp.float32) / problem.softcap))
    if offset is not None:
        s_BKtGs += offset.astype(problem.dtype)
    visible_B1t1s = reference.visible(query, keys, mask)[:, None, :, None, :]
    return jnp.where(visible_B1t1s, s_BKtGs, float(jnp.finfo(problem.dtype).min)), slope


def _start(problem: Problem, q_BKtGH) -> _Running:
    shape = (*q_BKtGH.shape[:-1], 1)
    # far above the score of a hidden key, whose weight is so zero even before a visible key is met
    peak = jnp.full(shape, float(jnp.finfo(problem.dtype).min) / 2, problem.dtype)
    return _Running(peak, jnp.zeros(shape, jnp.float32), jnp.zeros(q_BKtGH.shape, jnp.float32))


def block_ranges(
    problem: Problem, query: Sequences, tokens: Sequence[Sequences]
) -> tuple[tuple[Int[Array, " n"], Int[Array, " n"]], ...]:
    """Returns, for each source, the first block of keys that each block of queries may see, and the end of the last."""
    ranges = []
    for spec, keys in zip(problem.sources, tokens, strict=True):
        needed_nm = jnp.any(_may_see(query, keys, spec, problem.block), axis=0)
        blocks = needed_nm.shape[1]
        seen_n = jnp.any(needed_nm, axis=1)
        first_n = jnp.argmax(needed_nm, axis=1)
        end_n = blocks - jnp.argmax(needed_nm[:, ::-1], axis=1)
        ranges.append((jnp.where(seen_n, first_n, 0), jnp.where(seen_n, end_n, 0)))
    return tuple(ranges)


class _Extent(NamedTuple):
    """Least and greatest value among the tokens of each block, of those that are not hidden from everything."""

    least_Bn: Array
    most_Bn: Array

    @classmethod
    def of(cls, values_BT: Array, counted_BT: Array, block: int) -> "_Extent":
        """Returns the bounds of the counted values; of a block without any, bounds that overlap no others."""
        info = jnp.iinfo(values_BT.dtype)
        least_BT, most_BT = jnp.where(counted_BT, values_BT, info.max), jnp.where(counted_BT, values_BT, info.min)
        least_Bnt = _split_columns(least_BT, block, info.max)
        return cls(jnp.min(least_Bnt, axis=-1), jnp.max(_split_columns(most_BT, block, info.min), axis=-1))

    def overlap(self, keys: "_Extent") -> Array:
        """Returns True where a block of queries and one of keys may hold an equal value."""
        return (self.least_Bn[:, :, None] <= keys.most_Bn[:, None]) & (
            keys.least_Bn[:, None] <= self.most_Bn[:, :, None]
        )


def _may_see(query: Sequences, keys: Sequences, spec: SourceShape, block: int) -> Bool[Array, "B n m"]:
    """Returns False where no query of a block sees a key of another; True does not promise that one does."""
    q_real, k_real = query.segments != 0, keys.segments != 0
    segments = _Extent.of(query.segments, q_real, block), _Extent.of(keys.segments, k_real, spec.block)
    need = segments[0].overlap(segments[1])
    in_block = jnp.zeros_like(need)
    if query.blocks is not None and keys.blocks is not None:
        q_blocks = _Extent.of(query.blocks, q_real & (query.blocks != 0), block)
        in_block = q_blocks.overlap(_Extent.of(keys.blocks, k_real & (keys.blocks != 0), spec.block))
    positions = _Extent.of(query.positions, q_real, block), _Extent.of(keys.positions, k_real, spec.block)
    need &= _within(spec.mask, *positions, in_block)
    if spec.same:
        columns = jnp.broadcast_to(jnp.arange(spec.length), query.segments.shape)
        bounds = _Extent.of(columns, q_real, block), _Extent.of(columns, k_real, spec.block)
        need &= _within(spec.mask, *bounds, in_block) | ~in_order(query)[:, None, None]
    return need


def _within(mask: Mask, query: _Extent, keys: _Extent, in_block: Array) -> Array:
    """Returns False where the mask hides all keys of a block from all queries of another, by bounds of positions."""
    q_least, q_most = query.least_Bn[:, :, None], query.most_Bn[:, :, None]
    k_least, k_most = keys.least_Bn[:, None], keys.most_Bn[:, None]
    within = jnp.ones_like(in_block)
    # the bounds of a block without a counted token are the extremes of int32: sums of two bounds could overflow
    if mask.left is not None:
        within &= k_most >= q_least - mask.left
    if mask.right is not None:
        within &= k_least <= q_most + mask.right
    if mask.causal:
        within &= (k_least <= q_most) | in_block
    return within


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _query_blocks(problem: Problem, q_BTNH, query: Sequences, kv_heads: int):
    """Returns the queries and their tokens with a leading axis of blocks."""
    tokens = jax.tree.map(lambda x_BT: _split_columns(x_BT, problem.block, 0).swapaxes(0, 1), query)
    return _split_queries(problem, q_BTNH, kv_heads), tokens


def _split_queries(problem: Problem, x_BTNH, kv_heads: int) -> Array:
    """Returns x[n, B, K, t, G, H]: queries of one key/value head are the rows of one matrix."""
    x_BTNH = _pad(x_BTNH, 1, problem.block)
    rows, length, heads, size = x_BTNH.shape
    x = x_BTNH.reshape(rows, length // problem.block, problem.block, kv_heads, heads // kv_heads, size)
    return x.transpose(1, 0, 3, 2, 4, 5)


def _merge_queries(x_nBKtGH, shape: tuple[int, ...]) -> Array:
    rows, length, heads, size = shape
    return x_nBKtGH.transpose(1, 0, 3, 2, 4, 5).reshape(rows, -1, heads, size)[:, :length]


def _pad_sources(problem: Problem, keys_values, tokens: tuple[Sequences, ...]):
    """Returns (k[B, K, S, H], v[B, K, S, H], tokens) of each source, padded with segment 0 to whole blocks."""
    return tuple(
        (
            *(_pad(x_BSKH.swapaxes(1, 2), 2, spec.block) for x_BSKH in pair),
            jax.tree.map(lambda x_BS, spec=spec: _pad(x_BS, 1, spec.block), keys),
        )
        for spec, pair, keys in zip(problem.sources, keys_values, tokens, strict=True)
    )


def _take(source, index, block: int):
    """Returns a block of keys, of values, and their tokens."""
    k_BKSH, v_BKSH, tokens = source
    cut = partial(jax.lax.dynamic_slice_in_dim, start_index=index * block, slice_size=block)
    return cut(k_BKSH, axis=2), cut(v_BKSH, axis=2), jax.tree.map(partial(cut, axis=1), tokens)


def _add(total_BKSH, x_BKsH, index) -> Array:
    start = index * x_BKsH.shape[2]
    old = jax.lax.dynamic_slice_in_dim(total_BKSH, start, x_BKsH.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total_BKSH, old + x_BKsH, start, axis=2)


def _unpad(x_BKSH, length: int) -> Array:
    return x_BKSH[:, :, :length].swapaxes(1, 2)


def _pad(x: Array, axis: int, block: int, value: int = 0) -> Array:
    missing = -x.shape[axis] % block
    if not missing:
        return x
    widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


def _split_columns(x_BT, block: int, value: int) -> Array:
    x_BT = _pad(x_BT, 1, block, value)
    return x_BT.reshape(x_BT.shape[0], -1, block)
