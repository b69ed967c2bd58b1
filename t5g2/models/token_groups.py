"""Layout of the loss head's tokens: groups of rows, one for each device that rows are split over, and tiles of them.

B rows, T length; R groups of rows, K tokens of a tile in one group. A tile takes equally many positions of every row,
so no row moves between devices.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from t5g2.core import sharding
from t5g2.core.sharding import constrain


def split_into_tiles(arrays: tuple[Array, ...], tile_tokens: int) -> tuple[Array, ...]:
    """Returns [B, T, …] as tiles [n, R, K, …] of T / n positions of every row; zeros pad T to a multiple of n."""
    rows, length = arrays[0].shape[:2]
    groups = sharding.parts("rows", rows)
    tiles, width = _tile_shape(rows // groups, length, tile_tokens)

    def split(x):
        inner = x.shape[2:]
        x = jnp.pad(x, [(0, 0), (0, tiles * width - length)] + [(0, 0)] * len(inner))
        # [R, B/R, n, T/n, …], then the axis of tiles first: every tile has positions of all rows, and no row moves
        x = jnp.moveaxis(x.reshape(groups, rows // groups, tiles, width, *inner), 2, 0)
        x = x.reshape(tiles, groups, rows // groups * width, *inner)
        return constrain(x, None, "rows", *(None,) * (x.ndim - 2))

    return tuple(split(x) for x in arrays)


def merge_tiles(x: Array, shape: tuple[int, ...]) -> Array:
    """Returns [n, R, K, …] as [B, T, …] without the padding: the inverse of `split_into_tiles`."""
    rows, length = shape
    tiles, groups, _, *inner = x.shape
    x = jnp.moveaxis(x.reshape(tiles, groups, rows // groups, -1, *inner), 0, 2)
    x = x.reshape(rows, -1, *inner)[:, :length]
    return constrain(x, "rows", *(None,) * (x.ndim - 1))


def split_into_groups(x: Array) -> Array:
    """Returns [B, T, …] as [R, K, …], all tokens of each group."""
    (x,) = split_into_tiles((x,), x.shape[0] * x.shape[1])
    return x[0]


def merge_groups(x: Array, shape: tuple[int, ...]) -> Array:
    """Returns [R, K, …] as [B, T, …]: the inverse of `split_into_groups`."""
    return merge_tiles(x[None], shape)


def token_keys(key: Array, shape: tuple[int, ...], tile_tokens: int) -> Array:
    """Returns a key for each token, in tiles: the sample of a token does not depend on the size of tiles."""
    data_BTW = jax.random.key_data(jax.random.split(key, shape))
    (data_nRKW,) = split_into_tiles((data_BTW,), tile_tokens)
    return jax.random.wrap_key_data(data_nRKW, impl=jax.random.key_impl(key))


def _tile_shape(rows: int, length: int, tile_tokens: int) -> tuple[int, int]:
    """Returns the number of tiles and their positions per row: as few equal tiles as tile_tokens allows."""
    tiles = math.ceil(length / max(1, min(length, tile_tokens // rows)))
    return tiles, math.ceil(length / tiles)
