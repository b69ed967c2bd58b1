"""Distillation: what a teacher's answers about a tile of tokens make of its loss and of the slope of its logits.

R groups of rows, K tokens of a tile in one group, V vocabulary, N entries of an answer. All float32. Nothing here is
larger than a tile: a teacher that is asked gives its hidden states, and its logits are made tile by tile as the
student's are.
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float16, Int, Key

from t5g2.core.errors import UserError, unknown
from t5g2.core.sharding import constrain
from t5g2.models.layers import Head

Method = Literal["full", "top_k", "sampled"]
Tail = Literal["renormalise", "together"]


@dataclass(frozen=True)
class Distillation:
    """How a teacher's distributions enter the loss: (1 - weight) * cross-entropy + weight * divergence.

    Attributes:
      weight: 1 = the teacher alone, as in Gemma 2 (arXiv 2408.00118, section 3); tokens about which it has no answer
        (sentinels, EOS) have their cross-entropy in any case.
      method: "full" = the whole distribution; "top_k" = its `per_token` likeliest tokens; "sampled" = `per_token`
        tokens drawn by its probabilities without putting back, as in Gemma 3 (arXiv 2503.19786, section 2.2, which
        draws 256 and does not say whether it puts back).
      per_token: how many tokens of a distribution are kept.
      tail: of a distribution that is not kept whole. "renormalise" = the others count as impossible, and those kept are
        scaled to sum to 1 (Gemma 3); "together" = the others are one more token, whose probability the student learns
        and not how it is shared out. Together never exceeds the divergence of the whole distributions.
    """

    weight: float = 1.0
    method: Method = "full"
    per_token: int = 256
    tail: Tail = "renormalise"

    def __post_init__(self):
        if not 0.0 < self.weight <= 1.0:
            raise UserError(
                f"weight = {self.weight}; it is the teacher's share of the loss, above 0 and at most 1; without "
                f"distill there is no teacher"
            )
        for name, allowed in (("method", get_args(Method)), ("tail", get_args(Tail))):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if self.per_token < 1:
            raise UserError(f"per_token = {self.per_token}; it must be at least 1")
        if self.method == "sampled" and self.tail == "together":
            raise UserError(
                'method = "sampled" and tail = "together": what is drawn does not say how probable the others are; '
                'take method = "top_k" or tail = "renormalise"'
            )

    def check_vocabulary(self, size: int) -> None:
        """Raises UserError if more tokens of a distribution are to be kept than it has."""
        if self.method != "full" and self.per_token > size:
            raise UserError(
                f"per_token = {self.per_token} and the vocabulary has {size} tokens; set it to at most that, or take "
                f'method = "full"'
            )


class Answers(NamedTuple):
    """What a teacher said of some tokens, as core.batch.Teaching has it; [B, T, …] or, cut into tiles, [R, K, …]."""

    ids: Int[Array, "*L N"]
    log_probs: Float16[Array, "*L N"]
    tail: Float16[Array, "*L"]


class Teacher(NamedTuple):
    """What a loss head is told by a teacher; nothing of it has a gradient. B rows, T targets, D the teacher's width.

    Attributes:
      known_BT: where it has an answer.
      answers: those of before; None = it is asked, and so:
      hidden_BTD: its states, from which the targets are predicted.
      head: its head, whose vocabulary begins with the student's; rows past that do not count.
      key: for what is drawn of its distributions; of a tile, one for each.
    """

    known_BT: Bool[Array, "B T"]
    answers: Answers | None = None
    hidden_BTD: Float[Array, "B T D"] | None = None
    head: Head | None = None
    key: Array | None = None


class Lesson(NamedTuple):
    """What a tile is taught.

    Attributes:
      aim_RKV: the distribution that the student's would have to be for the divergence to have no slope; of "together"
        the tail is the student's own, scaled to the teacher's probability of it.
      divergence_RK: from the teacher's distribution, as far as it is kept, to the student's, in nats; never negative.
    """

    aim_RKV: Float[Array, "R K V"]
    divergence_RK: Float[Array, "R K"]


def of_answers(
    answers: Answers, y_RKV: Float[Array, "R K V"], lse_RK: Float[Array, "R K"], settings: Distillation
) -> Lesson:
    """The lesson of answers; y are the student's logits, lse the logs of their partition functions."""
    p_RKN = jnp.exp(answers.log_probs.astype(jnp.float32))
    tail_RK = answers.tail.astype(jnp.float32)
    if settings.tail == "renormalise":
        tail_RK = jnp.zeros_like(tail_RK)
    # not quite 1, because they are kept in 16 bits; where there is no answer it may be 0
    whole_RK = jnp.maximum(jnp.sum(p_RKN, axis=-1) + tail_RK, jnp.finfo(jnp.float32).tiny)
    p_RKN, tail_RK = p_RKN / whole_RK[..., None], tail_RK / whole_RK
    aim_RKV = _dense(answers.ids, p_RKN, y_RKV.shape[-1])
    log_s_RKV = y_RKV - lse_RK[..., None]
    divergence_RK = jnp.sum(_times_log(p_RKN), axis=-1) - jnp.sum(aim_RKV * log_s_RKV, axis=-1)
    if settings.tail == "renormalise":
        return Lesson(aim_RKV, divergence_RK)
    others_RKV = jnp.where(aim_RKV > 0.0, -jnp.inf, log_s_RKV)
    top_RK = jnp.max(others_RKV, axis=-1)
    # where the answer is about every token there are no others, and what rounding leaves for them is nothing
    some_RK = jnp.isfinite(top_RK)
    tail_RK, top_RK = jnp.where(some_RK, tail_RK, 0.0), jnp.where(some_RK, top_RK, 0.0)
    shares_RKV = jnp.exp(others_RKV - top_RK[..., None])
    sum_RK = jnp.where(some_RK, jnp.sum(shares_RKV, axis=-1), 1.0)
    divergence_RK = divergence_RK + _times_log(tail_RK) - tail_RK * (top_RK + jnp.log(sum_RK))
    return Lesson(aim_RKV + (tail_RK / sum_RK)[..., None] * shares_RKV, divergence_RK)


