"""Attention by the TPU kernel of jax (jax.experimental.pallas.ops.tpu.splash_attention), forward and backward.

All sources are one sequence of keys, the queries' own last, under one mask that the kernel computes from columns: a key
of another source is visible, one of the queries' own as the mask says. Blocks that it hides are not computed. Segments,
of different lengths for queries and keys, hide other examples of a packed row.

Columns stand for positions, so the positions of a segment must rise by one from column to column, as they do in the
rows of t5g2.data and in prompts. A row where they do not gets NaN, not the attention of some other mask.

Compiled for TPU v5e and v5p by their compiler, and compared with the reference in the kernel's interpreter (tests); it
has not run on a TPU yet.

B batch, T queries, S keys of all sources, N query heads, K key/value heads, G = N / K, H head size.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from t5g2.core.batch import Sequences
from t5g2.models import kept
from t5g2.models.backends import columns
from t5g2.models.backends.site import Site
from t5g2.models.masks import ALL, Keys, Mask

LANES = 128  # of a TPU vector: lengths of blocks and heads are multiples of it
BLOCK = 512  # queries and keys of a block, if there are as many; the sizes that MaxText's Gemma recipes begin with


def refusal(site: Site) -> str | None:
    """Returns why the kernel cannot compute attention at this site; None if it can."""
    if site.score_offset:
        return "it adds nothing to the scores of a source"
    if site.blocks:
        return "its masks know no blocks of images or prefixes"
    if not site.columns_suffice:
        return "the keys, of a cache or of a row that is cut over devices, are not in the order of the queries' columns"
    if site.head_size % LANES:
        return f"its heads are multiples of {LANES} long, and these are {site.head_size}"
    return None


def attend(
    q_BTNH: Float[Array, "B T N H"],
    query: Sequences,
    sources: Sequence[tuple[Keys, Mask]],
    *,
    scale: float,
    softcap: float | None,
    dtype: str,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Returns what `reference.attend` returns, up to rounding; the softmax is float32 whatever `dtype` is.

    Args:
      interpret: run the kernel's interpreter instead, on any device and slowly.
    """
    # imported late: the kernels are for TPUs only, and their import takes about a second
    from jax.experimental.pallas.ops.tpu import splash_attention

    assert all(keys.score_offset is None for keys, _ in sources)
    del dtype
    own = [(keys, mask) for keys, mask in sources if _offset(keys, query) is not None]
    others = [keys for keys, _ in sources if _offset(keys, query) is None]
    ordered = [*others, *(keys for keys, _ in own)]
    rows, length, heads, size = q_BTNH.shape
    kv_heads = ordered[0].k_BSKH.shape[2]
    before = sum(keys.k_BSKH.shape[1] for keys in others)
    offset = (_offset(own[0][0], query) or 0) if own else 0
    k_BKSH, v_BKSH = (x_BSKH.swapaxes(1, 2) for x_BSKH in columns.join(ordered))
    k_segments_BS = jnp.concatenate([keys.tokens.segments for keys in ordered], axis=1)
    # the kernel knows no scale
    q_BKGTH = (q_BTNH * scale).astype(q_BTNH.dtype).reshape(rows, length, kv_heads, -1, size).transpose(0, 2, 3, 1, 4)
    q_BKGTH, k_BKSH, v_BKSH = _pad(q_BKGTH, 3), _pad(k_BKSH, 2), _pad(v_BKSH, 2)
    # padding is no segment of its own here: what its queries see is set to zero below
    segment_ids = splash_attention.SegmentIds(_pad(query.segments, 1), _pad(k_segments_BS, 1))
    kernel = _kernel(
        (q_BKGTH.shape[3], k_BKSH.shape[2]),
        before,
        offset,
        own[0][1] if own else ALL,
        heads // kv_heads,
        softcap=softcap,
        interpret=interpret,
    )
    o_BKGTH = jax.vmap(jax.vmap(kernel, in_axes=(0, 0, 0, None)))(q_BKGTH, k_BKSH, v_BKSH, segment_ids)
    o_BTNH = o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(rows, -1, heads, size)[:, :length]
    o_BTNH = jnp.where(_sees_any(query, ordered)[:, :, None, None], o_BTNH, 0)
    if not own or own[0][1] == ALL:
        return o_BTNH
    return columns.nan_unless_in_order(o_BTNH, query)


