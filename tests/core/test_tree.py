"""The view of a model by (path, layer): what it says, and that nothing is lost or moved on the way there and back."""

import dataclasses
import doctest
from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from t5g2.core import tree
from t5g2.models import build
from tests import tiny


def param(key, shape, axes):
    return nnx.Param(jax.random.normal(key, shape), out_sharding=axes, eager_sharding=False)


class Block(nnx.Module):
    def __init__(self, key):
        self.up = param(key, (4, 6), ("embed", "mlp"))
        self.scale = param(key, (4,), (None,))


class Stack(nnx.Module):
    """`layers` blocks in whole patterns of `pattern` and a tail, as the models store them."""

    def __init__(self, key, *, layers, pattern):
        repeats, rest = divmod(layers, pattern)
        keys = jax.random.split(key, layers)
        slots = range(pattern if repeats else 0)
        whole = keys[: repeats * pattern].reshape(repeats, pattern)
        self.slots = nnx.List([jax.vmap(Block)(whole[:, p]) for p in slots])
        self.tail = nnx.List([Block(k) for k in keys[layers - rest :]])


class Model(nnx.Module):
    def __init__(self, key, *, layers=5, pattern=2):
        self.table = param(key, (7, 4), ("vocab", "embed"))
        self.layers = Stack(key, layers=layers, pattern=pattern)


LAYOUTS = [(5, 2), (4, 2), (1, 2), (3, 1), (2, 3)]


def make(layers, pattern):
    return Model(jax.random.key(0), layers=layers, pattern=pattern)


def test_docstrings():
    assert doctest.testmod(tree).failed == 0


@pytest.mark.parametrize(("layers", "pattern"), LAYOUTS)
def test_every_layer_is_seen_in_its_place(layers, pattern):
    keys = jax.random.split(jax.random.key(0), layers)
    seen = tree.leaves(make(layers, pattern))
    expected = [("layers.scale", i) for i in range(layers)] + [("layers.up", i) for i in range(layers)]
    assert list(seen) == [*expected, ("table", None)]
    for i in range(layers):
        leaf = seen["layers.up", i]
        np.testing.assert_array_equal(leaf.read(), jax.random.normal(keys[i], (4, 6)))
        assert (leaf.shape, leaf.dtype, leaf.axes, leaf.key) == (
            (4, 6),
            jnp.float32,
            ("embed", "mlp"),
            ("layers.up", i),
        )


@pytest.mark.parametrize(("layers", "pattern"), LAYOUTS)
def test_there_and_back_is_bit_exact(layers, pattern):
    model = make(layers, pattern)
    abstract = jax.eval_shape(lambda: make(layers, pattern))
    view, abstract_view = tree.leaves(model), tree.leaves(abstract)
    fields = attrgetter("path", "layer", "shape", "dtype", "axes")
    assert list(map(fields, view.values())) == list(map(fields, abstract_view.values()))
    assert all(leaf.read().shape == leaf.shape for leaf in abstract_view.values())
    for skeleton in (abstract, model):
        for convert in (np.asarray, jnp.asarray):
            again = tree.build(skeleton, lambda key, convert=convert: convert(view[key].read()))
            assert jax.tree.structure(again) == jax.tree.structure(model)
            jax.tree.map(np.testing.assert_array_equal, again, model)
    jax.tree.map(np.testing.assert_array_equal, tree.refill(abstract, tree.named(model)), model)


def test_arrays_of_the_host_are_placed_without_a_program(caplog):
    """One for each shape would take longer than the reading."""
    model = make(14, 2)
    on_host = {key: np.asarray(leaf.read()) for key, leaf in tree.leaves(model).items()}
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        built = tree.build(model, on_host.__getitem__)
    assert not [message for message in caplog.messages if message.startswith("Compiling")]
    jax.tree.map(np.testing.assert_array_equal, built, model)


