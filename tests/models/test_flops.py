import math
from dataclasses import replace
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.core.batch import Batch, Sequences, image_blocks
from t5g2.models import build, flops, masks
from t5g2.models.backends.reference import visible
from t5g2.models.config import EncoderDecoderConfig, EncoderWindow
from t5g2.models.flops import Counts
from t5g2.models.loss import cross_entropy
from t5g2.models.loss_config import LossConfig
from tests import tiny
from tests.models.row_counts import count_lengths


def stream(segments, blocks=None, tokens=None):
    """Rows of segments, with positions that run through each of them."""
    segments = np.array(segments, np.int32)
    positions = np.zeros_like(segments)
    for t in range(1, segments.shape[1]):
        positions[:, t] = np.where(segments[:, t] == segments[:, t - 1], positions[:, t - 1] + 1, 0)
    blocks = None if blocks is None else np.array(blocks, np.int32)
    return Sequences(np.zeros_like(segments) if tokens is None else np.array(tokens), segments, positions, blocks)


ENCODER = stream([[1] * 9 + [2] * 4 + [0] * 2, [1] * 15])
DECODER = stream([[1] * 3 + [2] * 7 + [3] * 2, [1] * 11 + [0]])  # row 0 has an example with an empty encoder side
PREFIX = stream(
    [[1] * 8 + [2] * 4, [1] * 11 + [0]],
    blocks=[[0, 1, 1, 1, 2, 2, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]],
)


def pairs(query, keys, mask):
    return int(visible(query, keys, mask).sum())


@pytest.mark.parametrize(
    "encoder", [*({"encoder_window": way} for way in get_args(EncoderWindow)), {"encoder_attention": "causal"}]
)
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 100])
def test_pairs_are_those_that_the_masks_show(window, encoder):
    stack = replace(tiny.GEMMA3, window=window)
    config = replace(tiny.T5GEMMA2, encoder=stack, decoder=stack, **encoder)
    assert flops.count_rows(config, ENCODER, DECODER) == Counts(
        encoder_tokens=28,
        decoder_tokens=23,
        encoder_local=pairs(ENCODER, ENCODER, masks.encoder(config, "local")),
        encoder_global=pairs(ENCODER, ENCODER, masks.encoder(config, "global")),
        decoder_local=pairs(DECODER, DECODER, masks.decoder(stack, "local")),
        decoder_global=pairs(DECODER, DECODER, masks.decoder(stack, "global")),
        cross=pairs(DECODER, ENCODER, masks.ALL),
    )


@pytest.mark.parametrize("images", [None, replace(tiny.IMAGES, window=False), replace(tiny.IMAGES, window=True)])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 100])
def test_pairs_of_blocks_are_those_that_the_masks_show(window, images):
    stack = replace(tiny.GEMMA3, window=window, images=images)
    assert flops.count_rows(stack, None, PREFIX) == Counts(
        decoder_tokens=23,
        decoder_local=pairs(PREFIX, PREFIX, masks.decoder(stack, "local")),
        decoder_global=pairs(PREFIX, PREFIX, masks.decoder(stack, "global")),
    )


def test_a_packed_row_counts_as_its_examples_alone():
    alone = [count_lengths(tiny.T5GEMMA2, encoder=s, decoder=t) for s, t in ((9, 3), (4, 7), (0, 2), (15, 11))]
    packed = flops.count_rows(tiny.T5GEMMA2, ENCODER, DECODER)
    assert packed == alone[0] + alone[1] + alone[2] + alone[3]
    assert packed * 3 == packed + packed + packed


# two images of 4 tokens and one; the image token is 8, and stands in padding too
IMAGE_TOKENS = np.array([[5, 8, 8, 8, 8, 6, 8, 8, 8, 8, 3, 0], [8, 8, 8, 8, 2, 2, 2, 0, 8, 8, 8, 8]], np.int32)
WITH_IMAGES = stream([[1] * 11 + [0], [1] * 7 + [0] * 5], image_blocks(IMAGE_TOKENS, 8), IMAGE_TOKENS)


def test_images_are_counted_by_their_tokens():
    alone = [count_lengths(tiny.GEMMA3_IMAGES, decoder=n, images=i) for n, i in ((11, 2), (7, 1))]
    assert flops.count_rows(tiny.GEMMA3_IMAGES, None, WITH_IMAGES) == alone[0] + alone[1]
    assert (alone[0] + alone[1]).images == 3
    encoder = WITH_IMAGES._replace(blocks=None)
    alone = [count_lengths(tiny.T5GEMMA2_IMAGES, encoder=s, decoder=t, images=i) for s, t, i in ((11, 5, 2), (7, 4, 1))]
    assert flops.count_rows(tiny.T5GEMMA2_IMAGES, encoder, stream([[1] * 5, [1] * 4 + [0]])) == alone[0] + alone[1]
    assert flops.count_rows(tiny.T5GEMMA2, encoder, DECODER).images == 0  # a model of text only