def _offset(keys: Keys, query: Sequences) -> int | None:
    """Returns the column of these keys that the queries' own begin at, if it is known while tracing; else None."""
    if keys.tokens is query:
        return 0
    return keys.offset if isinstance(keys.offset, int) else None


def _sees_any(query: Sequences, sources: Sequence[Keys]) -> Bool[Array, "B T"]:
    """Returns False for padding, and for queries whose segment is in no source; a query in order sees itself."""
    seen_BT = jnp.zeros(query.segments.shape, bool)
    for keys in sources:
        if keys.tokens is query or keys.offset is not None:
            return query.segments != 0
        # a comparison of all pairs of segments that XLA reduces as it makes it
        seen_BT |= jnp.any(query.segments[:, :, None] == keys.tokens.segments[:, None, :], axis=-1)
    return seen_BT & (query.segments != 0)


def _kernel(
    shape: tuple[int, int],
    before: int,
    offset: int,
    mask: Mask,
    heads: int,
    *,
    softcap: float | None,
    interpret: bool,
) -> Any:
    """Returns the kernel of queries and keys for query heads that share one key/value head.

    Args:
      before: keys of other sources, which precede those of the queries' own.
      offset: the latter's number before the first query.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    visible: Any = splash.FullMask(shape) if mask == ALL else _columns_mask(mask, shape, before, offset)
    q_block, k_block = map(_block, shape)
    blocks = splash.BlockSizes(
        block_q=q_block,
        block_kv=k_block,
        block_q_dkv=q_block,
        block_kv_dkv=k_block,
        block_q_dq=q_block,
        block_kv_dq=k_block,
    )
    return splash.make_splash_mqa_single_device(
        splash.MultiHeadMask([visible] * heads),
        block_sizes=blocks,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=kept.ATTENTION,
        interpret=interpret,
    )


# one object for equal masks: jax keeps the tables of visible blocks, which take long to make, by the mask's identity
@functools.lru_cache(maxsize=64)
def _columns_mask(mask: Mask, shape: tuple[int, int], before: int, offset: int = 0) -> Any:
    """Returns a mask that the kernel computes: the first `before` keys, and of the others what `mask` shows.

    Args:
      offset: keys of the others before the first query's own.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    class ColumnsMask(splash.LocalMask):
        def __init__(self):
            super().__init__(shape, (mask.left, mask.right), -first_own)
            self.mask_function = visible

        def __eq__(self, other: object) -> bool:
            return self is other

        def __hash__(self) -> int:
            return id(self)

        def __getitem__(self, index) -> np.ndarray:
            # the kernel's tables ask for every block of a row: those that are visible or hidden as a whole, which are
            # nearly all of them, are known from their corners
            queries, keys = index
            lowest, highest = keys.start - first_own - (queries.stop - 1), keys.stop - 1 - first_own - queries.start
            if keys.stop <= before or (keys.start >= before and first <= lowest and highest <= last):
                return _whole((queries.stop - queries.start, keys.stop - keys.start), True)
            if keys.start >= before and (highest < first or lowest > last):
                return _whole((queries.stop - queries.start, keys.stop - keys.start), False)
            return super().__getitem__(index)

    first_own = before + offset
    first = -math.inf if mask.left is None else -mask.left
    last = min(0 if mask.causal else math.inf, math.inf if mask.right is None else mask.right)

    def visible(q, k):
        ahead = k - first_own - q
        conditions = [ahead <= 0] if mask.causal else []
        if mask.left is not None:
            conditions.append(ahead >= -mask.left)
        if mask.right is not None:
            conditions.append(ahead <= mask.right)
        return functools.reduce(operator.and_, conditions) | (k < before)

    return ColumnsMask()


@functools.cache
def _whole(shape: tuple[int, int], value: bool) -> np.ndarray:
    return np.full(shape, value)


def _block(length: int) -> int:
    """Returns the greatest block up to BLOCK that divides a padded length."""
    return next(block for block in range(min(BLOCK, length), 0, -LANES) if length % block == 0)


def _pad(x: Array, axis: int) -> Array:
    widths = [(0, -x.shape[axis] % LANES if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths)