def test_build_places_and_checks(devices):
    model = make(5, 2)
    view = tree.leaves(model)
    place = jax.NamedSharding(jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)), jax.P())
    built = tree.build(model, lambda key: view[key].read(), shardings=jax.tree.map(lambda _: place, model))
    assert {leaf.sharding for leaf in jax.tree.leaves(built)} == {place}
    with pytest.raises(ValueError, match=r"layers.scale.0 is float16\[4\]; it must be float32\[4\]"):
        tree.build(model, lambda key: view[key].read().astype(jnp.float16))
    with pytest.raises(ValueError, match=r"layers.scale.0 is float32\[3\]; it must be float32\[4\]"):
        tree.build(model, lambda key: view[key].read() if key[0] != "layers.scale" else jnp.zeros(3))


@pytest.mark.parametrize("layers", [5, 4, 1])
@pytest.mark.parametrize("make_optimizer", [optax.adamw, lambda lr: optax.adafactor(lr, min_dim_size_to_factor=4)])
def test_names_of_a_state_are_unique_and_restore_it(layers, make_optimizer):
    state = make_optimizer(1e-3).init(make(layers, 2))
    state = jax.tree.map(lambda x: jnp.full_like(x, 3), state)
    names = tree.named(state)
    assert not [n for n in names if "value" in n or "slots" in n or "tail" in n]
    again = tree.refill(jax.eval_shape(lambda: state), names)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_names_of_stacks_say_their_layers():
    names = [f"layers.{leaf}.{layers}" for layers in ("0-2by2", "1-3by2", "4") for leaf in ("scale", "up")]
    assert list(tree.named(make(5, 2))) == [*names, "table"]
    assert list(tree.named(make(1, 2))) == ["layers.scale.0", "layers.up.0", "table"]
    assert "layers.up.0-2" in tree.named(make(3, 1))


def test_paths_serve_as_an_optax_mask():
    model = make(5, 2)
    by_path = tree.paths(model)
    assert jax.tree.structure(by_path) == jax.tree.structure(model)
    assert set(jax.tree.leaves(by_path)) == {"layers.up", "layers.scale", "table"}
    frozen = jax.tree.map(lambda path: tree.matches("*.scale", path), by_path)
    optimizer = optax.masked(optax.set_to_zero(), lambda _: frozen)
    state = optimizer.init(model)
    updates, state = optimizer.update(jax.tree.map(jnp.ones_like, model), state)
    assert all(
        np.all(np.asarray(leaf.read()) == (leaf.path != "layers.scale")) for leaf in tree.leaves(updates).values()
    )
    # what the mask leaves out holds no array, and is not named
    assert set(tree.named(optax.masked(optax.trace(0.9), lambda _: frozen).init(model))) == {
        "inner_state.trace.layers.scale.0-2by2",
        "inner_state.trace.layers.scale.1-3by2",
        "inner_state.trace.layers.scale.4",
    }


def test_dead_patterns_are_found():
    assert tree.unmatched(["layers.*", "layer.*"], ["layers.up", "table"]) == ["layer.*"]


def test_difference_of_equal_mappings_is_empty():
    assert tree.difference({"a": 1}, {"a": 1}) == ""


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("config", [tiny.GEMMA3, tiny.T5GEMMA2], ids=["gemma3", "t5gemma2"])
def test_the_models_follow_the_convention(config, layers):
    if config is tiny.GEMMA3:
        config = stack = dataclasses.replace(config, layers=layers)
    else:
        stack = dataclasses.replace(config.encoder, layers=layers)
        config = dataclasses.replace(config, encoder=stack, decoder=stack)
    abstract = build.abstract(config)
    view = tree.leaves(abstract)
    numbers = {}
    for path, layer in view:
        numbers.setdefault(path, []).append(layer)
    assert {path: found for path, found in numbers.items() if "layers" in path.split(".")} == {
        path: list(range(layers)) for path in numbers if "layers" in path.split(".")
    }
    values = {
        key: np.random.default_rng(i).random(leaf.shape, np.float32) for i, (key, leaf) in enumerate(view.items())
    }
    again = tree.leaves(tree.build(abstract, values.__getitem__))
    for key, leaf in again.items():
        np.testing.assert_array_equal(np.asarray(leaf.read()), values[key])
        assert len(leaf.axes) == len(leaf.shape)
