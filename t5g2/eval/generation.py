"""Generation: the prompt is prefilled once, then tokens are decoded one by one from the cache, in one compiled loop.

B rows, T prompt length, S encoder length, N new tokens, I images of a row, V vocabulary, D width.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from typing_extensions import override

from t5g2.core.batch import Sequences, image_blocks
from t5g2.core.bounds import Bounds, Positive, Size, TokenId, checked
from t5g2.core.device import device_memory
from t5g2.core.errors import UserError
from t5g2.core.sharding import constrain
from t5g2.models.cache import Cache
from t5g2.models.gemma import Gemma
from t5g2.models.layers import Compute
from t5g2.models.t5gemma import T5Gemma

LanguageModule = Gemma | T5Gemma


class Sampler(abc.ABC):
    """Rule by which the next token is chosen: it is drawn from the softmax of the restricted logits."""

    @abc.abstractmethod
    def restrict(self, logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Returns the logits to draw from; -inf = never drawn."""

    def draw(self, logits_BV: Float[Array, "B V"], key: Array, step: Array) -> Int[Array, " B"]:
        """Returns a token for each row; the draw of row b depends on the key, on int32[] step and on b alone."""
        # a key of its own per row and step, so that the rows of a batch do not influence each other
        rows_B = jnp.arange(logits_BV.shape[0])
        keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, step)))(rows_B)
        return jax.vmap(jax.random.categorical)(keys_B, self.restrict(logits_BV)).astype(jnp.int32)


