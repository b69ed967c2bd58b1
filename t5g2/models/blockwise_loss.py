"""The loss head in vocabulary blocks: the logits of all tokens for some rows of the table at a time.

B rows, T length, D width, V vocabulary; R groups of rows, K tokens of one group; S parts of the vocabulary (one per
device that it is sharded over), C rows of a block in one part.

The forward pass keeps a running log-sum-exp (Milakov and Gimelshein, arXiv 1805.02867) and the logit of the target. The
backward pass, our own, computes the logits of a block once more, and from them and the log-sum-exp the block's part of
both gradients. No array is larger than a block of logits, beside the gradients that are returned.

Sharding: rows stay where they are, and every part of the vocabulary keeps sums of its own, which are combined once,
after the last block; so is the gradient of the states. What FSDP shards is gathered block by block, and a block of the
table's gradient is complete, so it is summed over groups, and scattered, at once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from t5g2.core.sharding import constrain, constrain_table
from t5g2.models import block_targets
from t5g2.models.distillation import TeacherOutputs
from t5g2.models.layers import Head
from t5g2.models.loss_config import LossConfig
from t5g2.models.token_groups import merge_groups, split_into_groups
from t5g2.models.token_scores import (
    Needed,
    TargetMixture,
    TokenLosses,
    cotangent_of_total,
    logit_gradients,
    objective,
    scores,
    unwrap,
    weighted_total,
)
from t5g2.models.vocabulary_blocks import RunningSum, block_logits, make_blocks


class _TokenStatistics(NamedTuple):
    """Statistics of each token that the backward pass needs, float32[R, K]: of its logits, and of the teacher's."""

    lse_RK: Array
    teacher: Any


def token_losses(hidden_BTD, head: Head, targets_BT, teacher: TeacherOutputs | None, config: LossConfig) -> TokenLosses:
    """Returns the losses of single tokens, without the work for gradients."""
    return _forward(hidden_BTD, head, targets_BT, teacher, config)[0]


def _forward(
    hidden_BTD, head: Head, targets_BT, teacher: TeacherOutputs | None, config: LossConfig
) -> tuple[TokenLosses, _TokenStatistics]:
    x_RKD, targets_RK = split_into_groups(hidden_BTD), split_into_groups(targets_BT)
    blocks = make_blocks(head.table_VD, x_RKD, config)
    table_SPD = blocks.split(head.table_VD)
    soft = block_targets.make(teacher, blocks, config)

    def add(sums, block):
        running, target_RKS, soft_sums = sums
        y_RKSC = block_logits(x_RKD, blocks.rows(table_SPD, block, x_RKD.dtype), head.softcap).astype(config.dtype)
        columns_RKS = blocks.columns(targets_RK, block)
        # looked up among the very logits that the largest is taken of, so that `correct` compares equal bits
        found_RKS = jnp.take_along_axis(y_RKSC, jnp.clip(columns_RKS, 0, blocks.size - 1)[..., None], axis=-1)[..., 0]
        found_RKS = jnp.where(blocks.is_new(columns_RKS, block), found_RKS, jnp.zeros_like(found_RKS))
        running = running.add(blocks.only_new(y_RKSC, block, -jnp.inf))
        if soft is not None:
            soft_sums = soft.add(soft_sums, y_RKSC.astype(jnp.float32), block)
        return (running, target_RKS + found_RKS.astype(jnp.float32), soft_sums), None

    start = RunningSum.start((*targets_RK.shape, blocks.parts))
    sums = start, start.sums_RKS[0], None if soft is None else soft.start(start)
    (running, target_RKS, soft_sums), _ = jax.lax.scan(add, sums, jnp.arange(blocks.count))
    top_RK, (sum_RK,) = running.combined()
    # rounded as a single pass in this dtype would be
    lse_RK = (top_RK + jnp.log(sum_RK)).astype(config.dtype)
    tokens, statistics = scores(lse_RK, jnp.sum(target_RKS, axis=-1), top_RK, config.dtype), None
    if soft is not None:
        divergence_RK, statistics = soft.finish(soft_sums, lse_RK.astype(jnp.float32))
        tokens = tokens._replace(divergence_BT=jnp.where(soft.has_teacher_RK, divergence_RK, 0.0))
    tokens = jax.tree.map(lambda x_RK: merge_groups(x_RK, targets_BT.shape), tokens)
    return tokens, _TokenStatistics(lse_RK, statistics)


