"""Soft targets of a teacher by vocabulary blocks: the divergence in a forward pass, probabilities in a backward pass.

R groups of rows, K tokens of one group; S parts of the vocabulary, C rows of a block in one part; N kept tokens, D the
teacher's width. All float32. The formulas are those of distillation.py, as sums over blocks.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from t5g2.core.sharding import constrain
from t5g2.models.distillation import Distillation, SparseDistribution, TeacherOutputs, kept_probabilities, x_log_x
from t5g2.models.loss_config import LossConfig
from t5g2.models.tiled_loss import sparse_distributions
from t5g2.models.token_groups import split_into_groups
from t5g2.models.vocabulary_blocks import RunningSum, VocabularyBlocks, block_logits

TILE_LOGITS = 2**24  # of the teacher, while the kept tokens of its distributions are found: 64 MiB


def with_kept_tokens(teacher: TeacherOutputs, vocab_size: int, distillation: Distillation) -> TeacherOutputs:
    """Returns a teacher of kept tokens, unless whole distributions are used; runs the teacher's head, in token tiles.

    The kept tokens are those of most probability or of a sample, which no block tells alone. There is no gradient, so a
    tile may be small. Samples are those of the other strategy.
    """
    if teacher.cached is not None or distillation.method == "full":
        return teacher
    assert teacher.head is not None
    assert teacher.hidden_BTD is not None
    kept = sparse_distributions(
        teacher.hidden_BTD,
        type(teacher.head)(teacher.head.table_VD[:vocab_size], teacher.head.softcap),
        distillation=distillation,
        tile_tokens=max(1, TILE_LOGITS // vocab_size),
        key=teacher.key,
        dtype=jnp.float32,
    )
    return TeacherOutputs(teacher.has_teacher_BT, kept)


def make(
    teacher: TeacherOutputs | None, blocks: VocabularyBlocks, config: LossConfig
) -> "KeptTargets | WholeTargets | None":
    """Returns the soft targets of a teacher; None without one."""
    if teacher is None or config.distillation is None:
        return None
    has_teacher_RK = split_into_groups(teacher.has_teacher_BT)
    if teacher.cached is not None:
        kept = SparseDistribution(*map(split_into_groups, teacher.cached))
        return KeptTargets(has_teacher_RK, kept.ids, *kept_probabilities(kept, config.distillation), blocks)
    assert teacher.head is not None
    assert teacher.hidden_BTD is not None
    # rows past the student's vocabulary are left out: both distributions are over the same tokens
    table_SPD = blocks.split(teacher.head.table_VD[: blocks.parts * blocks.part_rows])
    return WholeTargets(has_teacher_RK, split_into_groups(teacher.hidden_BTD), table_SPD, teacher.head.softcap, blocks)


@dataclass(frozen=True, eq=False)
class KeptTargets:
    """Soft targets of kept tokens.

    Attributes:
      p_RKN: probabilities of the tokens ids_RKN.
      tail_RK: probability of all other tokens together; None = they have none.
    """

    has_teacher_RK: Array
    ids_RKN: Array
    p_RKN: Array
    tail_RK: Array | None
    blocks: VocabularyBlocks

    def start(self, zero: RunningSum) -> Any:
        """Returns (the sum of p * logits, the sums of the tokens that are not kept), over no block."""
        return zero.sums_RKS[0], None if self.tail_RK is None else zero

    def add(self, sums: Any, y_RKSC: Array, block: Array) -> Any:
        """Returns the sums with another block of the student's logits."""
        product_RKS, others = sums
        p_RKSC = self._in_block(block)
        new_RKSC = self.blocks.only_new(p_RKSC, block, 0.0)
        product_RKS = product_RKS + jnp.sum(new_RKSC * y_RKSC, axis=-1)
        if others is not None:
            others_RKSC = self.blocks.only_new(jnp.where(p_RKSC > 0.0, -jnp.inf, y_RKSC), block, -jnp.inf)
            others = others.add(others_RKSC)
        return product_RKS, others

    def finish(self, sums: Any, lse_RK: Array) -> tuple[Array, Any]:
        """Returns the divergence, and what `probs` needs of each token."""
        product_RKS, others = sums
        cross_RK = jnp.sum(product_RKS, axis=-1) - lse_RK * jnp.sum(self.p_RKN, axis=-1)
        divergence_RK = jnp.sum(x_log_x(self.p_RKN), axis=-1) - cross_RK
        if others is None or self.tail_RK is None:
            return divergence_RK, None
        top_RK, (sum_RK,) = others.combined()
        # if every token is kept there is no tail, and a probability that rounding has left for it is dropped
        has_tail_RK = sum_RK > 0.0
        tail_RK = jnp.where(has_tail_RK, self.tail_RK, 0.0)
        lse_others_RK = jnp.where(has_tail_RK, top_RK + jnp.log(jnp.where(has_tail_RK, sum_RK, 1.0)), 0.0)
        divergence_RK = divergence_RK + x_log_x(tail_RK)
        divergence_RK = divergence_RK - tail_RK * jnp.where(has_tail_RK, lse_others_RK - lse_RK, 0.0)
        return divergence_RK, (tail_RK, lse_others_RK)

    def probs(self, y_RKSC: Array, block: Array, statistics: Any) -> Array:
        """Returns the target distribution of a block: the tail has the student's own proportions."""
        p_RKSC = self._in_block(block)
        if statistics is None:
            return p_RKSC
        tail_RK, lse_others_RK = (x_RK[:, :, None, None] for x_RK in statistics)
        # the inner `where` keeps the exponent of kept tokens, which may be large, from overflowing
        others_RKSC = jnp.where(p_RKSC > 0.0, -jnp.inf, y_RKSC - lse_others_RK)
        return p_RKSC + tail_RK * jnp.exp(others_RKSC)

    def _in_block(self, block: Array) -> Array:
        """Returns float32[R, K, S, C]: p at the columns of the kept tokens, zeros elsewhere."""
        columns_RKSN = jnp.moveaxis(self.blocks.columns(self.ids_RKN, block), -1, 2)
        # negative columns would count from the end, and those past the end are dropped
        columns_RKSN = jnp.where(columns_RKSN < 0, self.blocks.size, columns_RKSN)
        p_RKSN = jnp.broadcast_to(self.p_RKN[:, :, None, :], columns_RKSN.shape)
        scatter = lambda columns, p: jnp.zeros(self.blocks.size, jnp.float32).at[columns].add(p, mode="drop")  # noqa: E731
        for _ in range(3):
            scatter = jax.vmap(scatter)
        return constrain(scatter(columns_RKSN, p_RKSN), "groups", None, "vocab_act", None)


