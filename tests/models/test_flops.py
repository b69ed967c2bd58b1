import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.core.batch import Batch, Stream
from t5g2.models import build, flops, masks
from t5g2.models.backends.reference import visible
from t5g2.models.flops import Counts
from t5g2.models.layers import Compute
from t5g2.models.loss import tiled_cross_entropy
from tests import tiny


def stream(segments, blocks=None):
    """Rows of segments, with positions that run through each of them."""
    segments = np.array(segments, np.int32)
    positions = np.zeros_like(segments)
    for t in range(1, segments.shape[1]):
        positions[:, t] = np.where(segments[:, t] == segments[:, t - 1], positions[:, t - 1] + 1, 0)
    blocks = None if blocks is None else np.array(blocks, np.int32)
    return Stream(np.zeros_like(segments), segments, positions, blocks)


ENCODER = stream([[1] * 9 + [2] * 4 + [0] * 2, [1] * 15])
DECODER = stream([[1] * 3 + [2] * 7 + [3] * 2, [1] * 11 + [0]])  # row 0 has an example with an empty encoder side
PREFIX = stream(
    [[1] * 8 + [2] * 4, [1] * 11 + [0]],
    blocks=[[0, 1, 1, 1, 2, 2, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]],
)


def pairs(query, keys, mask):
    return int(visible(query, keys, mask).sum())


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 100])
def test_pairs_are_those_that_the_masks_show(window):
    stack = dataclasses.replace(tiny.GEMMA3, window=window)
    config = dataclasses.replace(tiny.T5GEMMA2, encoder=stack, decoder=stack)
    assert flops.count(config, ENCODER, DECODER) == Counts(
        encoder_tokens=28,
        decoder_tokens=23,
        encoder_local=pairs(ENCODER, ENCODER, masks.encoder(stack, "local")),
        encoder_global=pairs(ENCODER, ENCODER, masks.encoder(stack, "global")),
        decoder_local=pairs(DECODER, DECODER, masks.decoder(stack, "local")),
        decoder_global=pairs(DECODER, DECODER, masks.decoder(stack, "global")),
        cross=pairs(DECODER, ENCODER, masks.ALL),
    )
    assert flops.count(stack, None, PREFIX) == Counts(
        decoder_tokens=23,
        decoder_local=pairs(PREFIX, PREFIX, masks.decoder(stack, "local")),
        decoder_global=pairs(PREFIX, PREFIX, masks.decoder(stack, "global")),
    )


def test_a_packed_row_counts_as_its_examples_alone():
    alone = [flops.of_lengths(tiny.T5GEMMA2, encoder=s, decoder=t) for s, t in ((9, 3), (4, 7), (0, 2), (15, 11))]
    packed = flops.count(tiny.T5GEMMA2, ENCODER, DECODER)
    assert packed == alone[0] + alone[1] + alone[2] + alone[3]
    assert packed * 3 == packed + packed + packed


def products(jaxpr):
    """FLOPs of all matrix products of a program, every round of its loops counted."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        rounds = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += rounds * products(inner)
    return total


@pytest.mark.parametrize("config", [tiny.GEMMA3, tiny.T5GEMMA2], ids=["decoder-only", "encoder-decoder"])
def test_flops_are_those_of_the_programs_matrix_products(config):
    """The reference backend computes hidden pairs too: with all pairs counted, both agree to the FLOP."""
    rows, s, t = 2, 6, 5
    encoder, decoder = (stream(np.ones((rows, n), np.int32)) for n in (s, t))
    if config is tiny.GEMMA3:
        encoder, s = None, 0
    model = build.abstract(config)

    def loss(model):
        hidden = model.hidden(encoder, decoder, compute=Compute(scan=False))
        zeros = jnp.zeros((rows, t), jnp.int32)
        return tiled_cross_entropy(hidden, model.head(), zeros, zeros.astype(jnp.float32), tile_tokens=rows * t).total

    dense = Counts(rows * s, rows * t, rows * s * s, rows * s * s, rows * t * t, rows * t * t, rows * t * s)
    forward = sum(flops.forward(config, dense).values())
    assert products(jax.make_jaxpr(loss)(model).jaxpr) == forward
    assert products(jax.make_jaxpr(jax.grad(loss))(model).jaxpr) == flops.TRAINING * forward


def test_of_batch_is_three_times_forward():
    batch = Batch(ENCODER, DECODER, None, None, None, None)
    forward = flops.forward(tiny.T5GEMMA2, flops.count(tiny.T5GEMMA2, ENCODER, DECODER))
    assert flops.of_batch(tiny.T5GEMMA2, batch) == 3 * sum(forward.values())


def test_parts_by_hand():
    """Two layers, one local (2 keys at most): 3 encoder and 2 decoder tokens."""
    stack = dataclasses.replace(tiny.GEMMA3, layers=2, window=2)
    config = dataclasses.replace(tiny.T5GEMMA2, encoder=stack, decoder=stack)
    parts = flops.forward(config, flops.of_lengths(config, encoder=3, decoder=2))
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
