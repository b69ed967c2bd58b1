"""Our models against transformers' own, side by side.

Runs wherever torch and transformers are installed. In CI on Python 3.11, where they are pinned, their absence fails.
"""

import os
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.core import tree
from tests import weights
from tests.parity import cases
from tests.tiny import FLOAT32

if not (os.environ.get("CI") and sys.version_info[:2] == (3, 11)):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")

import torch

from tests.parity import reference

TOLERANCE = 1e-5


def ours(model, case, compute=FLOAT32):
    encoder, decoder = case.streams
    return model.logits(model.hidden(encoder, decoder, case.images, compute=compute))


def theirs(model, case) -> np.ndarray:
    with torch.no_grad():
        return reference.run(model, case).float().numpy()


@pytest.mark.parametrize("name", cases.ALL)
def test_logits(name, tmp_path):
    case = cases.ALL[name]
    model = weights.model(case.config)
    expected = theirs(reference.make(model, tmp_path), case)
    got = np.asarray(jax.jit(lambda model: ours(model, case))(model))
    valid = case.streams[1].segments == 1
    assert np.std(expected[valid]) > 0.3  # a model that says nothing would agree with anything
    np.testing.assert_allclose(got[valid], expected[valid], atol=TOLERANCE, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_bfloat16_is_no_farther_from_float32_than_transformers_is(family, tmp_path):
    """On the same weights, which bfloat16 holds exactly, over all configs of a family: the mean and the largest."""
    compute = replace(FLOAT32, dtype="bfloat16", backend="reference")
    off: dict[str, list[np.ndarray]] = {"ours": [], "theirs": []}
    for number, case in enumerate(cases.FAMILIES[family].values()):
        model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), weights.model(case.config))
        folder = tmp_path / str(number)
        folder.mkdir()
        exact = theirs(reference.make(model, folder), case)
        rough = theirs(reference.make(model, folder, torch.bfloat16), case)
        got = np.asarray(jax.jit(lambda model, case=case: ours(model, case, compute))(model))
        valid = case.streams[1].segments == 1
        off["ours"].append(np.abs(got - exact)[valid].ravel())
        off["theirs"].append(np.abs(rough - exact)[valid].ravel())
    mine, other = (np.concatenate(off[who]) for who in ("ours", "theirs"))
    print(
        f"{family}: mean {mine.mean():.5f} (transformers {other.mean():.5f}), max {mine.max():.4f} ({other.max():.4f})"
    )
    assert mine.mean() > 1e-4  # it was computed in bfloat16
    assert mine.mean() <= other.mean()
    assert mine.max() <= 1.25 * other.max()


@pytest.mark.parametrize("name", cases.GRADIENTS)
def test_gradients(name, tmp_path):
    case = cases.GRADIENTS[name]
    decoder = case.streams[1]
    model = weights.model(case.config)
    shape = (*decoder.tokens.shape, case.sides[1].vocab_size)
    loss_weights = np.random.RandomState(2).standard_normal(shape).astype(np.float32)
    loss_weights *= (decoder.segments == 1)[:, :, None] / loss_weights.size**0.5
    expected = reference.gradients(reference.make(model, tmp_path), case, loss_weights)
    gradient = jax.jit(jax.grad(lambda model: jnp.sum(ours(model, case) * loss_weights)))(model)
    got = {key: np.asarray(leaf.read()) for key, leaf in tree.leaves(gradient).items()}
    assert got.keys() == expected.keys()
    for key in got:
        largest = np.abs(expected[key]).max()
        if key[0].endswith("attention.k.bias"):  # adds the same to all scores of a query, which softmax takes away
            assert max(largest, np.abs(got[key]).max()) < 1e-6
            continue
        assert largest > 3e-4, f"{tree.name(key)} has no gradient to compare"
        np.testing.assert_allclose(got[key], expected[key], atol=1e-4 * largest, rtol=0, err_msg=str(key))


def test_cases_are_awkward():
    """What the families are meant to cover occurs in every one of them, where it can."""
    for family, by_name in cases.FAMILIES.items():
        assert len(by_name) >= 8, family
        sides = [side for case in by_name.values() for side in case.sides if side is not None]
        assert any(side.kv_heads == side.heads > 1 for side in sides), family
        assert any(side.kv_heads == 1 < side.heads for side in sides), family
        assert any(1 < side.kv_heads < side.heads for side in sides), family
        assert any(side.head_size != side.width // side.heads for side in sides), family
        assert {side.window % 2 for side in sides} == {0, 1}, family
        assert any(side.layers % len(side.pattern) for side in sides), family
        assert any(side.query_scalar not in (None, side.head_size) for side in sides), family
        paddings = {
            case.decoder_padding if case.sides[0] is None else case.encoder_padding for case in by_name.values()
        }
        assert {"left", "right"} <= paddings, family
        for case in by_name.values():
            assert all(side.window < stream.tokens.shape[1] for side, stream in zip(case.sides, case.streams) if side)


def test_the_window_that_t5gemma_was_trained_with_is_one_narrower_than_transformers_makes_it():
    case = cases.ALL["t5gemma: tiny"]
    narrow = replace(case.config, encoder=replace(case.config.encoder, window=case.config.encoder.window - 1))
    trained = replace(case.config, encoder_window="each_side")
    same, other = (
        jax.jit(lambda model, case=case: ours(model, case))(weights.model(case.config))
        for case in (replace(case, config=narrow), replace(case, config=trained))
    )
    np.testing.assert_array_equal(same, other)