def of_logits(
    logits_RKV: Float[Array, "R K V"],
    y_RKV: Float[Array, "R K V"],
    lse_RK: Float[Array, "R K"],
    settings: Distillation,
    *,
    key: Key[Array, "R K"] | None = None,
) -> Lesson:
    """The lesson of a teacher's own logits; what is drawn of a distribution is drawn with its own key."""
    if settings.method != "full":
        return of_answers(answers_of(logits_RKV, settings, key=key, dtype=jnp.float32), y_RKV, lse_RK, settings)
    log_p_RKV = jax.nn.log_softmax(logits_RKV)
    p_RKV = jnp.exp(log_p_RKV)
    divergence_RK = jnp.sum(p_RKV * (log_p_RKV - y_RKV + lse_RK[..., None]), axis=-1)
    return Lesson(p_RKV, divergence_RK)


def answers_of(
    logits_RKV: Float[Array, "*L V"], settings: Distillation, *, key: Key[Array, "*L"] | None = None, dtype=jnp.float16
) -> Answers:
    """What is kept of distributions: the likeliest tokens, likeliest first, or such as are drawn with a `key` of each.

    Logits of probabilities 0.5, 0.3, 0.15, 0.05 and per_token = 2: ids [0 1], probabilities [0.5 0.3], tail 0.2.
    """
    log_p_RKV = jax.nn.log_softmax(logits_RKV.astype(jnp.float32))
    scores_RKV = log_p_RKV
    if settings.method == "sampled":
        assert key is not None
        # the N largest of log-probabilities with Gumbel noise are a draw without putting back (arXiv 1903.06059)
        noise = functools.partial(jax.random.gumbel, shape=log_p_RKV.shape[-1:])
        for _ in key.shape:
            noise = jax.vmap(noise)
        scores_RKV = log_p_RKV + noise(key)
    _, ids_RKN = jax.lax.top_k(scores_RKV, min(settings.per_token, log_p_RKV.shape[-1]))
    kept_RKN = jnp.take_along_axis(log_p_RKV, ids_RKN, axis=-1)
    tail_RK = jnp.maximum(1.0 - jnp.sum(jnp.exp(kept_RKN), axis=-1), 0.0)
    return Answers(ids_RKN, kept_RKN.astype(dtype), tail_RK.astype(dtype))


def _dense(ids_RKN, p_RKN, vocab_size: int):
    """Zeros but for p at ids."""
    rows, tokens = (jax.lax.broadcasted_iota(jnp.int32, ids_RKN.shape, axis) for axis in (0, 1))
    zeros_RKV = constrain(jnp.zeros((*ids_RKN.shape[:2], vocab_size), jnp.float32), "rows", None, "vocab_act")
    return constrain(zeros_RKV.at[rows, tokens, ids_RKN].add(p_RKN), "rows", None, "vocab_act")


def _times_log(p):
    return jnp.where(p > 0.0, p * jnp.log(jnp.where(p > 0.0, p, 1.0)), 0.0)
