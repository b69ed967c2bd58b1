"""The lookup of tokens in a table of embeddings, on a mesh.

B rows, T length, D width, V vocabulary; R groups of rows, K tokens of one group.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5g2.core import tree
from t5g2.core.sharding import TABLE, constrain, sum_groups
from t5g2.core.tree import Tree
from t5g2.models.token_groups import group_counts, merge_groups, split_into_groups


def look_up(table: Array, tokens_BT: Int[Array, "B T"], *, axis: str = "length") -> Float[Array, "B T D"]:
    """Returns the rows of the table.

    Args:
      table: [V, D], or [R, V, D] of `share_tables`.
      axis: logical axis of T.
    """
    if table.ndim == 2:
        return _look_up(table, tokens_BT)
    x_RKD = jax.vmap(lambda table_VD, tokens_K: table_VD[tokens_K])(table, split_into_groups(tokens_BT))
    return merge_groups(constrain(x_RKD, "groups", None, None), tokens_BT.shape, axis=axis)


def share_tables(params: Tree, rows: int, *, dtype: Any) -> Tree:
    """Returns a model whose [V, D] tables are float32[R, V, D], a copy for each group of tokens, gathered in `dtype`.

    So one gather serves all lookups and the head, and the gradients that each group adds up for all of these are summed
    over groups once. Every device holds its own group's copy. On one device the model is returned as it is.

    Args:
      rows: rows of the batch.
    """
    groups = math.prod(group_counts(rows))
    if groups == 1:
        return params
    leaves, structure = jax.tree.flatten(params)
    axes = tree.axes(params)
    tables = (_copies(x, groups, dtype) if of == TABLE else x for x, of in zip(leaves, axes, strict=True))
    return jax.tree.unflatten(structure, tables)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copies(table_VD, groups: int, dtype):
    # rounded before it is gathered; float32 again for the sake of its gradient, and rounded once more where it is used,
    # which XLA leaves out
    gathered_VD = constrain(table_VD.astype(dtype), "vocab_act", None)
    copies_RVD = jnp.broadcast_to(gathered_VD[None], (groups, *table_VD.shape))
    return constrain(copies_RVD, "groups", "vocab_act", None).astype(jnp.float32)


def _copies_forward(table_VD, groups: int, dtype):
    return _copies(table_VD, groups, dtype), jnp.zeros((), table_VD.dtype)


def _sum_of_copies(groups: int, dtype, like, gradient_RVD):
    del groups, dtype
    return (sum_groups(constrain(gradient_RVD, "groups", "vocab_act", None)).astype(like.dtype),)


_copies.defvjp(_copies_forward, _sum_of_copies)


# a gradient of our own: that of the gathered table would be summed whole, on every device
@jax.custom_vjp
def _look_up(table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    # each row is gathered whole: in a table that is sharded along both axes, a lookup would make XLA gather the tokens
    # of all devices
    return constrain(table_VD, "vocab_act", None)[tokens_BT]


def _forward(table, tokens):
    return _look_up(table.value, tokens.value), (table.value if table.perturbed else None, tokens.value)


def _gradient(residuals, gradient_BTD):
    table_VD, tokens_BT = residuals
    if table_VD is None or isinstance(gradient_BTD, jax.custom_derivatives.SymbolicZero):
        return None, None
    # each group adds up its own, and the groups are summed once, as in the loss head
    tokens_RK, gradient_RKD = split_into_groups(tokens_BT), split_into_groups(gradient_BTD)
    zeros_VD = jnp.zeros(table_VD.shape, table_VD.dtype)
    sums_RVD = jax.vmap(lambda tokens, gradients: zeros_VD.at[tokens].add(gradients))(tokens_RK, gradient_RKD)
    return sum_groups(constrain(sums_RVD, "groups", "vocab_act", None)), None


_look_up.defvjp(_forward, _gradient, symbolic_zeros=True)
