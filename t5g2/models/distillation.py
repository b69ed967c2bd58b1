"""Distillation: soft targets from a teacher, and the divergence of the student's distribution from them.

R groups of rows, K tokens of a tile in one group, V vocabulary, N kept tokens of a distribution. All float32. No
array is larger than a tile: a teacher that runs in the step provides its hidden states, and its logits are computed
tile by tile, like the student's.
"""

import functools
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float16, Int, Key

from t5g2.core.bounds import Bounds, Size, checked
from t5g2.core.errors import UserError
from t5g2.core.sharding import constrain
from t5g2.models.layers import Head

Method = Literal["full", "top_k", "sampled"]
Tail = Literal["renormalise", "together"]
TeacherWeight = Annotated[float, Bounds(above=0, most=1, hint="to train without a teacher, leave distill out")]


@dataclass(frozen=True)
@checked
class Distillation:
    """Distillation settings; the loss of a token is (1 - weight) * cross-entropy + weight * divergence.

    Attributes:
      weight: the teacher's share of the loss; 1 = the teacher alone, as in Gemma 2 (arXiv 2408.00118, section 3).
        Tokens that the teacher has no distribution for (sentinels, EOS) always have their cross-entropy.
      method: "full" = the whole distribution; "top_k" = its `per_token` most likely tokens; "sampled" = `per_token`
        tokens sampled by their probabilities without replacement, as in Gemma 3 (arXiv 2503.19786, section 2.2, which
        samples 256 and leaves open whether with replacement).
      per_token: number of tokens that are kept of a distribution.
      tail: treatment of the tokens that are not kept. "renormalise" = their probability is 0, and the kept ones are
        scaled to sum to 1 (Gemma 3); "together" = they count as one more token, so the student learns their total
        probability but not its distribution among them. The divergence with "together" is never larger than that of
        the whole distributions.
    """

    weight: TeacherWeight = 1.0
    method: Method = "full"
    per_token: Size = 256
    tail: Tail = "renormalise"

    def __post_init__(self):
        if self.method == "sampled" and self.tail == "together":
            raise UserError(
                'method = "sampled" and tail = "together": the probability of all other tokens does not '
                'follow from a sample; take method = "top_k" or tail = "renormalise"'
            )

    def check_vocabulary(self, size: int) -> None:
        """Raises UserError if `per_token` exceeds the vocabulary."""
        if self.method != "full" and self.per_token > size:
            raise UserError(
                f"per_token = {self.per_token} and the vocabulary has {size} tokens; set it to at most that, or take "
                f'method = "full"'
            )


class SparseDistribution(NamedTuple):
    """Kept tokens of a teacher's distributions, as in core.batch.TeacherInputs: [B, T, …], or in tiles [R, K, …].

    Attributes:
      ids: of the kept tokens.
      log_probs: of the kept tokens.
      tail: probability of all other tokens together.
    """

    ids: Int[Array, "*L N"]
    log_probs: Float16[Array, "*L N"]
    tail: Float16[Array, "*L"]


class TeacherOutputs(NamedTuple):
    """A teacher's outputs for the loss; none of them has a gradient. B rows, T targets, D the teacher's width.

    Attributes:
      has_teacher_BT: True where the teacher has a distribution for the target.
      cached: distributions computed before the run; None = the teacher runs in the step, and the fields below are set.
      hidden_BTD: the teacher's states, from which the targets are predicted.
      head: the teacher's output head; its first rows are the student's vocabulary, and further rows are not used.
      key: random key for sampling from the distributions; within a tile, one key for each token.
    """

    has_teacher_BT: Bool[Array, "B T"]
    cached: SparseDistribution | None = None
    hidden_BTD: Float[Array, "B T D"] | None = None
    head: Head | None = None
    key: Array | None = None


class SoftTargets(NamedTuple):
    """Soft targets of a tile.

    Attributes:
      probs_RKV: the target distribution: the divergence's gradient by the student's logits is the student's
        distribution minus this. With "together", the tail has the student's own proportions and the teacher's total
        probability.
      divergence_RK: KL(teacher, student) in nats, over the kept tokens and, with "together", the tail as one more;
        never negative.
    """

    probs_RKV: Float[Array, "R K V"]
    divergence_RK: Float[Array, "R K"]


