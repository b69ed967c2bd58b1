"""Our models against transformers' own, side by side.

Runs wherever torch and transformers are installed. In CI on Python 3.11, where they are pinned, their absence fails.
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.core import tree
from t5g2.models.attention import Compute
from tests import weights
from tests.parity import cases

if not (os.environ.get("CI") and sys.version_info[:2] == (3, 11)):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")

from tests.parity import reference

TOLERANCE = 1e-5
ALL = {f"gemma: {n}": c for n, c in cases.GEMMA.items()} | {f"t5gemma: {n}": c for n, c in cases.T5GEMMA.items()}


def ours(model, case):
    encoder, decoder = case.streams
    return model.logits(model.hidden(encoder, decoder, compute=Compute(dtype="float32")))


@pytest.mark.parametrize("name", ALL)
def test_logits(name):
    case = ALL[name]
    expected = reference.run(reference.make(case.config), case).detach().numpy()
    got = np.asarray(jax.jit(lambda model: ours(model, case))(weights.model(case.config)))
    valid = case.streams[1].segments == 1
    assert np.std(expected[valid]) > 0.3  # a model that says nothing would agree with anything
    np.testing.assert_allclose(got[valid], expected[valid], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", cases.GRADIENTS)
def test_gradients(name):
    case = cases.GRADIENTS[name]
    decoder = case.streams[1]
    loss_weights = np.random.RandomState(2).standard_normal((*decoder.tokens.shape, case.vocab_size)).astype(np.float32)
    loss_weights *= (decoder.segments == 1)[:, :, None] / loss_weights.size**0.5
    expected = reference.gradients(reference.make(case.config), case, loss_weights)
    gradient = jax.jit(jax.grad(lambda model: jnp.sum(ours(model, case) * loss_weights)))(weights.model(case.config))
    got = {key: reference.to_theirs(key, np.asarray(leaf.read())) for key, leaf in tree.leaves(gradient).items()}
    assert got.keys() == expected.keys()
    for key in got:
        largest = np.abs(expected[key]).max()
        assert largest > 1e-2, f"{tree.name(key)} has no gradient to compare"
        np.testing.assert_allclose(
            got[key], expected[key], atol=2 * TOLERANCE * max(1, largest), rtol=0, err_msg=str(key)
        )
