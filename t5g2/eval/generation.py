"""Generation: the prompt is read once, then one token after the other from caches, in one compiled loop.

B rows, T prompt length, S encoder length, N new tokens, I images of a row, V vocabulary, D width.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5g2.core.batch import Sequences, image_blocks
from t5g2.core.errors import UserError
from t5g2.core.sharding import constrain
from t5g2.data.tokenizers.registry import Tokenizer
from t5g2.models.cache import Cache
from t5g2.models.config import EncoderDecoderConfig
from t5g2.models.gemma import Gemma
from t5g2.models.layers import Compute
from t5g2.models.t5gemma import T5Gemma

Model = Gemma | T5Gemma


class Sampler(abc.ABC):
    """How the next token is chosen: drawn from the softmax of the logits that this leaves."""

    @abc.abstractmethod
    def restrict(self, logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits to draw from; -inf = never."""


@dataclass(frozen=True)
class Greedy(Sampler):
    """The likeliest token, the first of several: logits [1 3 3] become [-inf 3 -inf]."""

    def restrict(self, logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """All but one are -inf."""
        best_B = jnp.argmax(logits_BV, axis=-1)
        return jnp.where(jax.nn.one_hot(best_B, logits_BV.shape[-1], dtype=bool), logits_BV, -jnp.inf)


@dataclass(frozen=True)
class Temperature(Sampler):
    """Any token, with probability in proportion to exp(logit / t); t = 0.5: logits [1 3 2] become [2 6 4]."""

    t: float = 1.0

    def __post_init__(self):
        if self.t <= 0:
            raise UserError(f"a temperature of {self.t}: it must be above 0; for the likeliest token use greedy")

    def restrict(self, logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits over t."""
        return logits_BV / self.t


@dataclass(frozen=True)
class TopK(Sampler):
    """One of the k likeliest tokens, of equal ones the first: k = 2: logits [1 3 2 2] become [-inf 3 2 -inf]."""

    k: int
    t: float = 1.0

    def __post_init__(self):
        if self.k < 1:
            raise UserError(f"top-k with k = {self.k}; it must be at least 1")
        Temperature(self.t)

    def restrict(self, logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The k largest over t, the others -inf."""
        top_Bk, where_Bk = jax.lax.top_k(logits_BV, min(self.k, logits_BV.shape[-1]))
        none_BV = jnp.full_like(logits_BV, -jnp.inf)
        return jnp.put_along_axis(none_BV, where_Bk, top_Bk / self.t, axis=-1, inplace=False)


@dataclass(frozen=True)
class TopP(Sampler):
    """One of the fewest tokens that together have probability p or more (nucleus sampling, arXiv 1904.09751).

    p = 0.6: probabilities [0.1 0.5 0.3 0.1] become [0 0.5 0.3 0], scaled to sum to 1; the temperature comes first.
    """

    p: float
    t: float = 1.0

    def __post_init__(self):
        if not 0 < self.p <= 1:
            raise UserError(f"top-p with p = {self.p}; it must be above 0 and at most 1")
        Temperature(self.t)

    def restrict(self, logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits over t, -inf where the likelier tokens already have p."""
        logits_BV = logits_BV / self.t
        order_BV = jnp.argsort(logits_BV, axis=-1, descending=True)
        sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
        probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
        likelier_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        kept_BV = jnp.where(likelier_BV < self.p, sorted_BV, -jnp.inf)
        return jnp.put_along_axis(jnp.empty_like(kept_BV), order_BV, kept_BV, axis=-1, inplace=False)


BY_NAME = {"greedy": Greedy, "temperature": Temperature, "top_k": TopK, "top_p": TopP}
GREEDY, FLOAT32 = Greedy(), Compute(dtype="float32")


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate; static under jit.

    Attributes:
      max_new_tokens: a row ends after so many, or at the first of `ends`.
      ends: ids; EOS, and what else ends a row (Gemma 3's instruction-tuned models: <end_of_turn> too).
      pad: the id that follows a row's end.
      sampler: how the next token is chosen.
      compute: dtype and attention backend of the forward pass.
      suppressed: ids that are never made (google-deepmind/gemma forbids Gemma 3 the tokens around images).
      prompt_both_ways: a decoder-only model's prompt sees itself both ways, as PrefixLMDecoder trains it.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    sampler: Sampler = GREEDY
    compute: Compute = FLOAT32
    suppressed_ids: tuple[int, ...] = ()
    prompt_both_ways: bool = False

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens = {self.max_new_tokens}; it must be at least 1")


class DecodeState(NamedTuple):
    """What goes round: how many tokens are made, and they; each row's last token, whether that ended it, the cache."""

    count: Array
    tokens_BN: Array
    last_B: Array
    done_B: Array
    cache: Cache


@partial(jax.jit, static_argnames="decoding")
def generate(
    model: Model,
    encoder: Sequences | None,
    prompt: Sequences,
    images: Float[Array, "B I H W 3"] | None = None,
    *,
    options: GenerationOptions,
    key: Array,
) -> Int[Array, "B N"]:
    """int32[B, max_new_tokens]: what follows the prompt in each row, its end included, then pad.

    Args:
      model: any; `encoder` is None for a decoder-only one.
      encoder: what an encoder-decoder reads, int32[B, S] each; segment 1, and 0 where it is padding.
      prompt: what the decoder begins with, int32[B, T] each, padded on the left: its last column is each row's last
        token. At least BOS. Rows whose last segment is 0 are not generated for.
      images: for the image tokens of the encoder, or, decoder-only, of the prompt, which then has `blocks`.
      key: for samplers that draw; row b's draws depend on the key and b alone.
    """
    rows, length = prompt.tokens.shape
    compute, limit = options.compute, options.max_new_tokens
    segment_B, position_B = prompt.segments[:, -1], prompt.positions[:, -1]

    def choose(hidden_BD: Array, number: Array, done_B: Array) -> Array:
        logits_BV = model.logits(hidden_BD[:, None])[:, 0]
        if options.suppressed_ids:
            logits_BV = logits_BV.at[:, jnp.array(options.suppressed_ids)].set(-jnp.inf)
        logits_BV = options.sampler.restrict(logits_BV)
        keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, number)))(jnp.arange(rows))
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
        return jnp.where(done_B, options.pad_id, drawn_B)

    def ended(next_B: Array) -> Array:
        return jnp.isin(next_B, jnp.array(options.stop_ids, jnp.int32))

    def goes_on(loop: DecodeState) -> Array:
        return (loop.count < limit) & ~jnp.all(loop.done_B)

    def step(loop: DecodeState) -> DecodeState:
        # a row that is done goes on as padding, which nobody sees
        segments_B = jnp.where(loop.done_B, 0, segment_B)
        last = Sequences(loop.last_B[:, None], segments_B[:, None], (position_B + loop.count)[:, None])
        hidden_B1D, cache = model.extend(last, loop.cache, compute=compute)
        next_B = choose(hidden_B1D[:, 0], loop.count, loop.done_B)
        tokens_BN = loop.tokens_BN.at[:, loop.count].set(next_B)
        return DecodeState(loop.count + 1, tokens_BN, next_B, loop.done_B | ended(next_B), cache)

    # an encoder-decoder reads images with its encoder, a decoder-only model, which takes no encoder, with its prompt
    read, seen = (None, images) if encoder is None else (images, None)
    asked = {"encoder": encoder, "images": read, "compute": compute}
    cache = model.start_cache(rows, length + limit - 1, **asked)
    hidden_BTD, cache = model.extend(prompt, cache, seen, compute=compute)  # pyright: ignore[reportArgumentType]
    first_B = choose(hidden_BTD[:, -1], jnp.zeros((), jnp.int32), segment_B == 0)
    tokens_BN = jnp.full((rows, limit), options.pad_id, jnp.int32).at[:, 0].set(first_B)
    done_B = (segment_B == 0) | ended(first_B)
    loop = DecodeState(jnp.ones((), jnp.int32), tokens_BN, first_B, done_B, cache)
    # whole on every host, so that each can read it
    return constrain(jax.lax.while_loop(goes_on, step, loop).tokens_BN, None, None)


