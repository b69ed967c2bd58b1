"""The lookup of tokens in a table of embeddings, on a mesh.

B rows, T length, D width, V vocabulary; R groups of rows, K tokens of one group.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5g2.core.sharding import constrain, sum_groups
from t5g2.models.token_groups import split_into_groups


# a gradient of our own: that of the gathered table would be summed whole, on every device
@jax.custom_vjp
def look_up(table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Returns the rows of the table."""
    # each row is gathered whole: in a table that is sharded along both axes, a lookup would make XLA gather the tokens
    # of all devices
    return constrain(table_VD, "vocab_act", None)[tokens_BT]


def _forward(table, tokens):
    return look_up(table.value, tokens.value), (table.value if table.perturbed else None, tokens.value)


def _gradient(residuals, gradient_BTD):
    table_VD, tokens_BT = residuals
    if table_VD is None or isinstance(gradient_BTD, jax.custom_derivatives.SymbolicZero):
        return None, None
    # each group adds up its own, and the groups are summed once, as in the loss head
    tokens_RK, gradient_RKD = split_into_groups(tokens_BT), split_into_groups(gradient_BTD)
    zeros_VD = jnp.zeros(table_VD.shape, table_VD.dtype)
    sums_RVD = jax.vmap(lambda tokens, gradients: zeros_VD.at[tokens].add(gradients))(tokens_RK, gradient_RKD)
    return sum_groups(constrain(sums_RVD, "rows", "vocab_act", None)), None


look_up.defvjp(_forward, _gradient, symbolic_zeros=True)
