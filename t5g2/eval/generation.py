"""Generation from prompts of any lengths: outputs that do not depend on the batch in which a prompt is.

P prompts, n outputs of each, R = P * n rows, N new tokens, I images of a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from t5g2.core.batch import Sequences, image_blocks
from t5g2.core.device import device_memory
from t5g2.core.errors import UserError
from t5g2.core.sharding import constrain, parts
from t5g2.eval import beam_search, decoding, sample_search
from t5g2.eval.decoding import Generated, LanguageModule, Prompts
from t5g2.eval.generation_options import FLOAT32, GenerationOptions
from t5g2.eval.sampling import (
    BY_NAME,
    GREEDY,
    Greedy,
    Sampler,
    Sampling,
    Temperature,
    TopK,
    TopP,
    row_keys,
)
from t5g2.eval.stop_strings import StopTable

# samplers and options are public names of this module
__all__ = [
    "BY_NAME",
    "FLOAT32",
    "GREEDY",
    "Generated",
    "GenerationOptions",
    "GenerationSetup",
    "Greedy",
    "LanguageModule",
    "Output",
    "Prompts",
    "Sampler",
    "Sampling",
    "Temperature",
    "TopK",
    "TopP",
    "batch_of",
    "batches_by_length",
    "complete",
    "generate",
    "outputs",
    "pad_rows",
    "padded_length",
    "prefilled",
    "stream",
    "stream_from",
]


class Output(NamedTuple):
    """An output of a prompt.

    Attributes:
      tokens: int32[m], without stop token and padding.
      log_probs: float32, natural log-probability in the model's own distribution of each token, and of the stop token
        if one ends the output: m or m + 1. None unless asked for.
      score: what beams are ranked by; None without beam search.
      length: number of generated tokens, m or m + 1.
      stop_token: the stop token that ends the output, if one does.
    """

    tokens: np.ndarray
    log_probs: np.ndarray | None = None
    score: float | None = None
    length: int = 0
    stop_token: int | None = None


@dataclass(frozen=True)
class GenerationSetup:
    """Settings of `complete`, the same for all batches.

    Attributes:
      options: options of generation.
      bos: first token of the decoder of an encoder-decoder model.
      seed: seed of the sampler.
      rows: a batch is filled up to so many prompts, so that batches share a program; None = no more than the devices
        need.
      stops: strings that end an output.
    """

    options: GenerationOptions
    bos: int
    seed: int = 0
    rows: int | None = None
    stops: StopTable | None = None


def complete(
    model: LanguageModule,
    prompts: Sequence[np.ndarray],
    images: Float[np.ndarray, "P I H W 3"] | None = None,
    *,
    setup: GenerationSetup,
    indices: Sequence[int] | None = None,
) -> list[Output]:
    """Returns the outputs of prompts of int32 tokens, num_return_sequences of each prompt after each other.

    An encoder-decoder model reads the prompt with its encoder, a decoder-only model continues it. Prompts may have
    different lengths: padding does not change the tokens.

    Args:
      model: a language model.
      prompts: tokens as the model reads them, with BOS for a decoder-only model. To have an encoder-decoder model fill
        in spans, put sentinels into the prompt where they are missing.
      images: float32 in [-1, 1], for the image tokens of each prompt.
      indices: a number of each prompt, with which it draws the same tokens in any batch; None = 0, 1, 2, …

    Raises:
      UserError: the prompts do not fit into the memory of a device; more beams than tokens.
    """
    if not len(prompts):
        return []
    batch, keys_R = batch_of(model, prompts, images, setup=setup, indices=indices)
    generated = generate(model, batch, options=setup.options, keys_R=keys_R)
    return outputs(generated, setup.options)[: len(prompts) * setup.options.num_return_sequences]


def generate(
    model: LanguageModule, prompts: Prompts, *, options: GenerationOptions, keys_R: Array | None = None
) -> Generated:
    """Returns the outputs of a batch of prompts, as long as the longest; every process can read them.

    Args:
      keys_R: the random key of each row (`sampling.row_keys`); None for greedy tokens and beams.
    """
    *_, generated = stream(model, prompts, options=options, keys_R=keys_R, every=options.max_new_tokens)
    return generated


def stream(
    model: LanguageModule, prompts: Prompts, *, options: GenerationOptions, keys_R: Array | None = None, every: int = 1
) -> Iterator[Generated]:
    """Yields what was generated so far after every `every` tokens, and at the end; beams are known at the end only."""
    state = prefilled(model, prompts, options=options, keys_R=keys_R)
    yield from stream_from(model, state, prompts, options=options, every=every)


def stream_from(
    model: LanguageModule, state: Any, prompts: Prompts, *, options: GenerationOptions, every: int
) -> Iterator[Generated]:
    """Yields what `stream` does, from a state of `prefilled`, which is used up."""
    count, running = 0, True
    while running:
        count += every
        state, generated, is_running = _advance(model, state, prompts.stops, jnp.int32(count), options=options)
        running = bool(is_running)
        yield generated


def prefilled(model: Any, prompts: Prompts, *, options: GenerationOptions, keys_R: Array | None = None) -> Any:
    """Returns the state after the prompts and one token of each output."""
    # a program of its own, so that other samplers, beams and penalties need no other one to read the prompts
    read = _prefill(model, prompts._replace(stops=None), new_tokens=options.max_new_tokens, compute=options.compute)
    cache, memory = read.cache._replace(memory=None, encoder=None), (read.cache.memory, read.cache.encoder)
    first_token = _first_token if options.copies == 1 else _first_token_of_copies
    return first_token(prompts.decoder, read.logits_PV, cache, memory, prompts.stops, keys_R, options=options)


_prefill = jax.jit(decoding.prefill, static_argnames=("new_tokens", "compute"))


def _start(decoder, logits_PV, cache, memory, stops, keys_R, *, options: GenerationOptions):
    """Returns the state after one token of each output; `memory` is what the cache has of the encoder."""
    read = decoding.Prefill(logits_PV, cache._replace(memory=memory[0], encoder=memory[1]))
    return _search(options).start(decoder, read, stops, keys_R, options=options)


# keys and values go on in place, those of the prompt itself only where it has one output
_first_token = jax.jit(_start, static_argnames="options", donate_argnames=("cache", "memory"))
_first_token_of_copies = jax.jit(_start, static_argnames="options", donate_argnames="memory")


# the caches in the state are updated in place
@partial(jax.jit, static_argnames="options", donate_argnames="state")
def _advance(model, state, stops: StopTable | None, until: Array, *, options: GenerationOptions):
    """Returns the state after `until` tokens, what was generated so far, and whether there is more to generate."""
    search = _search(options)

    def is_running(state):
        return search.is_running(state, options)

    state = jax.lax.while_loop(
        lambda state: (state.count < until) & is_running(state),
        lambda state: search.step(model, state, stops, options=options),
        state,
    )
    generated = search.outputs(state, options)
    # replicated, so that every process can read the outputs
    readable = jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), (generated, is_running(state)))
    return state, *readable


def _search(options: GenerationOptions) -> Any:
    """Returns the module with the start, the step and the outputs of these options."""
    return beam_search if options.num_beams > 1 else sample_search


def batch_of(
    model: LanguageModule,
    prompts: Sequence[np.ndarray],
    images: Float[np.ndarray, "P I H W 3"] | None = None,
    *,
    setup: GenerationSetup,
    indices: Sequence[int] | None = None,
) -> tuple[Prompts, Array | None]:
    """Returns prompts as a padded batch, and the random keys of its rows; arguments as in `complete`."""
    options = setup.options
    vocabulary = model.config.decoder_stack.vocab_size
    if options.num_beams > vocabulary:
        raise UserError(
            f"num_beams = {options.num_beams} is more than the {vocabulary} tokens of the vocabulary; lower it"
        )
    rows = max(setup.rows or 0, len(prompts))
    rows += -rows % _row_parts()
    _check_memory(model, rows, max(map(len, prompts)), options)
    empty = rows - len(prompts)
    if images is not None:
        images = np.concatenate([images, np.zeros((empty, *images.shape[1:]), images.dtype)])
    pad = options.pad_id
    padding = [np.zeros(0, np.int32)] * empty
    if model.config.is_encoder_decoder:
        encoder = pad_rows([*prompts, *padding], pad=pad, left=False)
        decoder = pad_rows([np.array([setup.bos], np.int32)] * len(prompts) + padding, pad=pad, left=True, multiple=1)
    else:
        encoder = None
        decoder = pad_rows([*prompts, *padding], pad=pad, left=True)
        image_config = model.config.image_stack.images
        # blocks of tokens that attend to each other both ways: each image, or the whole prompt
        if images is not None and image_config is not None:
            decoder = decoder._replace(blocks=image_blocks(decoder.tokens, image_config.token))
        if options.prompt_both_ways:
            decoder = decoder._replace(blocks=decoder.segments)
    keys_R = None
    if options.num_beams == 1 and not isinstance(options.sampler, Greedy):
        numbers = np.zeros(rows, np.int32)
        numbers[: len(prompts)] = np.arange(len(prompts)) if indices is None else indices
        keys_R = row_keys(setup.seed, jnp.array(numbers), options.num_return_sequences)
    return Prompts(decoder, encoder, images, setup.stops), keys_R


def outputs(generated: Generated, options: GenerationOptions) -> list[Output]:
    """Returns the outputs of all rows, on the host."""
    tokens_PnN, length_Pn, log_probs_PnN, score_Pn = (None if x is None else np.asarray(x) for x in generated)
    assert tokens_PnN is not None
    assert length_Pn is not None
    results = []
    for place in np.ndindex(length_Pn.shape):
        length = int(length_Pn[place])
        tokens = tokens_PnN[place][:length]
        log_probs = None if log_probs_PnN is None else log_probs_PnN[place][:length]
        stopped = length > 0 and tokens[-1] in options.stop_ids
        score = None if score_Pn is None else float(score_Pn[place])
        stop_token = int(tokens[-1]) if stopped else None
        results.append(Output(tokens[:-1] if stopped else tokens, log_probs, score, length, stop_token))
    return results


def padded_length(length: int) -> int:
    """Returns the length to which a row is padded: at most a quarter longer above 128, so that lengths are few.

    A multiple of 32, above 128 of a quarter of the power of two below: 32 64 96 128 160 192 224 256 320 384 448 512 …
    """
    step = max(32, 2 ** (max(length - 1, 1).bit_length() - 3))
    return -(-length // step) * step


def batches_by_length(lengths: Sequence[int], rows: int | None) -> list[list[int]]:
    """Returns the prompts of each batch, by index: at most `rows` of one padded length, the shortest first."""
    if rows is None:
        return [list(range(len(lengths)))] if lengths else []
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(padded_length(length), []).append(index)
    return [group[i : i + rows] for _, group in sorted(by_length.items()) for i in range(0, len(group), rows)]


def pad_rows(sequences: Sequence[np.ndarray], *, pad: int, left: bool, multiple: int | None = None) -> Sequences:
    """Pads sequences to rows of one length; segment 1 and positions from 0 where there are tokens.

    The length is a multiple of `multiple`; None = that of `padded_length`. [7 8 9] and [5] with left=True, multiple=1,
    pad=0:

        tokens     [7 8 9]   segments  [1 1 1]   positions  [0 1 2]
                   [0 0 5]             [0 0 1]              [0 0 0]
    """
    longest = max([1, *map(len, sequences)])
    length = padded_length(longest) if multiple is None else -(-longest // multiple) * multiple
    tokens = np.full((len(sequences), length), pad, np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, sequence in enumerate(sequences):
        columns = slice(length - len(sequence), length) if left else slice(0, len(sequence))
        tokens[row, columns], segments[row, columns] = sequence, 1
        positions[row, columns] = np.arange(len(sequence))
    return Sequences(tokens, segments, positions)


def _row_parts() -> int:
    """Returns the number of parts into which the rows of a batch are split over devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else parts("rows", mesh.size)


