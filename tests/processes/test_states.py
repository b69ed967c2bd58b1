"""Two processes go on from what one saved, save a state together, agree on what is damaged; one goes on from there."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from t5g2.checkpoint.folder import load_model, save_model
from t5g2.checkpoint.train_states import Checkpoints
from t5g2.core import distributed, tree
from t5g2.core import sharding as meshes
from t5g2.core.sharding import MeshShape
from t5g2.models import build
from tests import tiny, weights
from tests.processes import start

TABLE = "2/params/embedder.table/c"


def on_a_mesh(**sizes: int):
    """(the tiny model, cut over all devices of all processes; its moments; the abstract twin of each)."""
    mesh = meshes.make(MeshShape(**sizes))
    abstract, arrays = build.abstract(tiny.GEMMA3), weights.weights(tiny.GEMMA3)
    places = meshes.shardings(abstract, mesh)
    model = tree.build(abstract, arrays.__getitem__, shardings=places)
    moments = {
        name: tree.build(abstract, lambda leaf, scale=scale: scale * arrays[leaf], shardings=places)
        for name, scale in (("mu", np.float32(-2)), ("nu", np.float32(4)))
    }
    return model, moments, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), model)


def same_parts(left, right) -> bool:
    """True if every device of this process holds the same of both trees."""
    return all(
        np.array_equal(a.data, b.data)
        for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True)
    )


def one_of_two(path: str) -> None:
    """Runs one of the two processes of the test below."""
    from jax.experimental import multihost_utils

    distributed.initialize("on")
    folder = Path(path)
    # not to standard output, where Gloo writes too, in chunks of lines
    output = (folder / f"output-{jax.process_index()}.txt").open("w")
    model, moments, abstract = on_a_mesh(data=1, fsdp=2, tensor=-1)
    abstract_moments = dict.fromkeys(moments, abstract)
    with Checkpoints(folder / "of_one", read_only=True) as checkpoints:
        restored = checkpoints.restore(abstract, abstract_moments)
        print(restored.data, same_parts((restored.params, restored.opt), (model, moments)), file=output)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, model, moments, data={"0": [step]}, meta={})
        print(checkpoints.restore(abstract, abstract_moments).step, file=output)
        save_model(folder / "model", model)
        if jax.process_index() == 0:  # one chunk, which only one of the processes reads
            chunk = max((folder / "checkpoints" / TABLE).rglob("*"), key=lambda path: (path.is_file(), str(path)))
            os.truncate(chunk, 10)
        multihost_utils.sync_global_devices("damaged")
        restored = checkpoints.restore(abstract, abstract_moments)
        same = same_parts((restored.params, restored.opt), (model, moments))
        print(restored.step, restored.data, same, file=output, flush=True)


@pytest.mark.long
def test_two_processes(tmp_path):
    """They go on from a state that one saved on another mesh, and one from theirs: weights, moments, positions."""
    model, moments, abstract = on_a_mesh(data=1, fsdp=8)
    with Checkpoints(tmp_path / "of_one") as checkpoints:
        checkpoints.save(7, model, moments, data={"0": [3]}, meta={})
    written = start.run(start.calling("tests.processes.test_states:one_of_two", tmp_path), 2, devices=2)
    for process, err in enumerate(written):
        output = (tmp_path / f"output-{process}.txt").read_text().splitlines()
        assert output == ["{'0': [3]} True", "2", "1 {'0': [1]} True"], err
        assert "params.embedder.table: " in err
    assert sum("unreadable in another process" in err for err in written) == 1
    assert sum("moved to 2.damaged" in err for err in written) == 1

    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        alone = checkpoints.restore(abstract, dict.fromkeys(moments, abstract))
    assert same_parts((alone.params, alone.opt), (model, moments))
    assert alone.data == {"0": [1]}
    expected = tree.named(model)
    for name, value in tree.named(load_model(tmp_path / "model")).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(expected[name]), err_msg=name)
