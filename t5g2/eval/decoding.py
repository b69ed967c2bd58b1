"""Decoding: the prompt is prefilled once, then every row is extended by one token at a time, from its cache.

P prompts, n samples or beams of each, R = P * n rows (those of a prompt follow each other), T prompt length, S encoder
length, N new tokens, V vocabulary, D width, I images of a row.

The loop itself stands beside each way of choosing tokens: sample_search.py, beam_search.py.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from t5g2.core.batch import Sequences
from t5g2.eval.generation_options import GenerationOptions
from t5g2.eval.stop_strings import StopTable
from t5g2.models import cache as caches
from t5g2.models.cache import Cache
from t5g2.models.gemma import Gemma
from t5g2.models.layers import Compute
from t5g2.models.t5gemma import T5Gemma

LanguageModule = Gemma | T5Gemma


class Prompts(NamedTuple):
    """A batch of prompts.

    Attributes:
      decoder: first tokens of the decoder, at least BOS, int32[P, T] each, padded on the left, so that the last column
        holds the last token of each row. Nothing is generated for rows whose last segment is 0.
      encoder: input of an encoder-decoder model, int32[P, S] each; segment 1, and 0 at padding. None for a decoder-only
        model.
      images: for the image tokens of the encoder, or of a decoder-only model's prompt, which then has `blocks`.
      stops: the strings that end an output, None = none.
    """

    decoder: Sequences
    encoder: Sequences | None = None
    images: Float[Array | np.ndarray, "P I H W 3"] | None = None
    stops: StopTable | None = None


class Generated(NamedTuple):
    """Outputs of each prompt.

    Attributes:
      tokens_PnN: the tokens, a stop token included, then pad_id.
      length_Pn: the number of tokens of each.
      log_probs_PnN: natural log-probability of each token in the model's own distribution, before any restriction; 0
        at padding. None unless the options ask for it.
      score_Pn: what beams are ranked by, the best first; None without beam search.
    """

    tokens_PnN: Int[Array, "P n N"]
    length_Pn: Int[Array, "P n"]
    log_probs_PnN: Float[Array, "P n N"] | None = None
    score_Pn: Float[Array, "P n"] | None = None


class TokenRows(NamedTuple):
    """The rows that are decoded.

    Attributes:
      last: the last token of each, int32[R, 1] each; segment 0 = the row has ended, and is not read any more.
      cache: keys and values of everything that was read.
      seen_RV: bool, the tokens that a row has; None unless repetition has a penalty.
      stop_R: int32, what each has of a stop string; None unless there are such.
    """

    last: Sequences
    cache: Cache
    seen_RV: Array | None
    stop_R: Array | None

    def select(self, beam_Pn: Int[Array, "P n"]) -> "TokenRows":
        """Returns the rows that take the places of the old ones: row beam_Pn[p, i] of prompt p becomes its row i."""
        last, seen_RV, stop_R = caches.select_rows((self.last, self.seen_RV, self.stop_R), beam_Pn)
        return TokenRows(last, caches.select(self.cache, beam_Pn), seen_RV, stop_R)

    def followed_by(self, token_R: Int[Array, " R"], stops: StopTable | None) -> "TokenRows":
        """Returns the rows with one more token."""
        seen_RV, stop_R = self.seen_RV, self.stop_R
        if seen_RV is not None:
            seen_RV = seen_RV.at[jnp.arange(len(token_R)), token_R].set(True)
        if stops is not None and stop_R is not None:
            stop_R = stops.after(stop_R, token_R)
        last = self.last._replace(tokens=token_R[:, None], positions=self.last.positions + 1)
        return TokenRows(last, self.cache, seen_RV, stop_R)

    def ended_at(self, ended_R: Bool[Array, " R"]) -> "TokenRows":
        """Returns the rows, some of which have ended and are not read any more."""
        segment_R1 = jnp.where(ended_R[:, None], 0, self.last.segments)
        return self._replace(last=self.last._replace(segments=segment_R1))


class Prefill(NamedTuple):
    """The prompts as they were read.

    Attributes:
      logits_PV: of the first new token of each prompt.
      cache: keys and values of the prompts, with slots for the tokens to come.
    """

    logits_PV: Array
    cache: Cache


def prefill(model: LanguageModule, prompts: Prompts, *, new_tokens: int, compute: Compute) -> Prefill:
    """Reads the prompts in one pass; nothing in it depends on how tokens are chosen."""
    rows, length = prompts.decoder.tokens.shape
    # images go to the encoder where there is one, else to the prompt
    encoder_images, prompt_images = (None, prompts.images) if prompts.encoder is None else (prompts.images, None)
    sides: dict[str, Any] = {"encoder": prompts.encoder, "images": encoder_images}
    slots = length + new_tokens - 1  # the last token is not read
    cache = model.start_cache(rows, slots, **sides, compute=compute)
    images: Any = prompt_images
    hidden_PTD, cache = model.extend(prompts.decoder, cache, images, first=True, compute=compute)
    return Prefill(model.logits(hidden_PTD[:, -1:])[:, 0], cache)


def first_rows(
    decoder: Sequences, prefilled: Prefill, stops: StopTable | None, options: GenerationOptions
) -> tuple[Float[Array, "R V"], TokenRows]:
    """Returns the logits of the first new token of each row, and the rows, which share their prompt's encoder."""
    last = Sequences(*(x[:, -1:] for x in decoder[:3]))
    seen_PV = _seen(decoder, prefilled.logits_PV.shape[-1]) if options.repetition_penalty != 1 else None
    stop_P = None if stops is None else jnp.zeros(len(decoder.tokens), jnp.int32)
    n = options.copies
    logits_RV, last, seen_RV, stop_R = caches.repeat_rows((prefilled.logits_PV, last, seen_PV, stop_P), n)
    return logits_RV, TokenRows(last, caches.repeat(prefilled.cache, n), seen_RV, stop_R)


