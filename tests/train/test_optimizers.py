"""Muon and Lion beside optax's own, on the matrices of single layers; which weights are matrices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from t5g2.core import tree
from t5g2.models import build
from t5g2.models.sizes import size
from t5g2.train import optim
from t5g2.train.optim import Freeze, OptimConfig
from t5g2.train.optimizers import AdamW, Lion, Muon
from t5g2.train.schedules import Constant
from tests import tiny, weights

STEPS = 2


@functools.cache
def params():
    return weights.model(tiny.T5GEMMA2)


@functools.cache
def gradients(step):
    draw = np.random.default_rng(step)
    return jax.tree.map(lambda x: jax.device_put(draw.standard_normal(x.shape, np.float32)), params())


def by_name(model):
    return {tree.name(key): np.asarray(leaf.read()) for key, leaf in tree.leaves(model).items()}


def updated(optimizer, **settings):
    """The weights after some updates, by layer, and the optimizer's state."""
    config = OptimConfig(Constant(0.1, warmup_steps=0), optimizer, clip_norm=None, **settings)
    updater, after = optim.make(config, 10, params()), params()
    state = jax.jit(updater.init)(after)
    apply = jax.jit(updater.apply)
    for step in range(STEPS):
        after, state, _ = apply(after, gradients(step), state, jnp.int32(step))
    return by_name(after), state


def reference(transform, names=None, shape=lambda name, x: x.shape):
    """The weights, all or of these names, by a transformation of optax on each of each layer, as this shape has it."""
    before, every = by_name(params()), [by_name(gradients(step)) for step in range(STEPS)]
    after = {}

    @jax.jit  # a program for each shape
    def apply(gradient, state, value):
        step, state = transform.update(gradient, state, value)
        return optax.apply_updates(value, step), state

    for name in before if names is None else names:
        value = before[name]
        flat = value.reshape(shape(name, value))
        state = jax.jit(transform.init)(flat)
        for one in every:
            with jax.numpy_dtype_promotion("standard"):
                flat, state = apply(one[name].reshape(flat.shape), state, flat)
        after[name] = np.asarray(flat).reshape(value.shape)
    return after


def matrix_shape(name, x):
    """Inputs x outputs of a projection of a layer."""
    inputs = 2 if name.split(".")[-2] == "o" else 1
    return (int(np.prod(x.shape[:inputs])), -1)


def is_projection(name):
    return any(part in name.split(".") for part in ("q", "k", "v", "o", "gate", "up", "down"))


def test_lion_is_that_of_optax():
    ours, _ = updated(Lion(b1=0.8, b2=0.9))
    theirs = reference(optax.lion(0.1, b1=0.8, b2=0.9, weight_decay=0.0))
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
    _, state = updated(Lion(moment_dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("bfloat16"), jnp.dtype("int32")}


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_that_of_optax_on_each_matrix_of_each_layer(nesterov):
    ours, _ = updated(Muon(momentum=0.9, nesterov=nesterov, others=AdamW(b1=0.8)))
    muon = contrib.muon(0.1, beta=0.9, nesterov=nesterov, consistent_rms=0.2)
    projections = [name for name in ours if is_projection(name)]
    assert 0 < len(projections) < len(ours)
    others = [name for name in ours if name not in projections]
    expected = reference(muon, projections, matrix_shape)
    expected |= reference(optax.adam(0.1, b1=0.8, b2=0.95, eps=1e-8), others)
    for name, value in ours.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_direction_of_muon_is_nearly_orthogonal_and_as_large_as_that_of_adam():
    directions = Muon().directions()
    made, _ = jax.jit(lambda gradients, params: directions.update(gradients, directions.init(params), params))(
        gradients(0), params()
    )
    for name, value in by_name(made).items():
        if is_projection(name):
            matrix = value.reshape(matrix_shape(name, value))
            singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(max(matrix.shape)))
            # the smallest ones of a random matrix need more than five iterations
            assert 0.6 < np.median(singular) <= singular.max() < 1.3, (name, singular)
            assert 0.14 < np.sqrt(np.mean(np.square(value))) < 0.24, name


@pytest.mark.parametrize("name", ["t5gemma2:270m-270m", "t5gemma:2b-2b"])
def test_matrices_are_the_projections_of_layers(name):
    """And not tables, norms, biases, position embeddings, patches or the projector of images."""
    abstract = build.abstract(size(name))
    state = jax.eval_shape(Muon().directions().init, abstract)
    stored = tree.named(abstract)
    found = {name for name in stored if any(x.endswith(f"matrices.inner_state.0.mu.{name}") for x in tree.named(state))}
    assert found == {name for name in stored if is_projection(name) and ".bias" not in name}
    assert 0 < len(found) < len(stored)


def test_muon_trains_with_weights_that_are_frozen_for_a_while():
    """One transformation for each interval, each with matrices and others of its own."""
    after, _ = updated(Muon(), freeze=(Freeze("decoder.*", end=STEPS), Freeze("embedder.*")))
    before = by_name(params())
    still = {name for name, value in after.items() if (value == before[name]).all()}
    assert still == {name for name in before if name.startswith(("decoder.", "embedder."))}


def test_settings_are_checked():
    assert dataclasses.replace(Muon(), rms=0.3).rms == 0.3
    for settings, message in (
        ({"momentum": 1.0}, "momentum = 1.0; it must be"),
        ({"newton_schulz_steps": 0}, "newton_schulz_steps = 0; it must be"),
    ):
        with pytest.raises(ValueError, match=message):
            Muon(**settings)