def _check_memory(model: LanguageModule, rows: int, longest: int, options: GenerationOptions) -> None:
    """Raises UserError if keys and values of the prompts, or their attention scores, exceed a device's memory."""
    stack, available = model.config.encoder_stack or model.config.decoder_stack, device_memory()
    rows = -(-rows // _row_parts())
    size = jnp.dtype(options.compute.dtype).itemsize
    needs = {"keys and values": 2 * size * rows * longest * stack.layers * stack.kv_heads * stack.head_size}
    if options.compute.backend == "reference":
        # of one layer, [rows, heads, T, T]
        needs["attention scores"] = 4 * rows * stack.heads * longest**2
    decoder, new_tokens = model.config.decoder_stack, options.max_new_tokens
    # a local layer holds its window alone
    layers = sum(decoder.kind(layer) == "global" for layer in range(decoder.layers))
    needed = 2 * size * rows * options.copies * new_tokens * layers * decoder.kv_heads * decoder.head_size
    if needed > available:
        raise UserError(
            f"{rows * options.copies} outputs of max_new_tokens = {new_tokens:,} need {needed / 2**30:,.0f} GiB for "
            f"keys and values, and the device has {available / 2**30:,.0f}; lower max_new_tokens, num_beams or "
            f"num_return_sequences, or give fewer prompts at a time"
        )
    for name, needed in needs.items():
        if needed > available:
            raise UserError(
                f"{rows} prompts, the longest of {longest:,} tokens, need {needed / 2**30:,.0f} GiB for {name}, and "
                f"the device has {available / 2**30:,.0f}; shorten them, or give fewer at a time"
            )