@dataclass(frozen=True)
class Greedy(Sampler):
    """Takes the likeliest token, of equal ones the first: logits [1 3 3] become [-inf 3 -inf]."""

    @override
    def restrict(self, logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
        best_B = jnp.argmax(logits_BV, axis=-1)
        return jnp.where(jax.nn.one_hot(best_B, logits_BV.shape[-1], dtype=bool), logits_BV, -jnp.inf)

    @override
    def draw(self, logits_BV: Float[Array, "B V"], key: Array, step: Array) -> Int[Array, " B"]:
        # nothing is random, and random numbers for a whole vocabulary would take longer than the comparison
        del key, step
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


@dataclass(frozen=True)
@checked
class Temperature(Sampler):
    """Draws any token, with probability in proportion to exp(logit / t); t = 0.5: logits [1 3 2] become [2 6 4]."""

    t: Annotated[float, Bounds(above=0, hint="for the likeliest token use greedy")] = 1.0

    @override
    def restrict(self, logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
        return logits_BV / self.t


@dataclass(frozen=True)
@checked
class TopK(Sampler):
    """Draws one of the k likeliest tokens, of equal ones the first; k = 2: logits [1 3 2 2] become [-inf 3 2 -inf].

    The temperature t divides the logits that are left.
    """

    k: Size
    t: Positive = 1.0

    @override
    def restrict(self, logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
        top_Bk, token_Bk = jax.lax.top_k(logits_BV, min(self.k, logits_BV.shape[-1]))
        excluded_BV = jnp.full_like(logits_BV, -jnp.inf)
        return jnp.put_along_axis(excluded_BV, token_Bk, top_Bk / self.t, axis=-1, inplace=False)


@dataclass(frozen=True)
@checked
class TopP(Sampler):
    """Draws one of the fewest tokens that together have probability p or more (nucleus sampling, arXiv 1904.09751).

    p = 0.6: probabilities [0.1 0.5 0.3 0.1] become [0 0.5 0.3 0], scaled to sum to 1; the temperature comes first.
    """

    p: Annotated[float, Bounds(above=0, most=1)]
    t: Positive = 1.0

    @override
    def restrict(self, logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
        logits_BV = logits_BV / self.t
        # a sum in float32 may reach 1 before the last token
        if self.p == 1:
            return logits_BV
        order_BV = jnp.argsort(logits_BV, axis=-1, descending=True)
        sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
        probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # the token that crosses p still counts, so the sum of the likelier ones decides, without the token itself
        likelier_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        kept_BV = jnp.where(likelier_BV < self.p, sorted_BV, -jnp.inf)
        return jnp.put_along_axis(jnp.empty_like(kept_BV), order_BV, kept_BV, axis=-1, inplace=False)


@dataclass(frozen=True)
@checked
class Sampling(Sampler):
    """Temperature, then top-k, then top-p, in transformers' order; None = left out.

    t = 1, k = 3, p = 0.6: probabilities [0.1 0.4 0.3 0.2] become [0 4/9 3/9 2/9], then [0 4/7 3/7 0].
    """

    t: Positive = 1.0
    k: Size | None = None
    p: Annotated[float, Bounds(above=0, most=1)] | None = None

    @override
    def restrict(self, logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
        logits_BV = Temperature(self.t).restrict(logits_BV)
        if self.k is not None:
            logits_BV = TopK(self.k).restrict(logits_BV)
        return logits_BV if self.p is None else TopP(self.p).restrict(logits_BV)


BY_NAME = {"greedy": Greedy, "temperature": Temperature, "top_k": TopK, "top_p": TopP, "sampling": Sampling}
GREEDY, FLOAT32 = Greedy(), Compute(dtype="float32")


@dataclass(frozen=True)
@checked
class GenerationOptions:
    """Options of generation; static under jit.

    Attributes:
      max_new_tokens: largest number of tokens per row; a row ends earlier at the first of `stop_ids`.
      stop_ids: EOS, and other tokens that end a row (Gemma 3's instruction-tuned models: <end_of_turn> too).
      pad_id: the id that follows the end of a row.
      sampler: rule by which the next token is chosen.
      compute: dtype and attention backend of the forward pass.
      suppressed_ids: ids that are never generated (google-deepmind/gemma excludes the tokens around images).
      prompt_both_ways: attention within a decoder-only model's prompt is bidirectional, as PrefixLMDecoder trains it.
    """

    max_new_tokens: Size
    stop_ids: tuple[TokenId, ...]
    pad_id: TokenId
    sampler: Sampler = GREEDY
    compute: Compute = FLOAT32
    suppressed_ids: tuple[TokenId, ...] = ()
    prompt_both_ways: bool = False


class DecodeState(NamedTuple):
    """State of the decode loop.

    Attributes:
      count: int32[], tokens generated so far.
      tokens_BN: int32, the generated tokens, then padding.
      last_B: int32, the last token of each row.
      done_B: bool, True once a row has ended.
      cache: keys and values of everything that was read.
    """

    count: Array
    tokens_BN: Array
    last_B: Array
    done_B: Array
    cache: Cache


@partial(jax.jit, static_argnames="options")
def generate(
    model: LanguageModule,
    encoder: Sequences | None,
    prompt: Sequences,
    images: Float[Array, "B I H W 3"] | None = None,
    *,
    options: GenerationOptions,
    key: Array,
) -> Int[Array, "B N"]:
    """Returns int32[B, max_new_tokens]: the tokens after the prompt of each row, its stop token included, then pad_id.

    Args:
      encoder: input of an encoder-decoder model, int32[B, S] each; segment 1, and 0 at padding. None for a decoder-only
        model.
      prompt: first tokens of the decoder, at least BOS, int32[B, T] each, padded on the left, so that the last column
        holds the last token of each row. Rows whose last segment is 0 get padding only.
      images: for the image tokens of the encoder, or of a decoder-only prompt, which then has `blocks`.
      key: random key of the sampler; the draws of row b depend on the key and on b alone.
    """
    rows, length = prompt.tokens.shape
    compute, max_new_tokens = options.compute, options.max_new_tokens
    segment_B, position_B = prompt.segments[:, -1], prompt.positions[:, -1]

    def sample(hidden_BD: Array, index: Array, done_B: Array) -> Array:
        logits_BV = model.logits(hidden_BD[:, None])[:, 0]
        if options.suppressed_ids:
            logits_BV = logits_BV.at[:, jnp.array(options.suppressed_ids)].set(-jnp.inf)
        return jnp.where(done_B, options.pad_id, options.sampler.draw(logits_BV, key, index))

    def is_stop(token_B: Array) -> Array:
        return jnp.isin(token_B, jnp.array(options.stop_ids, jnp.int32))

    def is_running(state: DecodeState) -> Array:
        return (state.count < max_new_tokens) & ~jnp.all(state.done_B)

    def step(state: DecodeState) -> DecodeState:
        # a finished row continues as padding, segment 0, to which no token attends
        segments_B = jnp.where(state.done_B, 0, segment_B)
        last = Sequences(state.last_B[:, None], segments_B[:, None], (position_B + state.count)[:, None])
        hidden_B1D, cache = model.extend(last, state.cache, compute=compute)
        next_B = sample(hidden_B1D[:, 0], state.count, state.done_B)
        tokens_BN = state.tokens_BN.at[:, state.count].set(next_B)
        return DecodeState(state.count + 1, tokens_BN, next_B, state.done_B | is_stop(next_B), cache)

    # images go to the encoder where there is one, else to the prompt
    encoder_images, prompt_images = (None, images) if encoder is None else (images, None)
    sides: dict[str, Any] = {"encoder": encoder, "images": encoder_images}
    cache = model.start_cache(rows, length + max_new_tokens - 1, **sides, compute=compute)  # the last token is not read
    # prefill: the whole prompt in one pass, whose last column gives the first new token
    hidden_BTD, cache = model.extend(prompt, cache, prompt_images, compute=compute)  # pyright: ignore[reportArgumentType]
    first_B = sample(hidden_BTD[:, -1], jnp.zeros((), jnp.int32), segment_B == 0)
    tokens_BN = jnp.full((rows, max_new_tokens), options.pad_id, jnp.int32).at[:, 0].set(first_B)
    done_B = (segment_B == 0) | is_stop(first_B)
    state = DecodeState(jnp.ones((), jnp.int32), tokens_BN, first_B, done_B, cache)
    # replicated, so that every process can read the tokens
    return constrain(jax.lax.while_loop(is_running, step, state).tokens_BN, None, None)


def complete(
    model: LanguageModule,
    prompts: Sequence[np.ndarray],
    images: Float[np.ndarray, "B I H W 3"] | None = None,
    *,
    bos: int,
    options: GenerationOptions,
    seed: int = 0,
) -> list[np.ndarray]:
    """Returns int32[n] for each prompt of int32 tokens: the tokens that follow, without stop token and padding.

    An encoder-decoder model reads the prompt with its encoder, a decoder-only model continues it. Prompts may have
    different lengths: padding does not change the tokens.

    Args:
      model: a language model.
      prompts: tokens as the model reads them, with BOS for a decoder-only model. To have an encoder-decoder model fill
        in spans, put sentinels into the prompt where they are missing.
      images: float32 in [-1, 1], for the image tokens of each prompt.
      bos: first token of the decoder of an encoder-decoder model.
      options: options of generation.
      seed: seed of the sampler.
    """
    if not len(prompts):
        return []
    _check_memory(model, [len(prompt) for prompt in prompts])
    pad = options.pad_id
    if model.config.is_encoder_decoder:
        encoder = pad_rows(prompts, pad=pad, left=False)
        prompt = pad_rows([np.array([bos], np.int32)] * len(prompts), pad=pad, left=True, multiple=1)
    else:
        encoder = None
        prompt = pad_rows(prompts, pad=pad, left=True)
        image_config = model.config.image_stack.images
        # blocks of tokens that attend to each other both ways: each image, or the whole prompt
        if images is not None and image_config is not None:
            prompt = prompt._replace(blocks=image_blocks(prompt.tokens, image_config.token))
        if options.prompt_both_ways:
            prompt = prompt._replace(blocks=prompt.segments)
    tokens_BN = np.asarray(generate(model, encoder, prompt, images, options=options, key=sampling_key(seed)))
    # not before a pad token: padding follows a stop token only, and any other pad token is one that the model chose
    return [_before_stop(row, options.stop_ids) for row in tokens_BN]


def sampling_key(seed: int) -> Array:
    """Returns the random key of a seed of at most 63 bits; jax alone would take its last 32."""
    key = jax.random.key(seed % 2**32)
    return key if seed < 2**32 else jax.random.fold_in(key, seed // 2**32)


def _check_memory(model: LanguageModule, lengths: Sequence[int]) -> None:
    """Raises UserError if the attention scores of one layer, float32[B, N, S, S], do not fit into a device's memory."""
    stack = model.config.encoder_stack or model.config.decoder_stack
    needed, available = 4 * len(lengths) * stack.heads * max(lengths) ** 2, device_memory()
    if needed > available:
        raise UserError(
            f"{len(lengths)} prompts, the longest of {max(lengths):,} tokens, need {needed / 2**30:,.0f} GiB for "
            f"attention scores, and the device has {available / 2**30:,.0f}; shorten them, or give fewer at a time"
        )


def pad_rows(sequences: Sequence[np.ndarray], *, pad: int, left: bool, multiple: int = 32) -> Sequences:
    """Pads sequences to rows of one length; segment 1 and positions from 0 where there are tokens.

    The length is a multiple of `multiple`, so that few programs are compiled. [7 8 9] and [5] with left=True,
    multiple=1, pad=0:

        tokens     [7 8 9]   segments  [1 1 1]   positions  [0 1 2]
                   [0 0 5]             [0 0 1]              [0 0 0]
    """
    longest = max([1, *map(len, sequences)])
    length = -(-longest // multiple) * multiple
    tokens = np.full((len(sequences), length), pad, np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, sequence in enumerate(sequences):
        columns = slice(length - len(sequence), length) if left else slice(0, len(sequence))
        tokens[row, columns], segments[row, columns] = sequence, 1
        positions[row, columns] = np.arange(len(sequence))
    return Sequences(tokens, segments, positions)


def _before_stop(row: np.ndarray, stop_ids: Sequence[int]) -> np.ndarray:
    stops = np.flatnonzero(np.isin(row, stop_ids))
    return row[: stops[0]] if len(stops) else row
