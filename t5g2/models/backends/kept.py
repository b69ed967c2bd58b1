"""Arrays of attention that compute.remat="attention" keeps for the backward pass, beside the input of each block.

Every backend names its output so, and its log-sum-exp if it has one: with both, the backward pass of attention begins
without running its forward pass again.
"""

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

NAME = "attention"
POLICY = jax.checkpoint_policies.save_only_these_names(NAME)


def kept(x: Array) -> Array:
    """Returns x, named as an array to keep."""
    return checkpoint_name(x, NAME)
