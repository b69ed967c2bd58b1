"""Columns of a row in place of positions where the two agree, for kernels that know columns only."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from t5g2.core.batch import Sequences
from t5g2.models.masks import Keys


def in_order(tokens: Sequences) -> Bool[Array, " B"]:
    """Returns True for rows where two tokens of a segment are as many columns apart as positions.

    So are the rows of t5g2.data and prompts; padding may stand anywhere, also within a segment. Segments must be
    numbered from left to right, each in one piece, or the row is not in order.

    segments [0 1 1 2], positions [0 0 1 5]: True; segments [1 0 1], positions [0 0 2]: True, and [0 0 1]: False;
    segments [1 2 1]: False.
    """
    segments, positions = tokens.segments, tokens.positions
    columns = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=positions.dtype), segments.shape)
    latest = jax.lax.cummax(segments, axis=1)  # segment so far
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)))
    first = jax.lax.cummax(jnp.where(segments > before, columns, 0), axis=1)  # column of its first token
    offsets = positions - columns
    alike = (segments == latest) & (offsets == jnp.take_along_axis(offsets, first, axis=1))
    return jnp.all((segments == 0) | alike, axis=1)


def nan_unless_in_order(o_BTNH: Float[Array, "B T N H"], query: Sequences) -> Float[Array, "B T N H"]:
    """Returns attention that was computed by columns; NaN in rows where columns say nothing about positions.

    A run stops at NaN and says so, where the attention of some other mask would go unnoticed.
    """
    return jnp.where(in_order(query)[:, None, None, None], o_BTNH, jnp.nan)


def join(sources: Sequence[Keys]) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns the keys and the values of all sources, one source after the other."""
    keys = jnp.concatenate([source.k_BSKH for source in sources], axis=1)
    return keys, jnp.concatenate([source.v_BSKH for source in sources], axis=1)
