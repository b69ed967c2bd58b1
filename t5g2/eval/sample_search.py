"""Generation token by token: each row goes on with the token that its sampler takes.

P prompts, n samples of each, R = P * n rows, N new tokens, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5g2.core.batch import Sequences
from t5g2.eval import decoding
from t5g2.eval.decoding import Generated, LanguageModule, Prefill, TokenRows
from t5g2.eval.generation_options import GenerationOptions
from t5g2.eval.stop_strings import StopTable


class SampleState(NamedTuple):
    """State of the loop.

    Attributes:
      count: int32[], tokens generated so far.
      tokens_RN: int32, the generated tokens, then padding.
      length_R: int32, the number of tokens of each row.
      log_probs_RN: float32 by token; None unless the options ask for them.
      done_R: bool, True once a row has ended.
      keys_R: the random key of each row.
      rows: what is decoded next.
    """

    count: Array
    tokens_RN: Array
    length_R: Array
    log_probs_RN: Array | None
    done_R: Array
    keys_R: Array
    rows: TokenRows


def start(
    decoder: Sequences, prefilled: Prefill, stops: StopTable | None, keys_R: Array, *, options: GenerationOptions
) -> SampleState:
    """Returns the state after the prompts and one token of each row."""
    logits_RV, rows = decoding.first_rows(decoder, prefilled, stops, options)
    shape = (len(logits_RV), options.max_new_tokens)
    state = SampleState(
        count=jnp.zeros((), jnp.int32),
        tokens_RN=jnp.full(shape, options.pad_id, jnp.int32),
        length_R=jnp.zeros(shape[0], jnp.int32),
        log_probs_RN=jnp.zeros(shape, jnp.float32) if options.log_probs else None,
        done_R=rows.last.segments[:, 0] == 0,
        keys_R=keys_R,
        rows=rows,
    )
    return _choose(state, logits_RV, stops, options)


def is_running(state: SampleState, options: GenerationOptions) -> Array:
    """Returns bool[], False once every row has ended."""
    return (state.count < options.max_new_tokens) & ~jnp.all(state.done_R)


def step(
    model: LanguageModule, state: SampleState, stops: StopTable | None, *, options: GenerationOptions
) -> SampleState:
    """Returns the state after one more token of each row."""
    logits_RV, rows = decoding.extend(model, state.rows, options)
    return _choose(state._replace(rows=rows), logits_RV, stops, options)


def outputs(state: SampleState, options: GenerationOptions) -> Generated:
    """Returns what was generated so far."""
    rows = (state.tokens_RN, state.length_R, state.log_probs_RN)
    return Generated(*jax.tree.map(lambda x: x.reshape(-1, options.copies, *x.shape[1:]), rows))


def _choose(
    state: SampleState, logits_RV: Float[Array, "R V"], stops: StopTable | None, options: GenerationOptions
) -> SampleState:
    """Returns the state with the token that the sampler takes for each row; padding for rows that have ended."""
    count, done_R = state.count, state.done_R
    allowed_RV = decoding.restricted(logits_RV, state.rows, count, options)
    token_R = jnp.where(done_R, options.pad_id, options.sampler.draw(allowed_RV, state.keys_R, count))
    log_probs_RN = state.log_probs_RN
    if log_probs_RN is not None:
        chosen_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=-1)[:, 0]
        log_prob_R = chosen_R - jax.nn.logsumexp(logits_RV, axis=-1)
        log_probs_RN = log_probs_RN.at[:, count].set(jnp.where(done_R, 0, log_prob_R))
    rows = state.rows.followed_by(token_R, stops)
    length_R = state.length_R + jnp.where(done_R, 0, 1)
    done_R |= decoding.ends(token_R, rows.stop_R, stops, options)
    tokens_RN = state.tokens_RN.at[:, count].set(token_R)
    return SampleState(count + 1, tokens_RN, length_R, log_probs_RN, done_R, state.keys_R, rows.ended_at(done_R))
