"""The mean of checkpoints is the one that NumPy computes, bit for bit, on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.checkpoint import averaging
from t5g2.checkpoint.train_states import Checkpoints, ocp
from t5g2.core import sharding as meshes
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.models import build
from tests import tiny

# two layers of a kind in a stack, and so a third of the leaves
STACK = dataclasses.replace(tiny.GEMMA3, layers=2, pattern=("local",))


@functools.cache
def make(seed, dtype, config=STACK):
    """A model of its own for each seed, drawn by NumPy, so that nothing is compiled."""
    draw = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(build.abstract(config, dtype))
    arrays = [jax.device_put(draw.standard_normal(x.shape).astype(x.dtype)) for x in leaves]
    return jax.tree.unflatten(structure, arrays)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_is_the_mean(tmp_path, dtype):
    """Bit for bit the one that NumPy computes, of five checkpoints and of the last three."""
    with Checkpoints(tmp_path / "c", keep=10) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, make(step, dtype), {}, data={}, meta={})
        checkpoints.wait()
        for count in (5, 3, 1):
            steps = averaging.newest_steps(checkpoints, count)
            assert steps == list(range(6 - count, 6))
            averaged = averaging.mean_leaves(checkpoints, steps, build.abstract(STACK, dtype))
            members = [tree.leaves(make(step, dtype)) for step in steps]
            assert averaged.keys() == members[0].keys()
            for key, leaf in averaged.items():
                total = np.zeros(leaf.shape, np.float32)
                for member in members:
                    total = total + np.asarray(member[key].read()).astype(np.float32)
                expected = (total / np.float32(count)).astype(dtype)
                assert leaf.read().dtype == leaf.dtype == dtype
                np.testing.assert_array_equal(leaf.read(), expected)


def test_what_was_saved_on_a_mesh_is_read_on_one_device(tmp_path, devices):
    mesh = meshes.make(meshes.MeshShape(data=2, fsdp=2, tensor=2))
    models = [make(step, jnp.float32) for step in (1, 2)]
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step, model in enumerate(models):
            checkpoints.save(step, jax.device_put(model, meshes.shardings(model, mesh)), {}, data={}, meta={})
        checkpoints.wait()
        averaged = averaging.mean_leaves(checkpoints, [0, 1], build.abstract(STACK))
        tables = [np.asarray(model.embedder.table[...]) for model in models]
        np.testing.assert_array_equal(averaged["embedder.table", None].read(), (tables[0] + tables[1]) / np.float32(2))


def test_one_stored_leaf_of_each_step_is_read_at_a_time(tmp_path, monkeypatch):
    """In the order given, each stack of layers once; nothing is read before it is asked for."""
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make(step, jnp.float32, tiny.GEMMA3), {}, data={}, meta={})
        checkpoints.wait()
        reads = []
        load = Checkpoints._load

        def noted(self, step, wanted):
            params = wanted.get("params", {})
            reads.extend((step, name) for name, of in params.items() if of is not ocp.PLACEHOLDER)
            return load(self, step, wanted)

        monkeypatch.setattr(Checkpoints, "_load", noted)
        averaged = averaging.mean_leaves(checkpoints, [1, 2], build.abstract(tiny.GEMMA3))
        assert reads == []
        for leaf in averaged.values():
            leaf.read()
        stored = list(tree.named(make(1, jnp.float32, tiny.GEMMA3)))
        assert sorted(reads) == sorted((step, name) for step in (1, 2) for name in stored)


def test_no_checkpoint_at_all_is_an_error_of_its_own(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints, pytest.raises(UserError, match="/c holds no checkpoint; give"):
        averaging.newest_steps(checkpoints, 1)


def test_errors(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make(step, jnp.float32, tiny.GEMMA3), {}, data={}, meta={})
        checkpoints.wait()
        with pytest.raises(
            UserError, match=r"cannot average 3 checkpoints of .*, which holds those of steps 1, 2; average 1 to 2"
        ):
            averaging.newest_steps(checkpoints, 3)
        with pytest.raises(UserError, match="average 0 checkpoints"):
            averaging.newest_steps(checkpoints, 0)
        wider = build.abstract(dataclasses.replace(tiny.GEMMA3, mlp_width=40))
        with pytest.raises(
            UserError, match=r"(?s)holds another model.*changed  params.layers.mlp.down.0: float32\[1, 48, 32\]"
        ):
            averaging.mean_leaves(checkpoints, [1, 2], wider)
        with pytest.raises(UserError, match=r"step 9 is not in .*; there are: 1, 2"):
            averaging.mean_leaves(checkpoints, [1, 9], make(0, jnp.float32, tiny.GEMMA3))
        file = next(p for p in (tmp_path / "c" / "2" / "params" / "embedder.table" / "c").rglob("*") if p.is_file())
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
        with pytest.raises(UserError, match=r"(?s)2 is damaged:\n  params.embedder.table: the contents have changed"):
            averaging.mean_leaves(checkpoints, [1, 2], make(0, jnp.float32, tiny.GEMMA3))["embedder.table", None].read()
        assert checkpoints.steps() == [1, 2]