def extend(model: LanguageModule, rows: TokenRows, options: GenerationOptions) -> tuple[Float[Array, "R V"], TokenRows]:
    """Reads the last token of each row; returns the logits of the next one, and the rows."""
    hidden_R1D, cache = model.extend(rows.last, rows.cache, compute=options.compute)
    return model.logits(hidden_R1D)[:, 0], rows._replace(cache=cache)


def restricted(
    scores_RV: Float[Array, "R V"], rows: TokenRows, count: Int[Array, ""], options: GenerationOptions
) -> Float[Array, "R V"]:
    """Returns scores of the next token by the rules of the options; -inf = not allowed.

    Args:
      scores_RV: logits, or log-probabilities.
      count: int32[], number of tokens generated so far.
    """
    if rows.seen_RV is not None:
        penalty = options.repetition_penalty
        penalized_RV = jnp.where(scores_RV > 0, scores_RV / penalty, scores_RV * penalty)
        scores_RV = jnp.where(rows.seen_RV, penalized_RV, scores_RV)
    if options.suppressed_ids:
        scores_RV = scores_RV.at[:, jnp.array(options.suppressed_ids)].set(-jnp.inf)
    if options.min_new_tokens and options.stop_ids:
        too_early_RV = jnp.where(count < options.min_new_tokens, -jnp.inf, scores_RV)
        stop_ids = jnp.array(options.stop_ids)
        scores_RV = scores_RV.at[:, stop_ids].set(too_early_RV[:, stop_ids])
    return scores_RV


def ends(
    token: Int[Array, "..."], stop: Int[Array, "..."] | None, stops: StopTable | None, options: GenerationOptions
) -> Bool[Array, "..."]:
    """Returns True where a token ends an output, or its text has a stop string after it.

    Args:
      stop: states of `stops` after the tokens.
    """
    ends = jnp.isin(token, jnp.array(options.stop_ids, jnp.int32))
    return ends if stops is None or stop is None else ends | stops.found(stop)


def _seen(prompt: Sequences, vocabulary: int) -> Bool[Array, "P V"]:
    """Returns the tokens that each prompt has; an image's may be past the vocabulary."""
    tokens_PT = jnp.where(prompt.segments != 0, prompt.tokens, vocabulary)
    rows_P1 = jnp.arange(len(tokens_PT))[:, None]
    return jnp.zeros((len(tokens_PT), vocabulary), bool).at[rows_P1, tokens_PT].set(True, mode="drop")