def _total_and_residuals(hidden, table, targets, weights, teacher, softcap, config: LossConfig):
    values, needed = unwrap((hidden, table, targets, weights, teacher))
    hidden_BTD, table_VD, targets_BT, weights_BT, teacher = values
    tokens, statistics = _forward(hidden_BTD, Head(table_VD, softcap), targets_BT, teacher, config)
    return (weighted_total(tokens, weights_BT, teacher, config), tokens), (values, statistics, needed)


def _gradients(softcap: float | None, config: LossConfig, residuals, cotangents):
    """Returns the gradients by hidden_BTD and table_VD, and None for one that nobody reads: the backward pass."""
    (hidden_BTD, table_VD, targets_BT, weights_BT, teacher), statistics, needed = residuals
    weights_BT = cotangent_of_total(cotangents) * weights_BT
    x_RKD, targets_RK, weights_RK = map(split_into_groups, (hidden_BTD, targets_BT, weights_BT))
    blocks = make_blocks(table_VD, x_RKD, config)
    table_SPD = blocks.split(table_VD)
    soft = block_targets.make(teacher, blocks, config)
    # the gradient of the table is a faster product with the states' transpose (on a CPU by a fifth), and the barriers
    # keep XLA from undoing it
    x_DRK = jax.lax.optimization_barrier(jnp.moveaxis(x_RKD, -1, 0))

    def add(gradients, block):
        dx_SRKD, dw_SPD = gradients
        w_SCD = blocks.rows(table_SPD, block, x_RKD.dtype)
        y_RKSC = block_logits(x_RKD, w_SCD, softcap).astype(config.dtype)
        columns_C = jnp.arange(blocks.size, dtype=jnp.int32).reshape(1, 1, 1, -1)
        is_target_RKSC = blocks.columns(targets_RK, block)[..., None] == columns_C
        mixture = None
        if soft is not None:
            probs_RKSC = soft.probs(y_RKSC.astype(jnp.float32), block, statistics.teacher)
            mixture = TargetMixture(soft.has_teacher_RK, probs_RKSC)
        dy_RKSC = logit_gradients(y_RKSC, statistics.lse_RK, is_target_RKSC, weights_RK, mixture, softcap, config)
        dy_RKSC = constrain(dy_RKSC, "groups", None, "vocab_act", None).astype(x_RKD.dtype)
        if needed.hidden:
            w_SCD = blocks.only_new(w_SCD, block, 0.0, axis=1)
            more_SRKD = jnp.einsum("RKSC,SCD->SRKD", dy_RKSC, w_SCD, preferred_element_type=jnp.float32)
            dx_SRKD = constrain(dx_SRKD + more_SRKD, "vocab_act", "groups", None, None)
        if needed.table:
            dw_DSC = jnp.einsum("DRK,RKSC->DSC", x_DRK, dy_RKSC, preferred_element_type=jnp.float32)
            dw_DSC = jax.lax.optimization_barrier(constrain(dw_DSC, "embed", "vocab_act", None))
            dw_SCD = jnp.moveaxis(dw_DSC, 0, -1).astype(table_VD.dtype)
            dw_SPD = jax.lax.dynamic_update_slice_in_dim(dw_SPD, dw_SCD, blocks.start(block), axis=1)
            dw_SPD = constrain(dw_SPD, "vocab_act", None, "embed")
        return (dx_SRKD, dw_SPD), None

    zeros = _zero_gradients(needed, x_RKD, table_SPD)
    (dx_SRKD, dw_SPD), _ = jax.lax.scan(add, zeros, jnp.arange(blocks.count))
    dx_BTD = dw_VD = None
    if dx_SRKD is not None:
        dx_BTD = merge_groups(jnp.sum(dx_SRKD, axis=0).astype(hidden_BTD.dtype), targets_BT.shape)
    if dw_SPD is not None:
        dw_VD = constrain_table(dw_SPD.reshape(table_VD.shape))
    return dx_BTD, dw_VD, None, None, None  # targets, weights and the teacher's outputs are data


# a gradient of our own: automatic differentiation would keep the logits of every block for the backward pass
total = objective(token_losses)
total.defvjp(_total_and_residuals, _gradients, symbolic_zeros=True)


def _zero_gradients(needed: Needed, x_RKD, table_SPD) -> tuple[Array | None, Array | None]:
    """Returns the gradients before the first block: float32[S, R, K, D] of the states, and one like the table."""
    dx_SRKD = dw_SPD = None
    if needed.hidden:
        dx_SRKD = jnp.zeros((table_SPD.shape[0], *x_RKD.shape), jnp.float32)
        dx_SRKD = constrain(dx_SRKD, "vocab_act", "groups", None, None)
    if needed.table:
        dw_SPD = constrain(jnp.zeros_like(table_SPD), "vocab_act", None, "embed")
    return dx_SRKD, dw_SPD
