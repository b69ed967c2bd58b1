"""Attention over columns that are cut over devices, as the encoder's tokens are over mesh.context; in jax.shard_map.

An encoder's queries and keys are cut alike. Each device keeps its queries, and takes keys from the others: all of them
if its queries may see any, or, in a window, those next to its own (a halo), which neighbours send.

A decoder's queries are whole, and the encoder's keys are cut. A backend that can combine parts of a softmax computes
the part of each device's keys, and the parts meet in a sum over devices: the keys stay where they are. For a kernel
that cannot, keys are gathered and the queries cut instead, as the keys of an encoder's layer are.

Tokens (segments, positions, blocks) are whole on every device; they are integers, and few.

B batch, T queries, S keys of one source, K key/value heads, H head size; C columns on one device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from t5g2.core import sharding
from t5g2.core.batch import Sequences
from t5g2.models.backends import columns
from t5g2.models.masks import ALL, Keys, Mask


class LocalColumns(NamedTuple):
    """Columns on one device: its queries, and the keys of each source that they meet there.

    Attributes:
      own: the source whose tokens are the queries' own, in the order of the queries' columns; None = there is none.
      combined: parts of one softmax are combined over devices.
    """

    queries: int
    keys: tuple[int, ...]
    own: int | None
    combined: bool = False


def local_columns(
    queries: int, keys: Sequence[tuple[int, str]], masks: Sequence[Mask], *, own: int | None, blocks: bool
) -> LocalColumns:
    """Returns the columns on one device of the current mesh.

    Args:
      queries: their number in a row.
      keys: number and logical axis of the keys of each source.
      own: the source whose tokens are the queries' own; they have its axis.
      blocks: queries have block ids.
    """
    lengths = tuple(length for length, _ in keys)
    parts = [sharding.parts(axis, length) for length, axis in keys]
    if own is not None and parts[own] > 1:
        size, reach = queries // parts[own], halo(masks[own], queries // parts[own], parts[own], blocks=blocks)
        return LocalColumns(size, lengths, None) if reach is None else LocalColumns(size, (size + sum(reach),), own)
    most = max(parts)
    # of the keys that are not cut every device takes an equal share
    shares = tuple(math.ceil(length / most) for length in lengths)
    return LocalColumns(queries, shares, own, combined=most > 1)


def halo(mask: Mask, size: int, parts: int, *, blocks: bool) -> tuple[int, int] | None:
    """Returns the numbers of keys before and after a device's own columns that they may see; None = gather all.

    Args:
      size: columns on one device.
      parts: devices that a row is cut over.
      blocks: queries have block ids, in which a causal mask shows keys after the query.
    """
    right = 0 if mask.causal and not blocks else mask.right
    if mask.left is None or right is None or mask.left + right >= (parts - 1) * size:
        return None
    return mask.left, right


def attend_own(
    attend: Callable, q_BCNH: Array, row: Sequences, keys: Keys, mask: Mask, *, axes: Any, parts: int, **options
) -> Array:
    """Returns attention of a device's queries to the tokens of their row, of which it holds keys and values alike.

    By a halo only rows in order can be computed (columns.in_order); others are NaN.

    Args:
      row: the tokens of whole rows.
      axes: mesh axes that columns are cut over, into `parts`.
      options: of `attend`.
    """
    size = q_BCNH.shape[1]
    first = jax.lax.axis_index(axes) * size
    own = _take(row, first, size)
    reach = halo(mask, size, parts, blocks=row.blocks is not None)
    if reach is None:
        return attend(q_BCNH, own, [(_gathered(keys, axes)._replace(tokens=row, offset=first), mask)], **options)
    around = _with_halo(keys, row, first, size, reach, axes=axes, parts=parts)
    return columns.nan_unless_in_order(attend(q_BCNH, own, [(around, mask)], **options), row)


def attend_combined(
    attend: Callable,
    q_BTNH: Array,
    query: Sequences,
    sources: Sequence[tuple[Keys, Mask]],
    cut: Sequence[bool],
    *,
    axes: Any,
    parts: int,
    **options,
) -> Array:
    """Returns attention of whole queries: each device computes a part of the keys, and the parts are combined.

    Args:
      cut: sources of which this device holds its own keys alone; of the others it takes a share.
    """
    index, shares = jax.lax.axis_index(axes), []
    for (keys, mask), here in zip(sources, cut, strict=True):
        size = keys.k_BSKH.shape[1] if here else math.ceil(keys.k_BSKH.shape[1] / parts)
        tokens = _take(_pad(keys.tokens, 0, -keys.tokens.segments.shape[1] % parts), index * size, size)
        k_BSKH, v_BSKH = keys.k_BSKH, keys.v_BSKH
        if not here:
            k_BSKH, v_BSKH = _take(_pad((k_BSKH, v_BSKH), 0, -k_BSKH.shape[1] % parts), index * size, size)
        shares.append((Keys(k_BSKH, v_BSKH, tokens, score_offset=keys.score_offset), mask))
    return attend(q_BTNH, query, shares, combine=axes, **options)


def attend_with_queries_cut(
    attend: Callable,
    q_BTNH: Array,
    query: Sequences,
    sources: Sequence[tuple[Keys, Mask]],
    cut: Sequence[bool],
    *,
    axes: Any,
    parts: int,
    **options,
) -> Array:
    """Returns attention of whole queries, of which each device computes a share over all keys.

    The share has the queries' own tokens in two sources where it needs no halo: those before its first query, which its
    mask never hides, and its own, under the mask. So every mask is known while the program is traced.

    Args:
      cut: sources of which this device holds its own keys alone; they are gathered.
    """
    length = q_BTNH.shape[1]
    whole = [(_gathered(keys, axes) if here else keys, mask) for (keys, mask), here in zip(sources, cut, strict=True)]
    if length % parts:  # every device computes all queries
        return attend(q_BTNH, query, whole, **options)
    size = length // parts
    first = jax.lax.axis_index(axes) * size
    own, shares = _take(query, first, size), []
    for keys, mask in whole:
        if keys.tokens is not query:
            shares.append((keys, mask))
        elif mask == ALL:
            shares.append((keys._replace(offset=first), mask))
        elif mask.left is None:
            before = jnp.arange(length, dtype=jnp.int32)[None, :] < first
            earlier = query._replace(segments=jnp.where(before, query.segments, 0))
            k_BCKH, v_BCKH = _take((keys.k_BSKH, keys.v_BSKH), first, size)
            mine = Keys(k_BCKH, v_BCKH, own)
            shares += [(keys._replace(tokens=earlier), ALL), (mine, mask)]
        else:
            reach = mask.left, mask.right or 0
            padded = _pad((keys.k_BSKH, keys.v_BSKH, query), *reach)
            k_BSKH, v_BSKH, tokens = _take(padded, first, size + sum(reach))
            shares.append((Keys(k_BSKH, v_BSKH, tokens, offset=mask.left), mask))
    o_BCNH = columns.nan_unless_in_order(attend(_take(q_BTNH, first, size), own, shares, **options), query)
    return jax.lax.all_gather(o_BCNH, axes, axis=1, tiled=True)


def _with_halo(
    keys: Keys, row: Sequences, first: Array, size: int, reach: tuple[int, int], *, axes: Any, parts: int
) -> Keys:
    """Returns a device's keys with those that `reach` columns before and after them have; padding at the ends."""
    left, right = reach

    def around(x_BCKH: Array) -> Array:
        before = _from_neighbours(x_BCKH, left, axes, parts, before=True)
        after = _from_neighbours(x_BCKH, right, axes, parts, before=False)
        return jnp.concatenate([*before, x_BCKH, *after], axis=1)

    tokens = _take(_pad(row, left, right), first, left + size + right)
    return Keys(around(keys.k_BSKH), around(keys.v_BSKH), tokens, offset=left)


def _from_neighbours(x_BCKH: Array, number: int, axes: Any, parts: int, *, before: bool) -> list[Array]:
    """Returns the columns before, or after, a device's own, from as many neighbours as have them; zeros past an end."""
    size, pieces = x_BCKH.shape[1], []
    for hop in range(1, math.ceil(number / size) + 1):
        width = min(size, number - (hop - 1) * size)
        ends = [(i, i + hop) for i in range(parts - hop)]
        piece = x_BCKH[:, size - width :] if before else x_BCKH[:, :width]
        pieces.append(jax.lax.ppermute(piece, axes, ends if before else [(to, i) for i, to in ends]))
    return pieces[::-1] if before else pieces


def _gathered(keys: Keys, axes: Any) -> Keys:
    """Returns the keys and values of all devices."""
    k_BSKH, v_BSKH = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in (keys.k_BSKH, keys.v_BSKH))
    return Keys(k_BSKH, v_BSKH, keys.tokens)


def _take(tree: Any, first: Array, size: int) -> Any:
    """Returns `size` columns of every array, from column `first` on."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, axis=1), tree)


def _pad(tree: Any, before: int, after: int) -> Any:
    """Returns every array with zeros before its first and after its last column; segment 0 is padding."""
    return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2)), tree)
