"""Beam search: of all continuations of a prompt's sequences, the n likeliest are followed further.

What transformers 5.23.0 does, token for token (tests/parity compares): which sequences end, how they are ranked, and
when the search of a prompt is over. One difference: there the search of a prompt goes on while another prompt of its
batch has sequences to follow; here it depends on the prompt alone.

P prompts, n beams, R = P * n rows, k = candidates of a prompt, N new tokens, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from t5g2.core.batch import Sequences
from t5g2.eval import decoding
from t5g2.eval.decoding import Generated, LanguageModule, Prefill, TokenRows
from t5g2.eval.generation_options import GenerationOptions
from t5g2.eval.stop_strings import StopTable


class Beams(NamedTuple):
    """Sequences of each prompt, the best first; those that are not there have a score of -inf.

    Attributes:
      tokens_PnN: int32, then padding.
      length_Pn: int32, the number of tokens of each.
      score_Pn: float32, the sum of log-probabilities of sequences that go on; of ended ones, that by which they are
        ranked.
      log_probs_PnN: float32, of each token; None unless the options ask for them.
    """

    tokens_PnN: Array
    length_Pn: Array
    score_Pn: Array
    log_probs_PnN: Array | None

    def best(self, n: int) -> tuple["Beams", Array]:
        """Returns the n best, and int32[P, n], their places among all."""
        _, place_Pn = jax.lax.top_k(self.score_Pn, n)
        return self.take(place_Pn), place_Pn

    def take(self, place_Pn: Array) -> "Beams":
        """Returns the sequences at these places."""
        return jax.tree.map(lambda x: _take(x, place_Pn), self)


class BeamState(NamedTuple):
    """State of the search.

    Attributes:
      count: int32[], tokens generated so far.
      running: the sequences that go on.
      ended: the best of those that have ended.
      open_P: bool, False once the search of a prompt is over.
      rows: what is decoded next, the last tokens of `running`.
    """

    count: Array
    running: Beams
    ended: Beams
    open_P: Array
    rows: TokenRows


def start(
    decoder: Sequences, prefilled: Prefill, stops: StopTable | None, keys_R: Array, *, options: GenerationOptions
) -> BeamState:
    """Returns the state after the prompts and one token of each sequence; the keys are not used."""
    del keys_R
    logits_RV, rows = decoding.first_rows(decoder, prefilled, stops, options)
    prompt_count, n = len(decoder.tokens), options.num_beams
    shape = (prompt_count, n, options.max_new_tokens)
    none = Beams(
        jnp.full(shape, options.pad_id, jnp.int32),
        jnp.zeros(shape[:2], jnp.int32),
        jnp.full(shape[:2], -jnp.inf),
        jnp.zeros(shape, jnp.float32) if options.log_probs else None,
    )
    # one empty sequence, because n equal ones would have the same continuations
    running = none._replace(score_Pn=none.score_Pn.at[:, 0].set(0.0))
    open_P = decoder.segments[:, -1] != 0
    state = BeamState(jnp.zeros((), jnp.int32), running, none, open_P, rows)
    return _choose(state, logits_RV, stops, options)


def is_running(state: BeamState, options: GenerationOptions) -> Array:
    """Returns bool[], False once the search of every prompt is over."""
    return (state.count < options.max_new_tokens) & jnp.any(state.open_P)


def step(model: LanguageModule, state: BeamState, stops: StopTable | None, *, options: GenerationOptions) -> BeamState:
    """Returns the state after one more token of each sequence."""
    logits_RV, rows = decoding.extend(model, state.rows, options)
    return _choose(state._replace(rows=rows), logits_RV, stops, options)


def outputs(state: BeamState, options: GenerationOptions) -> Generated:
    """Returns the best sequences that have ended so far."""
    n = options.num_return_sequences
    ended = jax.tree.map(lambda x: x[:, :n], state.ended)
    return Generated(ended.tokens_PnN, ended.length_Pn, ended.log_probs_PnN, ended.score_Pn)


def _choose(
    state: BeamState, logits_RV: Float[Array, "R V"], stops: StopTable | None, options: GenerationOptions
) -> BeamState:
    n, count, rows = options.num_beams, state.count, state.rows
    log_probs_RV = jax.nn.log_softmax(logits_RV)
    allowed_RV = decoding.restricted(log_probs_RV, rows, count, options)
    candidates, beam_Pk, token_Pk = _candidates(state, log_probs_RV, allowed_RV, options)
    stop_Pk = None
    if stops is not None and rows.stop_R is not None:
        stop_Pk = stops.after(_take(rows.stop_R.reshape(-1, n), beam_Pk), token_Pk)
    ends_Pk = decoding.ends(token_Pk, stop_Pk, stops, options) | (count + 1 == options.max_new_tokens)

    # a candidate behind the best n does not end, however it is ranked: it was kept to have enough that go on
    is_ended_Pk = ends_Pk & (jnp.arange(ends_Pk.shape[1]) < n)[None] & state.open_P[:, None]
    rank_Pk = jnp.where(is_ended_Pk, candidates.score_Pn / _lengths(options)[count + 1], -jnp.inf)
    merged = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), state.ended, candidates._replace(score_Pn=rank_Pk))
    ended, _ = merged.best(n)

    going_Pk = jnp.where(ends_Pk, -jnp.inf, candidates.score_Pn)
    running, place_Pn = candidates._replace(score_Pn=going_Pk).best(n)
    open_P = state.open_P & _may_improve(running.score_Pn[:, 0], ended.score_Pn, count + 1, options)
    beam_Pn, token_Pn = _take(beam_Pk, place_Pn), _take(token_Pk, place_Pn)
    rows = rows.select(beam_Pn).followed_by(token_Pn.reshape(-1), stops).ended_at(jnp.repeat(~open_P, n))
    return BeamState(count + 1, running, ended, open_P, rows)


def _candidates(
    state: BeamState, log_probs_RV: Array, allowed_RV: Array, options: GenerationOptions
) -> tuple[Beams, Array, Array]:
    """Returns the k likeliest continuations of each prompt, the sequence that each continues, and its new token."""
    n, vocabulary = options.num_beams, allowed_RV.shape[1]
    # n of these go on even if every sequence may end with each of the stop tokens
    k = min(max(2, 1 + len(options.stop_ids)) * n, n * vocabulary)
    total_PnV = state.running.score_Pn[:, :, None] + allowed_RV.reshape(-1, n, vocabulary)
    score_Pk, index_Pk = jax.lax.top_k(total_PnV.reshape(-1, n * vocabulary), k)
    beam_Pk, token_Pk = jnp.divmod(index_Pk, vocabulary)
    candidates = state.running.take(beam_Pk)
    log_probs_PkN = candidates.log_probs_PnN
    if log_probs_PkN is not None:
        log_prob_Pk = _take(log_probs_RV.reshape(-1, n * vocabulary), index_Pk)
        log_probs_PkN = log_probs_PkN.at[:, :, state.count].set(log_prob_Pk)
    tokens_PkN = candidates.tokens_PnN.at[:, :, state.count].set(token_Pk)
    lengths_Pk = jnp.full_like(token_Pk, state.count + 1)
    return Beams(tokens_PkN, lengths_Pk, score_Pk, log_probs_PkN), beam_Pk, token_Pk


def _may_improve(best_P: Array, ended_Pn: Array, length: Array, options: GenerationOptions) -> Array:
    """Returns True for prompts whose best running sequence may yet come before the last of those that have ended."""
    if options.early_stopping == "never" and options.length_penalty > 0:
        length = jnp.array(options.max_new_tokens)
    worst_P = jnp.min(ended_Pn, axis=1)  # -inf until there are n
    may_improve_P = best_P / _lengths(options)[length] > worst_P
    return may_improve_P & (worst_P == -jnp.inf) if options.early_stopping is True else may_improve_P


def _lengths(options: GenerationOptions) -> Array:
    """Returns float32[N + 1], length ** length_penalty; computed in float64, as the comparison with it needs."""
    lengths = np.arange(options.max_new_tokens + 1, dtype=np.float64)
    lengths[0] = 1.0  # not used
    return jnp.array(lengths**options.length_penalty, jnp.float32)


def _take(x: Array, place_Pk: Array) -> Array:
    """Returns x[p, place_Pk[p, i], …]."""
    return jax.vmap(lambda x_n, place_k: x_n[place_k])(x, place_Pk)