def soft_targets_from_sparse(
    sparse: SparseDistribution, y_RKV: Float[Array, "R K V"], lse_RK: Float[Array, "R K"], config: Distillation
) -> SoftTargets:
    """Returns the soft targets of kept tokens; y are the student's logits, lse their log-sum-exp over V."""
    p_RKN, tail_RK = kept_probabilities(sparse, config)
    probs_RKV = _scatter(sparse.ids, p_RKN, y_RKV.shape[-1])
    # summed over V: gathering the logits of the N tokens from a sharded vocabulary would bring whole rows together
    log_s_RKV = y_RKV - lse_RK[..., None]
    divergence_RK = jnp.sum(x_log_x(p_RKN), axis=-1) - jnp.sum(probs_RKV * log_s_RKV, axis=-1)
    if tail_RK is None:
        return SoftTargets(probs_RKV, divergence_RK)
    # the student's probability of the tail is a log-sum-exp over the tokens that are not kept
    others_RKV = jnp.where(probs_RKV > 0.0, -jnp.inf, log_s_RKV)
    top_RK = jnp.max(others_RKV, axis=-1)
    # if every token is kept there is no tail, and a probability that rounding has left for it is dropped
    has_tail_RK = jnp.isfinite(top_RK)
    tail_RK, top_RK = jnp.where(has_tail_RK, tail_RK, 0.0), jnp.where(has_tail_RK, top_RK, 0.0)
    shares_RKV = jnp.exp(others_RKV - top_RK[..., None])
    sum_RK = jnp.where(has_tail_RK, jnp.sum(shares_RKV, axis=-1), 1.0)
    divergence_RK = divergence_RK + x_log_x(tail_RK) - tail_RK * (top_RK + jnp.log(sum_RK))
    return SoftTargets(probs_RKV + (tail_RK / sum_RK)[..., None] * shares_RKV, divergence_RK)


def kept_probabilities(sparse: SparseDistribution, config: Distillation) -> tuple[Array, Array | None]:
    """Returns float32 probabilities of the kept tokens and of all others together, which sum to 1.

    The second is None with "renormalise", where the others have none.
    """
    p_RKN, tail_RK = jnp.exp(sparse.log_probs.astype(jnp.float32)), sparse.tail.astype(jnp.float32)
    if config.tail == "renormalise":
        tail_RK = jnp.zeros_like(tail_RK)
    # 16 bits lose a little of the sum of 1; where the teacher has no distribution the sum may be 0
    total_RK = jnp.maximum(jnp.sum(p_RKN, axis=-1) + tail_RK, jnp.finfo(jnp.float32).tiny)
    return p_RKN / total_RK[..., None], None if config.tail == "renormalise" else tail_RK / total_RK


def soft_targets_from_logits(
    logits_RKV: Float[Array, "R K V"],
    y_RKV: Float[Array, "R K V"],
    lse_RK: Float[Array, "R K"],
    config: Distillation,
    *,
    key: Key[Array, "R K"] | None = None,
) -> SoftTargets:
    """Returns the soft targets of a teacher's logits; with "sampled", each token is sampled with its own key."""
    if config.method != "full":
        # float32 and not float16, as in a cache: nothing is stored here
        sparse = sparsify(logits_RKV, config, key=key, dtype=jnp.float32)
        return soft_targets_from_sparse(sparse, y_RKV, lse_RK, config)
    log_p_RKV = jax.nn.log_softmax(logits_RKV)
    p_RKV = jnp.exp(log_p_RKV)
    divergence_RK = jnp.sum(p_RKV * (log_p_RKV - y_RKV + lse_RK[..., None]), axis=-1)
    return SoftTargets(p_RKV, divergence_RK)


def sparsify(
    logits_RKV: Float[Array, "*L V"], config: Distillation, *, key: Key[Array, "*L"] | None = None, dtype=jnp.float16
) -> SparseDistribution:
    """Returns the kept tokens of distributions: the most likely ones in descending order, or a sample with `key`.

    Logits of probabilities 0.5, 0.3, 0.15, 0.05 and per_token = 2: ids [0 1], probabilities [0.5 0.3], tail 0.2.
    """
    log_p_RKV = jax.nn.log_softmax(logits_RKV.astype(jnp.float32))
    scores_RKV = log_p_RKV
    if config.method == "sampled":
        assert key is not None
        # the N largest of log-probabilities plus Gumbel noise are a sample without replacement (arXiv 1903.06059)
        noise = functools.partial(jax.random.gumbel, shape=log_p_RKV.shape[-1:])
        for _ in key.shape:
            noise = jax.vmap(noise)
        scores_RKV = log_p_RKV + noise(key)
    _, ids_RKN = jax.lax.top_k(scores_RKV, min(config.per_token, log_p_RKV.shape[-1]))
    kept_RKN = jnp.take_along_axis(log_p_RKV, ids_RKN, axis=-1)
    tail_RK = jnp.maximum(1.0 - jnp.sum(jnp.exp(kept_RKN), axis=-1), 0.0)  # rounding can make it negative
    return SparseDistribution(ids_RKN, kept_RKN.astype(dtype), tail_RK.astype(dtype))


def _scatter(ids_RKN, p_RKN, vocab_size: int):
    """Returns float32[R, K, V]: p at ids, zeros elsewhere."""
    rows, tokens = (jax.lax.broadcasted_iota(jnp.int32, ids_RKN.shape, axis) for axis in (0, 1))
    zeros_RKV = constrain(jnp.zeros((*ids_RKN.shape[:2], vocab_size), jnp.float32), "groups", None, "vocab_act")
    return constrain(zeros_RKV.at[rows, tokens, ids_RKN].add(p_RKN), "groups", None, "vocab_act")


def x_log_x(x):
    """Returns x * log(x), which is 0 at 0; the inner `where` avoids a NaN there."""
    return jnp.where(x > 0.0, x * jnp.log(jnp.where(x > 0.0, x, 1.0)), 0.0)