def test_images_of_a_causal_encoder_are_blocks():
    """As the model makes them; the same as those of a decoder-only model that is given them."""
    for window in (False, True):
        images = replace(tiny.IMAGES, window=window)
        stack = replace(tiny.GEMMA3, window=2, images=images)
        config = replace(tiny.T5GEMMA2, encoder=stack, encoder_attention="causal")
        alone = flops.count_rows(stack, None, WITH_IMAGES)
        for encoder in (WITH_IMAGES, WITH_IMAGES._replace(blocks=None)):
            counts = flops.count_rows(config, encoder, DECODER)
            for kind in ("local", "global"):
                shown = pairs(WITH_IMAGES, WITH_IMAGES, masks.encoder(config, kind))
                assert getattr(counts, f"encoder_{kind}") == getattr(alone, f"decoder_{kind}") == shown
        parts = [count_lengths(config, encoder=s, decoder=5, images=i) for s, i in ((11, 2), (7, 1))]
        assert (parts[0] + parts[1]).encoder_local == alone.decoder_local


def products(jaxpr):
    """FLOPs of all matrix products of a program, every round of its loops counted."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        assert equation.primitive.name != "conv_general_dilated"
        rounds = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += rounds * products(inner)
    return total


COMPUTE = replace(tiny.FLOAT32, scan=False)
MODELS = {
    "gemma2": tiny.GEMMA2,
    "gemma3": tiny.GEMMA3,
    "gemma3-untied": replace(tiny.GEMMA3, tied_head=False),
    "gemma3-images": tiny.GEMMA3_IMAGES,
    "t5gemma": tiny.T5GEMMA,
    "t5gemma-global": replace(tiny.T5GEMMA, cross_layers="global"),
    "t5gemma2": tiny.T5GEMMA2,
    "t5gemma2-global": replace(tiny.T5GEMMA2, cross_layers="global"),
    "t5gemma2-images": tiny.T5GEMMA2_IMAGES,
}


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_the_programs_matrix_products(name):
    """The reference backend computes hidden pairs too: with all pairs counted, both agree to the FLOP."""
    config, rows, s, t = MODELS[name], 2, 6, 5
    encoder, decoder = (stream(np.ones((rows, n), np.int32)) for n in (s, t))
    if not isinstance(config, EncoderDecoderConfig):
        encoder, s = None, 0
    number = 3 if name.endswith("images") else 0
    images = jax.ShapeDtypeStruct((rows, number, 16, 16, 3), jnp.float32) if number else None
    model = build.abstract(config)

    def loss(model, images, frozen):
        if frozen:
            model.vision = jax.tree.map(jax.lax.stop_gradient, model.vision)
        hidden = model.hidden(encoder, decoder, images, compute=COMPUTE)
        zeros = jnp.zeros((rows, t), jnp.int32)
        # by blocks of the vocabulary, the backward pass computes the logits again, which is not counted
        head_config = LossConfig(tile_tokens=rows * t, strategy="tokens")
        return cross_entropy(hidden, model.head(), zeros, zeros.astype(jnp.float32), head_config).total

    def counted(function, frozen=False):
        return products(jax.make_jaxpr(partial(function, frozen=frozen))(model, images).jaxpr)

    dense = Counts(
        *(rows * s, rows * t, rows * s * s, rows * s * s, rows * t * t, rows * t * t, rows * t * s),
        images=rows * number,
    )
    assert counted(loss) == sum(flops.forward(config, dense).values())
    assert counted(jax.grad(loss)) == sum(flops.training(config, dense, frozen_vision=False).values())
    if number:
        frozen = sum(flops.training(config, dense, frozen_vision=True).values())
        assert counted(jax.grad(loss), frozen=True) == frozen


def test_flops_of_a_dual_encoder_are_those_of_its_programs_matrix_products():
    config, images, texts = tiny.SIGLIP, 3, 2
    model, counts = build.abstract(config), Counts(images=images, texts=texts)
    pixels = jax.ShapeDtypeStruct((images, 16, 16, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((texts, config.text.length), jnp.int32)

    def score(model, pixels, tokens):
        image_BD, text_BD = model.embed_images(pixels, compute=COMPUTE), model.embed_texts(tokens, compute=COMPUTE)
        return jnp.sum(model.logits(text_BD, image_BD))

    def counted(function):
        return products(jax.make_jaxpr(function)(model, pixels, tokens).jaxpr)

    query = images * 2 * config.vision.width**2  # of the pooling head, which is the same for all images
    assert counted(score) == sum(flops.forward(config, counts).values()) + query
    training = flops.training(config, counts, frozen_vision=False)
    assert counted(jax.grad(score)) == sum(training.values()) + 3 * query


def test_of_batch_is_three_times_forward():
    batch = Batch(ENCODER, DECODER, None, None, None, None)
    forward = flops.forward(tiny.T5GEMMA2, flops.count_rows(tiny.T5GEMMA2, ENCODER, DECODER))
    assert flops.of_batch(tiny.T5GEMMA2, batch) == 3 * sum(forward.values())


def test_a_frozen_tower_runs_forward_only():
    counts = count_lengths(tiny.T5GEMMA2_IMAGES, encoder=9, decoder=4, images=2)
    forward = flops.forward(tiny.T5GEMMA2_IMAGES, counts)
    times = {
        frozen: {part: flop / forward[part] for part, flop in training.items()}
        for frozen in (True, False)
        for training in [flops.training(tiny.T5GEMMA2_IMAGES, counts, frozen_vision=frozen)]
    }
    vision = {"vision/patches", "vision/projections", "vision/mlp", "vision/attention"}
    assert times[True] == dict.fromkeys(forward, 3) | dict.fromkeys(vision, 1)
    assert times[False] == dict.fromkeys(forward, 3) | {"vision/patches": 2}  # pixels have no gradient


def test_parts_by_hand():
    """Two layers, one local (2 keys at most): 3 encoder and 2 decoder tokens."""
    stack = replace(tiny.GEMMA3, layers=2, window=2)
    config = replace(tiny.T5GEMMA2, encoder=stack, decoder=stack)
    parts = flops.forward(config, count_lengths(config, encoder=3, decoder=2))
    d, q, k, f, v = 32, 4 * 8, 2 * 8, 48, 97
    assert parts == {
        "encoder/projections": 2 * (4 * d * q + 4 * d * k) * 3,
        "encoder/mlp": 2 * 6 * d * f * 3,
        "encoder/attention": 4 * q * ((2 + 2 + 1) + 9),  # a window of 2: the token itself and the next one
        "decoder/projections": 2 * (4 * d * q + 4 * d * k) * 2,
        "decoder/mlp": 2 * 6 * d * f * 2,
        "decoder/attention": 4 * q * ((1 + 2) + (1 + 2)),
        "cross/memory": 2 * 4 * d * k * 3,
        "cross/attention": 2 * 4 * q * 6,
        "head": 2 * d * v * 2,
    }


@pytest.mark.parametrize(("cross_layers", "layers"), [("all", 2), ("global", 1)])
def test_parts_of_separate_cross_attention_by_hand(cross_layers, layers):
    """3 encoder tokens of width 24, 2 decoder tokens of width 32; each query head has its keys."""
    encoder = replace(tiny.GEMMA2, layers=2, width=24)
    decoder = replace(tiny.GEMMA2, layers=2, kv_heads=4)
    config = replace(tiny.T5GEMMA, encoder=encoder, decoder=decoder, cross_layers=cross_layers)
    parts = flops.forward(config, count_lengths(config, encoder=3, decoder=2))
    assert {name: flop for name, flop in parts.items() if name.startswith("cross/")} == {
        "cross/memory": layers * 4 * 24 * 32 * 3,
        "cross/projections": layers * 4 * 32 * 32 * 2,
        "cross/attention": layers * 4 * 32 * 6,
    }


def test_parts_of_an_image_by_hand():
    """16 patches of 4 x 4 pixels, averaged to 4 tokens: 2 layers of width 16 before a model of width 32."""
    parts = flops.forward(tiny.GEMMA3_IMAGES, count_lengths(tiny.GEMMA3_IMAGES, decoder=4, images=1))
    assert {name: flop for name, flop in parts.items() if name.startswith(("vision", "projector"))} == {
        "vision/patches": 2 * (4 * 4 * 3) * 16 * 16,
        "vision/projections": 2 * 4 * 2 * 16 * 16 * 16,
        "vision/mlp": 2 * 2 * 2 * 16 * 24 * 16,
        "vision/attention": 2 * 2 * 2 * 16 * 16 * 16,
        "projector": 2 * 16 * 32 * 4,
    }
    assert parts["decoder/attention"] == 4 * 32 * 3 * 16  # a block: all pairs, in all 3 layers


def test_a_dual_encoder_has_no_tokens_to_count():
    with pytest.raises(TypeError, match="give Counts"):
        flops.count_rows(tiny.SIGLIP, None, DECODER)
