"""The decoder-only baseline from text to gradient: what packed prefixes make a model see, and learn."""

import dataclasses
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.core.batch import HostBatch
from t5g2.data.pipeline import finite_batches
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.models.loss_config import LossConfig
from t5g2.train import step
from tests import tiny, weights
from tests.data import corpus

CONFIG = dataclasses.replace(tiny.GEMMA3, vocab_size=Bytes().vocab_size)


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """Six prefixes and six texts from left to right, packed or each in a row of its own."""

    def batches(packing) -> list[HostBatch]:
        folder = tmp_path_factory.mktemp("text")
        config = corpus.decoder_only(
            folder, rows=4, streams=4, chunk_tokens=20, decoder_length=48, packing=packing, packing_rows=4
        )
        return list(finite_batches(config, seed=0, examples=6))

    return batches


def influence(decoder, row: int) -> np.ndarray:
    """bool[T, T]: which input tokens of a row have any influence on the state of each."""
    length = decoder.tokens.shape[1]
    # every token is another one, so that the rows of the embedding tell places apart
    line = jax.tree.map(lambda x: x[row : row + 1], decoder)._replace(tokens=np.arange(length, dtype=np.int32)[None])

    @jax.jit
    def gradient(model, place):
        def state(model):
            y_TD = model.hidden(None, line, compute=tiny.FLOAT32)[0]
            return jnp.sum(y_TD * jax.random.normal(jax.random.key(0), y_TD.shape), axis=-1)[place]

        return jax.grad(state)(model).embedder.table[:length]

    # place by place, because XLA's CPU backend of jax 0.10.2 gets jax.jacrev of this wrong once it is compiled (it is
    # right with XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= and in jax 0.12)
    model = weights.model(CONFIG)
    return np.stack([np.abs(np.asarray(gradient(model, place))).max(-1) > 0 for place in range(length)])


def test_a_prefix_sees_all_of_itself_and_no_target_that_counts_sees_its_answer(batches):
    batch = batches("first_fit")[0].batch
    segments, blocks = batch.decoder.segments, batch.decoder.blocks
    row = max(range(4), key=lambda r: len(np.unique(segments[r][blocks[r] > 0])))
    segment, block, counts = segments[row], blocks[row], batch.weights[row] > 0
    assert len(np.unique(segment[block > 0])) >= 2
    got, same = influence(batch.decoder, row), segment[:, None] == segment[None, :]
    past, prefix = np.tril(np.ones_like(same)), (block[:, None] > 0) & (block[None, :] > 0)
    used = segment > 0
    np.testing.assert_array_equal(got[used], (same & (past | prefix))[used])
    # the state that a target is predicted from knows the inputs up to its own place, and the target is the next one
    assert not np.any(got[counts] & ~past[counts])
    assert np.any(got[block > 0] & ~past[block > 0])


@pytest.mark.parametrize("microbatches", [1, 2])
def test_packed_prefixes_teach_what_each_would_alone(batches, microbatches):
    """Loss, weight and gradients, summed over all examples."""
    model = weights.model(CONFIG)
    gradients = jax.jit(step.gradients_of, static_argnums=2)

    def summed(packing, settings):
        made = [gradients(model, host.batch, settings) for host in batches(packing)]
        total = made[0]
        for more in made[1:]:
            total = jax.tree.map(add, total, more)
        return total, len(made)

    settings = step.StepOptions(tiny.FLOAT32, denoisers=2, sources=2, loss=LossConfig(tile_tokens=32))
    (alone, sums, want), many = summed("none", settings)
    (packed, packed_sums, got), few = summed("first_fit", dataclasses.replace(settings, microbatches=microbatches))
    assert few < many
    assert float(packed) == pytest.approx(float(alone), rel=1e-5)
    np.testing.assert_array_equal(packed_sums.denoiser_weight, sums.denoiser_weight)
    assert np.all(sums.denoiser_weight > 0)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * np.abs(w).max() + 1e-7), got, want)
