"""Cost of generation: exact FLOPs of a query, and its measured latency, so that quality can be drawn against both.

FLOPs are those of models/flops.py, with the head on the tokens whose logits are needed alone: the last of a prompt, and
every new one. Latency is of one query at a time, on the devices that the weights are on, without compilation.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from t5g2.core.batch import Sequences
from t5g2.eval.decoding import LanguageModule
from t5g2.eval.generation import GenerationSetup, batch_of, prefilled, stream_from
from t5g2.eval.metrics.intervals import Interval
from t5g2.models import flops
from t5g2.models.config import LanguageModelConfig

# queries whose latency is measured, calls of each after one that compiles, and tokens of each
QUERIES, REPEATS, NEW_TOKENS = 5, 3, 16


class QueryFlops(NamedTuple):
    """FLOPs of a query: of its prompt, encoder included, with the first new token; and of all tokens after it."""

    prefill: int
    decode: int


def query_flops(config: LanguageModelConfig, prompt: np.ndarray, new_tokens: int, *, copies: int = 1) -> QueryFlops:
    """Returns the FLOPs of one query with `new_tokens` outputs, at least one; the last of them is not read.

    Args:
      copies: beams that are decoded after the one prompt, each of them with as many tokens.
      prompt: int32[T], tokens that the encoder reads, or a decoder-only model; image tokens stand for their images.
    """
    after = np.zeros(new_tokens - 1, np.int32)
    if config.is_encoder_decoder:
        encoder, begin = _sequences(prompt), np.zeros(1, np.int32)
    else:
        encoder, begin = None, prompt
    prefill, whole = (
        flops.forward(config, flops.count_rows(config, encoder, _sequences(tokens)))
        for tokens in (begin, np.concatenate([begin, after]))
    )
    head = prefill["head"] // len(begin)
    first = sum(prefill.values()) - prefill["head"] + head
    return QueryFlops(first, copies * (sum(whole.values()) - sum(prefill.values())))


def latencies(model: LanguageModule, prompts: Sequence[np.ndarray], setup: GenerationSetup) -> Mapping[str, np.ndarray]:
    """Returns seconds of the prefill, and of each token after the first, of every call: "prefill" and "token".

    Stop tokens do not end an output here, so that all have as many tokens.

    Args:
      prompts: int32 tokens of some queries, without images.
    """
    new = max(2, min(NEW_TOKENS, setup.options.max_new_tokens))
    options = replace(setup.options, max_new_tokens=new, min_new_tokens=0, stop_ids=())
    setup = replace(setup, options=options, rows=None, stops=None)
    seconds: dict[str, list[float]] = {"prefill": [], "token": []}
    for prompt in prompts:
        batch, keys_R = batch_of(model, [prompt], setup=setup)
        for turn in range(REPEATS + 1):
            begun = time.perf_counter()
            state = jax.block_until_ready(prefilled(model, batch, options=options, keys_R=keys_R))
            middle = time.perf_counter()
            jax.block_until_ready(list(stream_from(model, state, batch, options=options, every=new)))
            if turn:
                seconds["prefill"].append(middle - begun)
                seconds["token"].append((time.perf_counter() - middle) / (new - 1))
    return {name: np.array(values) for name, values in seconds.items()}


def cost_scores(
    model: LanguageModule, prompts: Sequence[np.ndarray], lengths: Sequence[int], setup: GenerationSetup
) -> dict[str, Interval]:
    """Returns the cost of queries by name, each with the spread over queries, or over calls of a latency.

    prefill_flops, token_flops (of a token after the first, of all beams), query_flops: means over the queries, whose
    search is taken to end with the output that it returns. prefill_seconds,
    token_seconds: medians over calls of the first queries.

    Args:
      prompts: int32 tokens of each query.
      lengths: number of tokens that were generated for each.
    """
    pairs = zip(prompts, lengths, strict=True)
    spent = [query_flops(model.config, prompt, max(1, n), copies=setup.options.copies) for prompt, n in pairs]
    values = {
        "prefill_flops": np.array([query.prefill for query in spent], np.float64),
        "query_flops": np.array([sum(query) for query in spent], np.float64),
    }
    decoded = [query.decode / (n - 1) for query, n in zip(spent, lengths, strict=True) if n > 1]
    if decoded:
        values["token_flops"] = np.array(decoded)
    scores = {name: _interval(float(numbers.mean()), numbers) for name, numbers in values.items()}
    for name, seconds in latencies(model, prompts[:QUERIES], setup).items():
        scores[f"{name}_seconds"] = _interval(float(np.median(seconds)), seconds)
    return scores


def _interval(value: float, numbers: np.ndarray) -> Interval:
    low, high = np.quantile(numbers, [0.025, 0.975]).tolist()
    return Interval(value, len(numbers), low, high)


def _sequences(tokens: np.ndarray) -> Sequences:
    row = tokens[None]
    return Sequences(row, np.ones_like(row), np.arange(row.shape[1], dtype=np.int32)[None])
