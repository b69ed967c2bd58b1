"""Layout of the loss head's tokens: groups, one for each device that tokens are split over, and tiles of them.

B rows, T length; R groups of tokens, K tokens of a tile in one group. A group has all columns of its rows; where the
mesh cuts columns, an equal part of them. A tile takes equally many positions of every row of a group, so no token moves
between devices.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from t5g2.core import sharding
from t5g2.core.sharding import constrain


def group_counts(rows: int) -> tuple[int, int]:
    """Returns the number of groups that rows are split into, and of parts that the columns of each are split into."""
    return sharding.parts("rows", rows), sharding.devices("group_columns")


def split_into_tiles(arrays: tuple[Array, ...], tile_tokens: int) -> tuple[Array, ...]:
    """Returns [B, T, …] as tiles [n, R, K, …] of T / n positions of every row; zeros pad T to a multiple of n."""
    rows, length = arrays[0].shape[:2]
    groups, parts = group_counts(rows)
    columns = math.ceil(length / parts)
    tiles, width = _tile_shape(rows // groups, columns, tile_tokens)

    def split(x):
        inner = x.shape[2:]
        x = jnp.pad(x, [(0, 0), (0, parts * columns - length)] + [(0, 0)] * len(inner))
        x = x.reshape(groups, rows // groups, parts, columns, *inner)
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, tiles * width - columns)] + [(0, 0)] * len(inner))
        # the axis of tiles first: every tile has positions of all rows, and no row moves
        x = x.reshape(groups, rows // groups, parts, tiles, width, *inner)
        x = jnp.moveaxis(x, (3, 2), (0, 2)).reshape(tiles, groups * parts, rows // groups * width, *inner)
        return constrain(x, None, "groups", *(None,) * (x.ndim - 2))

    return tuple(split(x) for x in arrays)


def merge_tiles(x: Array, shape: tuple[int, ...], *, axis: str = "length") -> Array:
    """Returns [n, R, K, …] as [B, T, …] without the padding: the inverse of `split_into_tiles`.

    Args:
      axis: logical axis of T.
    """
    rows, length = shape
    tiles, _, _, *inner = x.shape
    groups, parts = group_counts(rows)
    x = x.reshape(tiles, groups, parts, rows // groups, -1, *inner)
    x = jnp.moveaxis(x, (0, 2), (3, 2)).reshape(groups, rows // groups, parts, -1, *inner)
    columns = math.ceil(length / parts)
    x = x[:, :, :, :columns].reshape(rows, parts * columns, *inner)[:, :length]
    return constrain(x, "rows", axis, *(None,) * (x.ndim - 2))


def split_into_groups(x: Array) -> Array:
    """Returns [B, T, …] as [R, K, …], all tokens of each group."""
    (x,) = split_into_tiles((x,), x.shape[0] * x.shape[1])
    return x[0]


def merge_groups(x: Array, shape: tuple[int, ...], *, axis: str = "length") -> Array:
    """Returns [R, K, …] as [B, T, …]: the inverse of `split_into_groups`."""
    return merge_tiles(x[None], shape, axis=axis)


def token_keys(key: Array, shape: tuple[int, ...], tile_tokens: int) -> Array:
    """Returns a key for each token, in tiles: the sample of a token does not depend on the size of tiles."""
    data_BTW = jax.random.key_data(jax.random.split(key, shape))
    (data_nRKW,) = split_into_tiles((data_BTW,), tile_tokens)
    return jax.random.wrap_key_data(data_nRKW, impl=jax.random.key_impl(key))


def _tile_shape(rows: int, length: int, tile_tokens: int) -> tuple[int, int]:
    """Returns the number of tiles and their positions per row: as few equal tiles as tile_tokens allows."""
    tiles = math.ceil(length / max(1, min(length, tile_tokens // rows)))
    return tiles, math.ceil(length / tiles)
