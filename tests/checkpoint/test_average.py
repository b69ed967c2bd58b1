"""The mean of checkpoints is the one that NumPy computes, bit for bit, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.checkpoint import average
from t5g2.checkpoint.state import Checkpoints
from t5g2.core import mesh as meshes
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.models import build
from tests import tiny


def make(seed, dtype):
    return build.make(tiny.GEMMA3, key=jax.random.key(seed), param_dtype=dtype)


def described(model, mesh):
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), model, meshes.shardings(model, mesh)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_is_the_mean(tmp_path, dtype, devices):
    mesh = meshes.make(meshes.MeshShape(data=2, fsdp=2, tensor=2))
    with Checkpoints(tmp_path / "c", keep=10) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, make(step, dtype), {}, data={}, meta={})
        checkpoints.wait()
        steps = average.last(checkpoints, 3)
        assert steps == [3, 4, 5]
        abstract = described(make(0, dtype), mesh)
        averaged = average.mean(checkpoints, steps, abstract)
    assert [x.sharding for x in jax.tree.leaves(averaged)] == [x.sharding for x in jax.tree.leaves(abstract)]
    members = [tree.named(make(step, dtype)) for step in steps]
    for name, leaf in tree.named(averaged).items():
        total = np.zeros(leaf.shape, np.float32)
        for member in members:
            total = total + np.asarray(member[name]).astype(np.float32)
        expected = (total / np.float32(3)).astype(leaf.dtype)
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(np.asarray(leaf), expected)


def test_errors(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make(step, jnp.float32), {}, data={}, meta={})
        checkpoints.wait()
        with pytest.raises(
            UserError, match=r"cannot average 3 checkpoints of .*: there are 2 \(1, 2\)\. Average 1 up to"
        ):
            average.last(checkpoints, 3)
        with pytest.raises(UserError, match="average 0 checkpoints"):
            average.last(checkpoints, 0)
        wider = build.abstract(dataclasses.replace(tiny.GEMMA3, mlp_width=40))
        with pytest.raises(
            UserError, match=r"(?s)holds another model.*changed  params.layers.mlp.down.0: float32\[1, 48, 32\]"
        ):
            average.mean(checkpoints, [1, 2], wider)
        with pytest.raises(UserError, match=r"step 9 is not in .*; there are: 1, 2"):
            average.mean(checkpoints, [1, 9], make(0, jnp.float32))
        file = next(p for p in (tmp_path / "c" / "2" / "params" / "embedder.table" / "c").rglob("*") if p.is_file())
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
        with pytest.raises(UserError, match=r"(?s)2 is damaged:\n  params.embedder.table: the contents have changed"):
            average.mean(checkpoints, [1, 2], make(0, jnp.float32))
        assert checkpoints.steps() == [1, 2]
