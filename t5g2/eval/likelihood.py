"""Log-likelihood of continuations, for both kinds of models: what multiple choice and perplexity are made of.

B rows, S encoder length, T decoder length.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from t5g2.core.batch import Sequences
from t5g2.core.bounds import Size, checked
from t5g2.core.sharding import batch_sharding, constrain
from t5g2.data.pipeline import to_global
from t5g2.eval.generation import LanguageModule, pad_rows
from t5g2.eval.reading import Reading
from t5g2.models.layers import Compute
from t5g2.models.loss import token_losses
from t5g2.models.loss_config import LossConfig


class Likelihood(NamedTuple):
    """Log-likelihood of a continuation.

    Attributes:
      sum: sum of the log-probabilities of its tokens, in nats; 0 for an empty one.
      is_greedy: True if each token is the likeliest after those before it, so that greedy generation would give them.
      tokens: number of tokens.
      text_bytes: number of bytes of text that they stand for.
    """

    sum: float
    is_greedy: bool
    tokens: int
    text_bytes: int


class TokenPair(NamedTuple):
    """A context and its continuation in tokens, int32 each; the context is what the model reads, with BOS."""

    context: np.ndarray
    continuation: np.ndarray


@dataclass(frozen=True)
@checked
class Scoring:
    """Settings of log-likelihoods.

    Attributes:
      reading: how the model reads texts.
      rows: rows of a batch over all processes.
      compute: dtype and attention backend of the forward pass.
      loss: settings of the loss head; a teacher is not used.
      mesh: devices of the weights; None = one device.
      advance: called with the number of pairs after each batch, and with that of all; may raise to end the work.
    """

    reading: Reading
    rows: Size = 8
    compute: Compute = Compute()
    loss: LossConfig = LossConfig()
    mesh: Mesh | None = None
    advance: Callable[[int, int], object] = max


def loglikelihood(model: LanguageModule, pairs: Sequence[tuple[str, str]], *, scoring: Scoring) -> list[Likelihood]:
    """Returns the log-likelihood of each continuation given its context, of texts (context, continuation).

    An encoder-decoder model reads the context with its encoder, and the continuation is its decoder's; a decoder-only
    model reads both, tokenised together. Space at the end of a context belongs to the continuation. All of it as in
    lm-evaluation-harness (EleutherAI, lm_eval/api/model.py, _encode_pair), so that the numbers are the same.

    Every process of a run calls this with all pairs, and gets all results.
    """
    is_encoder_decoder = model.config.is_encoder_decoder
    return score_tokens(
        model,
        [encode_pair(scoring.reading, *pair, is_encoder_decoder=is_encoder_decoder) for pair in pairs],
        scoring=scoring,
    )


def loglikelihood_rolling(
    model: LanguageModule, texts: Sequence[str], *, window: int, context_tokens: int = 1, scoring: Scoring
) -> list[Likelihood]:
    """Returns the log-likelihood of each whole text, long ones in windows of at most `window` tokens.

    Every token is predicted once, as in lm-evaluation-harness (lm_eval/utils.py, get_rolling_token_windows): the first
    window begins after BOS, each later one after the last token of the one before; the last window reaches back so
    that it is as long as the others. An encoder-decoder model reads what comes before a window with its encoder.

    Args:
      context_tokens: tokens before a window that are read at least, where there are so many; the harness has 1.
    """
    windows = [text_windows(scoring.reading, text, window, context_tokens) for text in texts]
    scores = iter(score_tokens(model, [pair for several in windows for pair in several], scoring=scoring))
    return [_total([next(scores) for _ in several]) for several in windows]


def encode_pair(reading: Reading, context: str, continuation: str, *, is_encoder_decoder: bool) -> TokenPair:
    """Returns a context and a continuation in tokens, as `loglikelihood` reads them."""
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    tokens = reading.tokenizer.encode(context)
    if is_encoder_decoder:
        following = reading.tokenizer.encode(continuation)
    else:
        # together, because a token may hold the end of the one and the beginning of the other
        following = reading.tokenizer.encode(context + continuation)[len(tokens) :]
    return TokenPair(reading.inputs(tokens, is_encoder_decoder=is_encoder_decoder), following)


def text_windows(reading: Reading, text: str, window: int, context_tokens: int = 1) -> list[TokenPair]:
    """Returns the windows of a text, in each of which the continuation is predicted from the context and itself.

    Tokens [11 12 13 14 15], BOS 2, window 3: ([2], [11 12 13]) and ([12 13], [14 15]); with 3 tokens of context the
    second is ([11 12 13], [14 15]).
    """
    return token_windows(reading.tokenizer.encode_document(text), reading.bos, window, context_tokens)


def token_windows(tokens: np.ndarray, bos: int, window: int, context_tokens: int = 1) -> list[TokenPair]:
    """Returns the windows of tokens, the first of which is predicted after `bos`."""
    before = np.append(np.int32(bos), tokens).astype(np.int32)
    pairs = []
    for start in range(0, len(tokens), window):
        end = min(start + window, len(tokens))
        # the last token of the context predicts the first of the continuation, so the inputs are `window` tokens
        first = max(0, min(end - window, start + 1 - context_tokens))
        pairs.append(TokenPair(before[first : start + 1], tokens[start:end]))
    return pairs


def score_tokens(model: LanguageModule, pairs: Sequence[TokenPair], *, scoring: Scoring) -> list[Likelihood]:
    """Returns the log-likelihood of each continuation; batches are of pairs of about one length."""
    is_encoder_decoder = model.config.is_encoder_decoder
    results = [Likelihood(0.0, True, 0, 0)] * len(pairs)
    filled = [number for number, pair in enumerate(pairs) if len(pair.continuation)]
    for numbers, lengths in _batches(pairs, filled, scoring.rows, is_encoder_decoder):
        scoring.advance(0, len(filled))
        arrays = _arrays([pairs[n] for n in numbers], lengths, scoring, is_encoder_decoder)
        if scoring.mesh is not None:
            arrays = to_global(arrays, batch_sharding(scoring.mesh), rows=scoring.rows)
        scores_B2 = np.asarray(_row_scores(model, *arrays, compute=scoring.compute, loss=scoring.loss), np.float64)
        for number, (total, wrong) in zip(numbers, scores_B2.tolist(), strict=False):
            continuation = pairs[number].continuation
            text_bytes = int(scoring.reading.tokenizer.byte_counts(continuation).sum())
            results[number] = Likelihood(total, wrong == 0, len(continuation), text_bytes)
        scoring.advance(len(numbers), len(filled))
    return results


def _total(scores: Sequence[Likelihood]) -> Likelihood:
    return Likelihood(
        sum(score.sum for score in scores),
        all(score.is_greedy for score in scores),
        sum(score.tokens for score in scores),
        sum(score.text_bytes for score in scores),
    )


def bucket_length(length: int) -> int:
    """Returns the length that rows are filled up to: of 32, 48, 64, 96, 128, 192, … the first that is enough.

    These are fewer than those of generation: an encoder-decoder has a length on each side, and a program for each pair.
    """
    size = 32
    while size < length:
        if 3 * size // 2 >= length:
            return 3 * size // 2
        size *= 2
    return size


def _batches(
    pairs: Sequence[TokenPair], numbers: Sequence[int], rows: int, is_encoder_decoder: bool
) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Yields the numbers of the pairs of each batch, and the lengths of its rows on both sides, long ones first."""

    def lengths(number: int) -> tuple[int, int]:
        pair = pairs[number]
        if is_encoder_decoder:
            return bucket_length(len(pair.context)), bucket_length(len(pair.continuation))
        return 0, bucket_length(len(pair.context) + len(pair.continuation) - 1)

    ordered = sorted(numbers, key=lambda number: (*(-length for length in lengths(number)), number))
    for start in range(0, len(ordered), rows):
        batch = ordered[start : start + rows]
        sides = np.array([lengths(number) for number in batch]).max(axis=0).tolist()
        yield batch, (sides[0], sides[1])


