"""Image tokens: which embedding goes where, and that nothing else moves."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.core import tree
from t5g2.core.batch import Sequences, image_blocks
from t5g2.models import build, image_embeddings
from tests import tiny, weights
from tests.tiny import FLOAT32


def test_the_docstrings_of_insert_and_image_blocks():
    tokens = np.array([[5, 8, 8, 9, 8], [8, 5, 5, 5, 8]], np.int32)
    x_BTD = jnp.zeros((2, 5, 1))
    soft_BKD = jnp.arange(1.0, 7.0).reshape(2, 3, 1)
    got = image_embeddings.insert(x_BTD, tokens, soft_BKD, token=8)
    np.testing.assert_array_equal(got[..., 0], [[0, 1, 2, 0, 3], [4, 0, 0, 0, 5]])
    np.testing.assert_array_equal(image_blocks(tokens, 8), [[0, 1, 1, 0, 2], [1, 0, 0, 0, 2]])
    made = jax.jit(lambda given: image_embeddings.with_blocks(given, tiny.IMAGES))(stream(tokens))
    np.testing.assert_array_equal(made.blocks, image_blocks(tokens, 8))
    own = stream(tokens)._replace(blocks=np.ones_like(tokens))
    assert image_embeddings.with_blocks(own, tiny.IMAGES) is own


@pytest.mark.parametrize("shape", [(1, 1, 4, 64, 1), (2, 4, 4, 4, 2), (1, 8, 16, 2, 1)])
def test_pixels_are_those_that_data_prepares_bit_for_bit(shape):
    every = np.arange(256, dtype=np.uint8)
    expected = every.astype(np.float32) / np.float32(127.5) - np.float32(1)
    got = jax.jit(image_embeddings.normalized)(every.reshape(shape))
    assert got is not None
    assert got.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(got).ravel(), expected)
    assert image_embeddings.normalized(None) is None


def stream(tokens) -> Sequences:
    tokens = np.atleast_2d(np.array(tokens, np.int32))
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Sequences(tokens, np.ones_like(tokens), positions)


SPAN = [6, 8, 8, 8, 8, 7]
SIZE = tiny.VISION.image_size


def test_a_row_sees_its_own_images_and_each_in_its_place():
    """Rows do not mix, an image that has no tokens changes nothing, and a causal model's earlier tokens see none."""
    model = weights.model(tiny.GEMMA3_IMAGES)
    decoder = stream([[2, *SPAN, 11, 12, *SPAN, 13], [2, 14, 15, *SPAN, 16, 17, 18, 19, 20, 21, 22]])
    decoder = decoder._replace(blocks=image_blocks(decoder.tokens, 8))
    hidden = jax.jit(lambda model, pixels: model.hidden(None, decoder, pixels, compute=FLOAT32))
    pixels = jax.random.uniform(jax.random.key(0), (2, 2, SIZE, SIZE, 3), minval=-1.0)
    exact = hidden(model, pixels)

    def moved(row, image):
        other = hidden(model, pixels.at[row, image].add(0.5))
        return np.abs(np.asarray(other - exact)).max(-1) > 1e-6

    first, second = moved(0, 0), moved(0, 1)
    assert not first[1].any()
    assert not second[1].any()
    # from its first soft token on: begin, which is before it, sees nothing
    np.testing.assert_array_equal(first[0], np.arange(16) >= 2)
    np.testing.assert_array_equal(second[0], np.arange(16) >= 10)
    assert moved(1, 0)[1].any()
    assert not moved(1, 1).any()


@pytest.mark.parametrize("token", [8, tiny.GEMMA3.vocab_size], ids=["in the vocabulary", "past it"])
def test_a_causal_encoder_reads_images_as_a_decoder_only_model(token):
    """Two images and text around them, longer than the window: the same states from the same weights."""
    config = replace(tiny.GEMMA3, images=replace(tiny.IMAGES, token=token))
    pair = replace(tiny.T5GEMMA2, encoder=config, encoder_attention="causal", eoi_id=None)
    model, drawn = weights.model(config), weights.weights(config) | weights.weights(pair)
    # the stack of a decoder-only model is the encoder here; what else both have has one name
    read = {key: drawn.get((key[0].removeprefix("encoder."), key[1]), drawn[key]) for key in drawn}
    other = tree.build(build.abstract(pair), read.__getitem__)
    tokens = np.array([2, *SPAN, 11, 12, *SPAN, 13])
    tokens = stream(np.where(tokens == 8, token, tokens))
    pixels = jax.random.uniform(jax.random.key(0), (1, 2, SIZE, SIZE, 3), minval=-1.0)
    alone = tokens._replace(blocks=image_blocks(tokens.tokens, token))
    expected = np.asarray(model.hidden(None, alone, pixels, compute=FLOAT32))
    encode = jax.jit(lambda encoder: other.encode(encoder, pixels, compute=FLOAT32))
    np.testing.assert_allclose(encode(tokens), expected, atol=1e-5)
    np.testing.assert_allclose(encode(alone), expected, atol=1e-5)
    assert np.abs(np.asarray(model.hidden(None, tokens, pixels, compute=FLOAT32)) - expected).max() > 1e-2


def test_an_image_token_past_the_vocabulary_needs_no_row():
    config = tiny.dataclasses.replace(
        tiny.GEMMA3_IMAGES, images=tiny.dataclasses.replace(tiny.IMAGES, token=tiny.GEMMA3.vocab_size)
    )
    model = weights.model(config)
    decoder = stream([2, 6, *[97] * 4, 7, 11])
    pixels = jnp.zeros((1, 1, SIZE, SIZE, 3))
    states = model.hidden(None, decoder, pixels, compute=FLOAT32)
    assert np.isfinite(states).all()


def test_images_for_a_model_of_text_are_refused():
    model = weights.model(tiny.GEMMA3)
    with pytest.raises(ValueError, match="a model without a vision tower"):
        model.hidden(None, stream([2, 11]), jnp.zeros((1, 1, SIZE, SIZE, 3)), compute=FLOAT32)
    with pytest.raises(ValueError, match="reads images with its prompt"):
        model.start_cache(1, 4, images=jnp.zeros((1, 1, SIZE, SIZE, 3)), compute=FLOAT32)
    model = weights.model(tiny.T5GEMMA2)
    with pytest.raises(ValueError, match="reads images with its encoder"):
        model.extend(stream([2]), None, jnp.zeros((1, 1, SIZE, SIZE, 3)), compute=FLOAT32)