@dataclass(frozen=True, eq=False)
class WholeTargets:
    """Soft targets of whole distributions; z are the teacher's logits, computed block by block in both passes."""

    has_teacher_RK: Array
    hidden_RKD: Array
    table_SPD: Array
    softcap: float | None
    blocks: VocabularyBlocks

    def start(self, zero: RunningSum) -> Any:
        """Returns the sums of exp(z) and of exp(z) * (z - y), over no block."""
        return RunningSum(zero.top_RKS, (zero.sums_RKS[0],) * 2)

    def add(self, sums: Any, y_RKSC: Array, block: Array) -> Any:
        """Returns the sums with another block of the student's logits y."""
        z_RKSC = self._logits(block)
        return sums.add(self.blocks.only_new(z_RKSC, block, -jnp.inf), z_RKSC - y_RKSC)

    def finish(self, sums: Any, lse_RK: Array) -> tuple[Array, Any]:
        """Returns the divergence, and what `probs` needs of each token: the log-sum-exp of the teacher's logits."""
        top_RK, (sum_RK, weighted_RK) = sums.combined()
        teacher_lse_RK = top_RK + jnp.log(sum_RK)
        return weighted_RK / sum_RK - (teacher_lse_RK - lse_RK), teacher_lse_RK

    def probs(self, y_RKSC: Array, block: Array, statistics: Any) -> Array:
        """Returns the target distribution of a block."""
        del y_RKSC
        return jnp.exp(self._logits(block) - statistics[:, :, None, None])

    def _logits(self, block: Array) -> Array:
        rows_SCD = self.blocks.rows(self.table_SPD, block, self.hidden_RKD.dtype)
        return block_logits(self.hidden_RKD, rows_SCD, self.softcap)
