"""Columns of a row in place of positions where the two agree, for kernels that know columns only."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from t5g2.core.batch import Sequences
from t5g2.models.masks import Keys


def in_order(tokens: Sequences) -> Bool[Array, " B"]:
    """Returns True for rows where the positions of every segment rise by one from column to column.

    There two tokens of a segment are as many columns apart as positions. Padding may stand anywhere, also in front.
    """
    segments, positions = tokens.segments, tokens.positions
    before, after = segments[:, :-1], segments[:, 1:]
    follows = positions[:, 1:] == positions[:, :-1] + 1
    # segments are numbered from left to right, so one that is not greater than all before it would go on after a gap
    begins = after > jax.lax.cummax(before, axis=1)
    return jnp.all((after == 0) | jnp.where(after == before, follows, begins), axis=1)


def nan_unless_in_order(o_BTNH: Float[Array, "B T N H"], query: Sequences) -> Float[Array, "B T N H"]:
    """Returns attention that was computed by columns; NaN in rows where columns say nothing about positions.

    A run stops at NaN and says so, where the attention of some other mask would go unnoticed.
    """
    return jnp.where(in_order(query)[:, None, None, None], o_BTNH, jnp.nan)


def join(sources: Sequence[Keys]) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns the keys and the values of all sources, one source after the other."""
    keys = jnp.concatenate([source.k_BSKH for source in sources], axis=1)
    return keys, jnp.concatenate([source.v_BSKH for source in sources], axis=1)
