"""Our models against transformers' own, side by side.

Runs wherever torch and transformers are installed. In CI on Python 3.11, where they are pinned, their absence fails.
"""

import functools
import os
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from t5g2.core import tree
from t5g2.models.loss import cross_entropy
from t5g2.models.loss_config import LossConfig
from tests import programs, weights
from tests.parity import cases
from tests.tiny import FLOAT32

if not (os.environ.get("CI") and sys.version_info[:2] == (3, 11)):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")

import torch

from tests.parity import reference

TOLERANCE = 1e-5


def ours(model, case, compute=FLOAT32) -> np.ndarray:
    """Cases that differ in padding alone are one program."""
    return np.asarray(programs.logits(model, *case.streams, case.images, compute=compute))


def theirs(model, case) -> np.ndarray:
    with torch.no_grad():
        return reference.run(model, case).float().numpy()


@pytest.fixture(scope="module")
def their_model(tmp_path_factory):
    """A function: transformers' model of a case, in float32, loaded once."""

    @functools.cache
    def of(name):
        return reference.make(weights.on_host(cases.ALL[name].config), tmp_path_factory.mktemp("model"))

    return of


@pytest.mark.parametrize("name", cases.ALL)
def test_logits(name, their_model):
    case = cases.ALL[name]
    expected = theirs(their_model(name), case)
    got = ours(weights.model(case.config), case)
    valid = case.streams[1].segments == 1
    assert np.std(expected[valid]) > 0.3  # a model that says nothing would agree with anything
    np.testing.assert_allclose(got[valid], expected[valid], atol=TOLERANCE, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_bfloat16_is_no_farther_from_float32_than_transformers_is(family, their_model):
    """On the same weights, which bfloat16 holds exactly, over all configs of a family: the mean and the largest."""
    compute = replace(FLOAT32, dtype="bfloat16", backend="reference")
    off: dict[str, list[np.ndarray]] = {"ours": [], "theirs": []}
    for name, case in cases.FAMILIES[family].items():
        model = weights.rounded(weights.model(case.config))
        half = reference.in_dtype(their_model(f"{family}: {name}"), torch.bfloat16)
        exact, rough = theirs(reference.in_dtype(half, torch.float32), case), theirs(half, case)
        got = ours(model, case, compute)
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
def test_gradients(name, their_model):
    case = cases.GRADIENTS[name]
    decoder = case.streams[1]
    model = weights.model(case.config)
    targets = np.random.RandomState(2).randint(0, 90, decoder.tokens.shape)
    counted = (decoder.segments == 1) & (np.arange(targets.shape[1]) > 2)
    theirs, expected = reference.gradients(their_model(name), case, np.where(counted, targets, -100))

    def loss(model):
        encoder, decoder = case.streams
        hidden = model.hidden(encoder, decoder, case.images, compute=FLOAT32)
        sums = cross_entropy(hidden, model.head(), targets, counted.astype(np.float32), LossConfig(tile_tokens=8))
        return sums.total / sums.weight

    mine, gradient = jax.jit(jax.value_and_grad(loss))(model)
    assert float(mine) == pytest.approx(theirs, rel=1e-6)
    got = {key: leaf.read() for key, leaf in tree.leaves(jax.device_get(gradient)).items()}
    assert got.keys() == expected.keys()
    for key in got:
        largest = np.abs(expected[key]).max()
        if key[0].endswith("attention.k.bias"):  # adds the same to all scores of a query, which softmax takes away
            assert max(largest, np.abs(got[key]).max()) < 1e-6
            continue
        assert largest > 1e-5, f"{tree.name(key)} has no gradient to compare"
        np.testing.assert_allclose(got[key], expected[key], atol=1e-4 * largest, rtol=0, err_msg=str(key))


def test_cases_are_awkward():
    """Everything that the families are meant to cover occurs in every one of them, where it can."""
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
        assert any(side.rope_global.factor != 1 for side in sides) or not sides[0].qk_norm, family
        assert any(side.final_softcap for side in sides) or "images" in family, family
        assert any(side.attention_softcap for side in sides) == (not sides[0].qk_norm), family
        if sides[0] is by_name["tiny"].sides[0]:  # an encoder-decoder
            pairs = [case.sides for case in by_name.values()]
            assert any(encoder.layers != decoder.layers for encoder, decoder in pairs), family
            assert any(encoder.window != decoder.window for encoder, decoder in pairs), family
            assert "right" in {case.decoder_padding for case in by_name.values()}, family
        if sides[0].images or sides[-1].images:
            config = by_name["tiny"].images_config
            encoder, decoder = by_name["tiny"].streams
            read = decoder if encoder is None else encoder
            assert np.sum(read.tokens[0] == config.begin) == np.sum(read.tokens[0] == config.end) == 2, family
        for case in by_name.values():
            assert all(side.window < stream.tokens.shape[1] for side, stream in zip(case.sides, case.streams) if side)


def test_the_window_that_t5gemma_was_trained_with_is_one_narrower_than_transformers_makes_it(tmp_path):
    case = cases.ALL["t5gemma: tiny"]
    narrow = replace(case.config, encoder=replace(case.config.encoder, window=case.config.encoder.window - 1))
    trained = replace(case.config, encoder_window="each_side")
    same, other = (
        ours(weights.model(case.config), case) for case in (replace(case, config=narrow), replace(case, config=trained))
    )
    np.testing.assert_array_equal(same, other)
    # the same mask of transformers, with a window that is one less
    expected = theirs(reference.make(weights.on_host(narrow), tmp_path), replace(case, config=narrow))
    valid = case.streams[1].segments == 1
    np.testing.assert_allclose(np.asarray(other)[valid], expected[valid], atol=TOLERANCE, rtol=0)