def generate_text(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    sampler: Sampler = GREEDY,
    compute: Compute = FLOAT32,
    seed: int = 0,
) -> list[str]:
    """What the model makes of each prompt, as text without special tokens.

    An encoder-decoder reads the prompt with its encoder and the decoder begins; a decoder-only model continues it.
    Prompts of different lengths are fine: each row gets what it would get alone.
    """
    made = generate_tokens(
        model,
        tokenizer,
        [tokenizer.encode(prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        compute=compute,
        seed=seed,
    )
    return [tokenizer.decode(tokens, show_special_tokens=False) for tokens in made]


def generate_tokens(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int = 64,
    seed: int = 0,
    **options: Any,
) -> list[np.ndarray]:
    """int32[n] for each prompt of int32 tokens: what follows, without EOS and padding; `how` is Decoding's.

    To have an encoder-decoder fill in spans, put sentinels into the prompt where they are missing.
    """
    special_tokens = tokenizer.special_tokens
    decoding = GenerationOptions(max_new_tokens, (special_tokens.eos,), special_tokens.pad, **options)
    decoder_only = not isinstance(model.config, EncoderDecoderConfig)
    bos = np.array([special_tokens.bos], np.int32)
    read = [np.concatenate([bos, tokens]) for tokens in prompts] if decoder_only else prompts
    return complete(model, read, bos=special_tokens.bos, options=decoding, seed=seed)


def complete(
    model: Model,
    prompts: Sequence[np.ndarray],
    images: Float[np.ndarray, "B I H W 3"] | None = None,
    *,
    bos: int,
    options: GenerationOptions,
    seed: int = 0,
) -> list[np.ndarray]:
    """int32[n] for each prompt of int32 tokens: what follows, without its end and padding.

    Args:
      prompts: as the model is to read them, a decoder-only one's with BOS.
      images: float32 in [-1, 1], for the image tokens of each prompt.
      bos: what the decoder of an encoder-decoder begins with.
    """
    if not len(prompts):
        return []
    pad, config = options.pad_id, model.config
    if isinstance(config, EncoderDecoderConfig):
        encoder = pad_rows(prompts, pad=pad, left=False)
        prompt = pad_rows([np.array([bos], np.int32)] * len(prompts), pad=pad, left=True, multiple=1)
    else:
        encoder = None
        prompt = pad_rows(prompts, pad=pad, left=True)
        if images is not None and config.images is not None:
            prompt = prompt._replace(blocks=image_blocks(prompt.tokens, config.images.token))
        if options.prompt_both_ways:
            prompt = prompt._replace(blocks=prompt.segments)
    made_BN = np.asarray(generate(model, encoder, prompt, images, decoding=options, key=jax.random.key(seed)))
    return [_before_stop(row, (*options.stop_ids, pad)) for row in made_BN]


def pad_rows(sequences: Sequence[np.ndarray], *, pad: int, left: bool, multiple: int = 32) -> Sequences:
    """Sequences of different lengths as rows of one; segment 1 and positions from 0 where there are tokens.

    The length is a multiple of `multiple`, so that few programs are compiled. [7 8 9] and [5] with left=True,
    multiple=1, pad = 0:

        tokens     [7 8 9]   segments  [1 1 1]   positions  [0 1 2]
                   [0 0 5]             [0 0 1]              [0 0 0]
    """
    longest = max([1, *map(len, sequences)])
    length = -(-longest // multiple) * multiple
    tokens = np.full((len(sequences), length), pad, np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, sequence in enumerate(sequences):
        place = slice(length - len(sequence), length) if left else slice(0, len(sequence))
        tokens[row, place], segments[row, place] = sequence, 1
        positions[row, place] = np.arange(len(sequence))
    return Sequences(tokens, segments, positions)


def _before_stop(row: np.ndarray, ends: Sequence[int]) -> np.ndarray:
    end = np.flatnonzero(np.isin(row, ends))
    return row[: end[0]] if len(end) else row
