"""Decoding with a cache gives the states of the full forward pass."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.core.batch import Sequences, image_blocks
from t5g2.models import build
from t5g2.models.config import TextConfig
from t5g2.models.layers import Compute
from tests import tiny, weights
from tests.tiny import GEMMA3, T5GEMMA2

COMPUTE = Compute(dtype="float32")
PROMPTS, DECODED = (7, 3), 8  # two rows; every window is 4 or 5
ENCODER_LENGTHS = (9, 6)
SLOTS = max(PROMPTS) + DECODED + 2  # and parts of one token or of a prompt's length, so that tests share programs
FAMILIES = {
    "gemma 2": tiny.GEMMA2,
    "gemma 3": GEMMA3,
    "gemma 3, own head": replace(GEMMA3, tied_head=False),
    "t5gemma": tiny.T5GEMMA,
    "t5gemma, cross-attention in global layers": replace(tiny.T5GEMMA, cross_layers="global"),
    "t5gemma 2": T5GEMMA2,
    "t5gemma 2, merged in global layers": replace(T5GEMMA2, cross_layers="global"),
    "t5gemma 2, own embeddings": replace(T5GEMMA2, tied_embedding=False),
}
CONFIGS = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


def padded(rows: list[np.ndarray], side: str) -> Sequences:
    """Rows of unequal lengths as one array; positions count tokens, not places."""
    length = max(map(len, rows))
    tokens, segments, positions = (np.zeros((len(rows), length), np.int32) for _ in range(3))
    for i, row in enumerate(rows):
        at = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        tokens[i, at], segments[i, at], positions[i, at] = row, 1, np.arange(len(row))
    return Sequences(tokens, segments, positions)


@pytest.fixture(scope="module")
def text():
    draw = np.random.RandomState(0)
    return (
        [draw.randint(10, 97, n + DECODED) for n in PROMPTS],
        [draw.randint(10, 97, n) for n in ENCODER_LENGTHS],
    )


# jitted once, with the model as an argument: run op by op, these tests take minutes
HIDDEN = jax.jit(lambda model, encoder, decoder: model.hidden(encoder, decoder, compute=COMPUTE))
EXTEND = jax.jit(lambda model, decoder, cache: model.extend(decoder, cache, compute=COMPUTE))
BEGIN = jax.jit(lambda model, decoder, cache: model.extend(decoder, cache, first=True, compute=COMPUTE))


@functools.partial(jax.jit, static_argnames=("rows", "length"))
def start(model, encoder, *, rows: int, length: int):
    return model.start_cache(rows, length, encoder=encoder, compute=COMPUTE)


def full(model, rows, encoder_rows) -> np.ndarray:
    """The states of every row, computed without a cache."""
    encoder = None if isinstance(model.config, TextConfig) else padded(encoder_rows, "right")
    return np.asarray(HIDDEN(model, encoder, padded(rows, "right")))


def token(rows, step: int) -> Sequences:
    """The token of each row that is decoded at a step, at its own position."""
    positions = np.array([[n + step] for n in PROMPTS], np.int32)
    tokens = np.array([[row[p[0]]] for row, p in zip(rows, positions, strict=True)], np.int32)
    return Sequences(tokens, np.ones_like(tokens), positions)


@pytest.mark.parametrize("side", ["left", "right"])
@CONFIGS
def test_cached_decoding_equals_the_full_forward_pass(config, side, text):
    rows, encoder_rows = text
    model = weights.model(config)
    expected = full(model, rows, encoder_rows)
    encoder = None if isinstance(config, TextConfig) else padded(encoder_rows, side)
    prompt = padded([row[:n] for row, n in zip(rows, PROMPTS, strict=True)], side)
    cache = start(model, encoder, rows=2, length=SLOTS)
    # the cache is empty, so that it need not be read
    states, cache = (BEGIN if side == "left" else EXTEND)(model, prompt, cache)
    for i, n in enumerate(PROMPTS):
        np.testing.assert_allclose(states[i][prompt.segments[i] == 1], expected[i][:n], atol=1e-5)
    for step in range(DECODED):
        states, cache = EXTEND(model, token(rows, step), cache)
        for i, n in enumerate(PROMPTS):
            np.testing.assert_allclose(states[i, 0], expected[i][n + step], atol=1e-5, err_msg=f"{step} {i}")
    assert int(cache.used) == max(PROMPTS) + DECODED


@CONFIGS
def test_a_prompt_may_come_in_parts(config, text):
    rows, encoder_rows = text
    model = weights.model(config)
    expected = full(model, rows, encoder_rows)
    encoder = None if isinstance(config, TextConfig) else padded(encoder_rows, "right")
    length = len(rows[1])
    whole = padded([row[:length] for row in rows], "right")
    cache = start(model, encoder, rows=2, length=SLOTS)
    chunks = []
    # the second is longer than a window, with keys before it and after
    for first, end in ((0, 1), (1, 8), (8, 9), (9, 10), (10, length)):
        chunk = Sequences(*(leaf[:, first:end] for leaf in whole[:3]))
        states, cache = EXTEND(model, chunk, cache)
        chunks.append(states)
    together = np.concatenate(chunks, axis=1)
    for i in range(2):
        np.testing.assert_allclose(together[i], expected[i][:length], atol=1e-5)


def test_a_bidirectional_prefix_is_remembered(text):
    (row, _), _ = text
    model = weights.model(GEMMA3)
    whole = padded([row], "right")
    blocks = (np.arange(len(row)) < 6).astype(np.int32)[None]
    expected = HIDDEN(model, None, whole._replace(blocks=blocks))
    cache = start(model, None, rows=1, length=len(row))
    chunks = []
    for first, end, with_blocks in ((0, 6, True), (6, 7, False), (7, len(row), False)):
        chunk = Sequences(*(leaf[:, first:end] for leaf in whole[:3]), blocks[:, first:end] if with_blocks else None)
        states, cache = EXTEND(model, chunk, cache)
        chunks.append(states)
    np.testing.assert_allclose(np.concatenate(chunks, axis=1), expected, atol=1e-5)


def test_decoding_reads_the_encoder_no_more(text):
    rows, encoder_rows = text
    model = weights.model(T5GEMMA2)
    cache = start(model, padded(encoder_rows, "right"), rows=2, length=SLOTS)
    states, _ = EXTEND(model, token(rows, 0), cache)
    model.encoder = jax.tree.map(np.zeros_like, jax.device_get(model.encoder))
    again, _ = EXTEND(model, token(rows, 0), cache)
    np.testing.assert_array_equal(again, states)


def test_a_donated_cache_is_updated_in_place():
    config = replace(GEMMA3, layers=16)
    model = build.abstract(config)
    cache = jax.eval_shape(lambda m: m.start_cache(2, 512, compute=COMPUTE), model)
    one = Sequences(*3 * [jax.ShapeDtypeStruct((2, 1), jnp.int32)])
    extend = jax.jit(lambda model, new, cache: model.extend(new, cache, compute=COMPUTE), donate_argnums=2)
    memory = extend.lower(model, one, cache).compile().memory_analysis()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= 0.95 * size
    assert memory.temp_size_in_bytes < 0.25 * size  # what a few layers need, not a second cache


def test_the_cache_has_the_dtype_of_activations():
    model = weights.model(GEMMA3)
    cache = jax.eval_shape(lambda: model.start_cache(1, 4, compute=Compute(dtype="bfloat16")))
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.past)} == {jnp.dtype(jnp.bfloat16)}


def test_more_tokens_than_slots_are_refused(text):
    (row, _), _ = text
    model = weights.model(GEMMA3)
    cache = start(model, None, rows=1, length=4)
    with pytest.raises(ValueError, match="15 new tokens do not fit a cache of 4 slots"):
        model.extend(padded([row], "right"), cache, compute=COMPUTE)


def test_a_cache_needs_as_many_encoder_rows_as_it_has():
    model = weights.model(T5GEMMA2)
    with pytest.raises(ValueError, match="a cache of 2 rows needs encoder tokens of as many rows; given: None"):
        model.start_cache(2, 4, compute=COMPUTE)


IMAGE_CONFIGS = {"gemma 3": tiny.GEMMA3_IMAGES, "t5gemma 2": tiny.T5GEMMA2_IMAGES}


@pytest.mark.parametrize("config", IMAGE_CONFIGS.values(), ids=IMAGE_CONFIGS)
def test_cached_decoding_with_images_equals_the_full_forward_pass(config, text):
    """Two images in the first row, one in the second; the window of 4 is as long as an image."""
    rows, _ = text
    model = weights.model(config)
    size = tiny.VISION.image_size
    images = jax.random.uniform(jax.random.key(0), (2, 2, size, size, 3), minval=-1.0)
    span = [6, 8, 8, 8, 8, 7]
    read = [np.array([2, *span, 11, *span, 12]), np.array([2, 13, 14, *span])]
    compute = COMPUTE

    def hidden(model, encoder, decoder, images):
        return model.hidden(encoder, decoder, images, compute=compute)

    def blocks(stream):
        return stream._replace(blocks=image_blocks(stream.tokens, 8))

    if isinstance(config, TextConfig):
        whole = [np.concatenate([a, b]) for a, b in zip(read, rows, strict=True)]
        expected = jax.jit(hidden)(model, None, blocks(padded(whole, "right")), images)
        prompt, encoder = blocks(padded(read, "left")), None
        cache = start(model, None, rows=2, length=prompt.tokens.shape[1] + DECODED)
        extend = jax.jit(lambda model, decoder, cache, images: model.extend(decoder, cache, images, compute=compute))
        states, cache = extend(model, prompt, cache, images)
        before = [len(r) for r in read]
    else:
        encoder = padded(read, "left")
        expected = jax.jit(hidden)(model, padded(read, "right"), padded(rows, "right"), images)
        cache = jax.jit(lambda m, e, i: m.start_cache(2, DECODED, encoder=e, images=i, compute=compute))(
            model, encoder, images
        )
        before = [0, 0]
    for step in range(DECODED):
        tokens = np.array([[row[step]] for row in rows], np.int32)
        positions = np.array([[n + step] for n in before], np.int32)
        states, cache = EXTEND(model, Sequences(tokens, np.ones_like(tokens), positions), cache)
        for i, n in enumerate(before):
            np.testing.assert_allclose(states[i, 0], expected[i][n + step], atol=1e-5, err_msg=f"{step} {i}")
    other = jax.jit(hidden)(
        model,
        None if encoder is None else padded(read, "right"),
        blocks(padded(whole, "right")) if encoder is None else padded(rows, "right"),
        images + 0.1,
    )
    assert np.abs(np.asarray(other) - np.asarray(expected)).max() > 1e-2  # the images tell


def test_a_local_layer_holds_no_more_than_its_window():
    model = weights.model(GEMMA3)
    cache = start(model, None, rows=2, length=40)
    slots = {kind: tokens.segments.shape[1] for kind, tokens in cache.tokens.items()}
    assert slots == {"local": GEMMA3.window, "global": 40}
    lengths = [keys.k_BSKH.shape[-3] for keys in (*cache.past.slots, *cache.past.tail)]
    assert lengths == [slots[kind] for kind in ("local", "global", "local")]


def test_slots_of_a_window_are_filled_again():
    """The table of the module's docstring: padding takes no slot of a window, and one slot of a global layer."""
    model = weights.model(replace(GEMMA3, window=4))
    cache = start(model, None, rows=2, length=9)
    prompt = padded([np.arange(10, 15), np.arange(10, 12)], "right")
    _, cache = EXTEND(model, prompt, cache)
    assert cache.tokens["local"].positions.tolist() == [[4, 1, 2, 3], [0, 1, 0, 0]]
    assert cache.tokens["local"].segments.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    for step in range(2):
        _, cache = EXTEND(model, Sequences(*np.array([[[9], [9]], [[1], [1]], [[5 + step], [2 + step]]])), cache)
    assert cache.tokens["local"].positions.tolist() == [[4, 5, 6, 3], [0, 1, 2, 3]]
    assert cache.tokens["global"].positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 0], [0, 1, 0, 0, 0, 2, 3, 0, 0]]


def test_a_row_that_waits_loses_nothing():
    """Rows that write padding, token by token, keep the keys of their window."""
    model, draw = weights.model(GEMMA3), np.random.RandomState(0)
    row = draw.randint(10, 97, 12)
    expected = full(model, [row], None)[0]
    cache = start(model, None, rows=1, length=30)
    states = []
    for position, waiting in enumerate((0, 0, 3, 0, 0, 5, 0, 0, 1, 0, 4, 0)):
        for real in (*[0] * waiting, 1):
            tokens = Sequences(*np.array([[[row[position]]], [[real]], [[position * real]]], np.int32))
            hidden, cache = EXTEND(model, tokens, cache)
        states.append(hidden[0, 0])
    np.testing.assert_allclose(states, expected, atol=1e-5)