def _arrays(
    pairs: Sequence[TokenPair], lengths: tuple[int, int], scoring: Scoring, is_encoder_decoder: bool
) -> tuple[Any, ...]:
    """Returns (encoder, decoder, targets, weights) of `scoring.rows` rows; rows past the pairs have weight 0.

    Context [2 5], continuation [6 7], decoder-only: decoder [2 5 6], targets [5 6 7], weights [0 1 1].
    """
    reading, pad = scoring.reading, scoring.reading.tokenizer.special_tokens.pad
    empty = [np.zeros(0, np.int32)] * (scoring.rows - len(pairs))
    if is_encoder_decoder:
        start = np.array([reading.decoder_start], np.int32)
        encoder = pad_rows([*(pair.context for pair in pairs), *empty], pad=pad, left=False, multiple=lengths[0])
        whole = [np.concatenate([start, pair.continuation]) for pair in pairs]
    else:
        encoder, whole = None, [np.concatenate([pair.context, pair.continuation]) for pair in pairs]
    decoder = pad_rows([*(row[:-1] for row in whole), *empty], pad=pad, left=False, multiple=lengths[1])
    targets = np.zeros_like(decoder.tokens)
    weights = np.zeros(targets.shape, np.float32)
    for row, (pair, tokens) in enumerate(zip(pairs, whole, strict=True)):
        targets[row, : len(tokens) - 1] = tokens[1:]
        weights[row, len(tokens) - 1 - len(pair.continuation) : len(tokens) - 1] = 1
    return encoder, decoder, targets, weights


@partial(jax.jit, static_argnames=("compute", "loss"))
def _row_scores(
    model: LanguageModule,
    encoder: Sequences | None,
    decoder: Sequences,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    compute: Compute,
    loss: LossConfig,
) -> Float[Array, "B 2"]:
    """Returns for each row the log-likelihood of its targets, and the number of those that are not the likeliest."""
    hidden_BTD = model.hidden(encoder, decoder, compute=compute)  # pyright: ignore[reportArgumentType]
    tokens = token_losses(hidden_BTD, model.head(), targets_BT, loss)
    is_target_BT = weights_BT > 0
    # losses at padding are undefined and need not be finite
    sums_B = -jnp.sum(jnp.where(is_target_BT, tokens.loss_BT, 0.0), axis=1)
    wrong_B = jnp.sum(is_target_BT & ~tokens.correct_BT, axis=1).astype(jnp.float32)
    # replicated, so that every process can read them
    return constrain(jnp.stack([sums_B, wrong_B], axis=1), None, None)
