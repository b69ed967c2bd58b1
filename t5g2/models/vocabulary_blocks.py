"""Blocks of the vocabulary, their logits, and sums over blocks of logits.

D width, V vocabulary; R groups of rows, K tokens of one group; S parts of the vocabulary (one per device that it is
sharded over), P = V / S rows of the table in a part, C rows of a block in one part.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from t5g2.core import sharding
from t5g2.core.sharding import constrain
from t5g2.models.loss_config import HeadShape, LossConfig, block_rows
from t5g2.models.token_scores import softcapped

LOWEST = float(jnp.finfo(jnp.float32).min)  # and not -inf, whose difference with itself is NaN


@dataclass(frozen=True)
class VocabularyBlocks:
    """Blocks of the rows 0 .. V - 1 of a table; block j has the rows j * size and following of every part.

    The last block ends with its part, so it begins with rows of the block before if `size` does not divide `part_rows`.

    Attributes:
      parts: S, parts of the vocabulary.
      part_rows: V / S.
      size: C, rows of a block in one part.
    """

    parts: int
    part_rows: int
    size: int

    @property
    def count(self) -> int:
        """The number of blocks."""
        return math.ceil(self.part_rows / self.size)

    def split(self, table_VD: Array) -> Array:
        """Returns the table as [S, V / S, D]."""
        table_SPD = table_VD.reshape(self.parts, self.part_rows, table_VD.shape[-1])
        return constrain(table_SPD, "vocab_act", None, "embed")

    def start(self, block: Array) -> Array:
        """Returns the first row of a block within its part, int32[]."""
        return jnp.minimum(block * self.size, self.part_rows - self.size)

    def rows(self, table_SPD: Array, block: Array, dtype: Any) -> Array:
        """Returns the rows of a block, [S, C, D], whole along D."""
        rows_SCD = jax.lax.dynamic_slice_in_dim(table_SPD, self.start(block), self.size, axis=1)
        # sharded like the table first: with the last line alone, XLA would gather the table before the loop
        rows_SCD = constrain(rows_SCD.astype(dtype), "vocab_act", None, "embed")
        return constrain(rows_SCD, "vocab_act", None, None)

    def columns(self, ids: Array, block: Array) -> Array:
        """Returns the columns of ids [...] in a block, int32[..., S]; those outside 0 .. C - 1 are in other blocks."""
        first_S = jnp.arange(self.parts, dtype=jnp.int32) * self.part_rows + self.start(block)
        return ids[..., None].astype(jnp.int32) - first_S.reshape(*(1,) * ids.ndim, self.parts)

    def is_new(self, columns: Array, block: Array) -> Array:
        """True for the columns of a block that no earlier block has."""
        return (columns >= block * self.size - self.start(block)) & (columns < self.size)

    def only_new(self, y: Array, block: Array, other: float, *, axis: int = -1) -> Array:
        """Returns y, whose `axis` is C, with `other` in the columns that an earlier block has."""
        if self.count * self.size == self.part_rows:
            return y
        shape = [1] * y.ndim
        shape[axis] = self.size
        is_new = self.is_new(jnp.arange(self.size, dtype=jnp.int32), block).reshape(shape)
        return jnp.where(is_new, y, jnp.asarray(other, y.dtype))


class RunningSum(NamedTuple):
    """Sums over the blocks so far, float32[R, K, S]: the largest logit, and sums of exp(logit - largest) * values."""

    top_RKS: Array
    sums_RKS: tuple[Array, ...]

    @classmethod
    def start(cls, shape: tuple[int, ...], sums: int = 1) -> "RunningSum":
        """Returns the sums over no block."""
        zeros = constrain(jnp.zeros(shape, jnp.float32), "groups", None, "vocab_act")
        return cls(zeros + LOWEST, (zeros,) * sums)

    def add(self, y_RKSC: Array, values_RKSC: Array | None = None) -> "RunningSum":
        """Returns the sums with another block; the first sum has values of 1, the second these."""
        top_RKS = jnp.maximum(self.top_RKS, jnp.max(y_RKSC, axis=-1).astype(jnp.float32))
        weight_RKSC = jnp.exp(y_RKSC - top_RKS[..., None].astype(y_RKSC.dtype))
        terms = [weight_RKSC] if values_RKSC is None else [weight_RKSC, weight_RKSC * values_RKSC]
        scale_RKS = jnp.exp(self.top_RKS - top_RKS)
        sums = (
            scale_RKS * old + jnp.sum(term, axis=-1, dtype=jnp.float32)
            for old, term in zip(self.sums_RKS, terms, strict=True)
        )
        return RunningSum(top_RKS, tuple(sums))

    def combined(self) -> tuple[Array, tuple[Array, ...]]:
        """Returns (the largest logit of all parts, the sums relative to it), float32[R, K]."""
        top_RK = jnp.max(self.top_RKS, axis=-1)
        scale_RKS = jnp.exp(self.top_RKS - top_RK[..., None])
        return top_RK, tuple(jnp.sum(scale_RKS * sum_RKS, axis=-1) for sum_RKS in self.sums_RKS)


def make_blocks(table_VD: Array, x_RKD: Array, config: LossConfig) -> VocabularyBlocks:
    """Returns the blocks of a table for these tokens; every device has its part of every block."""
    parts = sharding.parts("vocab_act", table_VD.shape[0])
    shape = HeadShape(x_RKD.shape[1], table_VD.shape[0] // parts, x_RKD.shape[-1])
    return VocabularyBlocks(parts, shape.rows, min(config.block_rows or block_rows(shape), shape.rows))


def block_logits(x_RKD: Array, w_SCD: Array, softcap: float | None) -> Array:
    """Returns float32 logits of all tokens for the rows of a block."""
    y_RKSC = jnp.einsum("RKD,SCD->RKSC", x_RKD, w_SCD, preferred_element_type=jnp.float32)
    return constrain(softcapped(y_RKSC, softcap), "groups", None, "vocab_act", None)
