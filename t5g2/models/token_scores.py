"""Losses of tokens, and gradients of their logits, as both strategies of the loss head compute them.

B rows, T length; R groups of rows, K tokens in one group. Logits have the shape [R, K, …], where … is the vocabulary,
or a block of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Bool, Float

from t5g2.models.distillation import TeacherOutputs
from t5g2.models.layers import Head
from t5g2.models.loss_config import LossConfig


class TokenLosses(NamedTuple):
    """Losses of single tokens, not weighted; without a gradient.

    Attributes:
      loss_BT: float32, -log p(target), in nats.
      z_BT: float32, the square of the log of the partition function.
      correct_BT: True where no token has a higher logit than the target, so of several highest ones each is correct.
      divergence_BT: float32, from the teacher's distribution, 0 where it has none; None = there is no teacher.
    """

    loss_BT: Float[Array, "B T"]
    z_BT: Float[Array, "B T"]
    correct_BT: Bool[Array, "B T"]
    divergence_BT: Float[Array, "B T"] | None = None


class TargetMixture(NamedTuple):
    """The teacher's part of the targets.

    Attributes:
      has_teacher_RK: True where the teacher has a distribution.
      probs: its probabilities, in the shape of the logits.
    """

    has_teacher_RK: Array
    probs: Array


@jax.tree_util.register_static
@dataclass(frozen=True)
class Needed:
    """The gradients that somebody reads: those of a frozen table, or of states of frozen layers, are not computed."""

    hidden: bool
    table: bool


def scores(lse, target, top, dtype) -> TokenLosses:
    """Returns the losses of tokens of any shape, from the log-sum-exp of their logits, the target's and the largest."""
    lse, target, top = (x.astype(dtype) for x in (lse, target, top))
    loss, z = ((x).astype(jnp.float32) for x in (lse - target, jnp.square(lse)))
    return TokenLosses(loss, z, target >= top)


def softcapped(y, softcap: float | None):
    """Returns softcap * tanh(y / softcap); None = y."""
    return y if softcap is None else softcap * jnp.tanh(y / softcap)


def logit_gradients(
    y, lse_RK, is_target, weights_RK, mixture: TargetMixture | None, softcap: float | None, config: LossConfig
):
    """Returns the gradient of the weighted loss by logits y before the softcap.

    Without a teacher it is weight * ((1 + 2 z_loss lse) p - onehot); with one, onehot becomes the mixture
    (1 - share) onehot + share * soft targets.

    Args:
      y: logits after the softcap, in config.dtype, as is lse_RK.
      is_target: bool, in the shape of y.
    """
    p = jnp.exp(y - _per_token(lse_RK, y))
    onehot_weight_RK = weights_RK.astype(p.dtype)
    # d lse / d logits = p, so the z-loss only scales p
    dy = _per_token(onehot_weight_RK * (1.0 + 2.0 * config.z_loss * lse_RK), y) * p
    if mixture is not None:
        assert config.distillation is not None
        share_RK = jnp.where(mixture.has_teacher_RK, config.distillation.weight, 0.0).astype(p.dtype)
        dy = dy - _per_token(share_RK * onehot_weight_RK, y) * mixture.probs.astype(p.dtype)
        onehot_weight_RK = (1.0 - share_RK) * onehot_weight_RK
    dy = jnp.where(is_target, dy - _per_token(onehot_weight_RK, y), dy)
    # the derivative of softcap * tanh(x / softcap), by its value y
    return dy if softcap is None else dy * (1.0 - jnp.square(y / softcap))


def weighted_total(tokens: TokenLosses, weights_BT, teacher: TeacherOutputs | None, config: LossConfig):
    """Returns the objective: the sum of weighted losses, with the teacher's share and the z-loss."""
    loss_BT = tokens.loss_BT
    if teacher is not None and config.distillation is not None and tokens.divergence_BT is not None:
        share = config.distillation.weight
        mixed_BT = (1.0 - share) * loss_BT + share * tokens.divergence_BT
        loss_BT = jnp.where(teacher.has_teacher_BT, mixed_BT, loss_BT)
    return jnp.sum(weights_BT * (loss_BT + config.z_loss * tokens.z_BT))


def objective(token_losses: Callable) -> Any:
    """Returns `total` of a strategy: the objective and the losses of single tokens, of (hidden_BTD, table_VD, …).

    It is differentiable by hidden_BTD and table_VD; the strategy defines how (`defvjp`).
    """

    @partial(jax.custom_vjp, nondiff_argnums=(5, 6))
    def total(
        hidden_BTD,
        table_VD,
        targets_BT,
        weights_BT,
        teacher: TeacherOutputs | None,
        softcap: float | None,
        config: LossConfig,
    ) -> tuple[Array, TokenLosses]:
        tokens = token_losses(hidden_BTD, Head(table_VD, softcap), targets_BT, teacher, config)
        return weighted_total(tokens, weights_BT, teacher, config), tokens

    return total


def unwrap(arguments: tuple) -> tuple[tuple, Needed]:
    """Returns the values of a custom_vjp with symbolic zeros, (hidden, table, …), and the gradients that are needed."""
    needed = Needed(arguments[0].perturbed, arguments[1].perturbed)
    is_primal = lambda x: isinstance(x, CustomVJPPrimal)  # noqa: E731
    return jax.tree.map(lambda x: x.value if is_primal(x) else x, arguments, is_leaf=is_primal), needed


def cotangent_of_total(cotangents: Any):
    """Returns the cotangent of `total` in (total, tokens); float32[]. Those of single tokens are not propagated."""
    scale = cotangents[0]
    return jnp.zeros(()) if isinstance(scale, SymbolicZero) else scale


def _per_token(x_RK, y):
    return x_RK.reshape(*x_RK.shape, *(1,) * (y.ndim - x_RK.ndim))
