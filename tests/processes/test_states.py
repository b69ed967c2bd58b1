"""Two processes save one state together, agree on what is damaged, and a single one goes on from there."""

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


def on_a_mesh():
    """(the tiny model, cut over all devices of all processes; its abstract twin)."""
    mesh = meshes.make(MeshShape(data=1, fsdp=2, tensor=-1))
    abstract = build.abstract(tiny.GEMMA3)
    places = meshes.shardings(abstract, mesh)
    model = tree.build(abstract, weights.weights(tiny.GEMMA3).__getitem__, shardings=places)
    return model, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), model)


def one_of_two(path: str) -> None:
    """Runs one of the two processes of the test below."""
    from jax.experimental import multihost_utils

    distributed.initialize("on")
    folder = Path(path)
    # not to standard output, where Gloo writes too, in chunks of lines
    output = (folder / f"output-{jax.process_index()}.txt").open("w")
    model, abstract = on_a_mesh()
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, model, {"moment": model}, data={"0": [step]}, meta={})
        print(checkpoints.restore(abstract, {"moment": abstract}).step, file=output)
        save_model(folder / "model", model)
        if jax.process_index() == 0:  # one chunk, which only one of the processes reads
            chunk = max((folder / "checkpoints" / TABLE).rglob("*"), key=lambda path: (path.is_file(), str(path)))
            os.truncate(chunk, 10)
        multihost_utils.sync_global_devices("damaged")
        restored = checkpoints.restore(abstract, {"moment": abstract})
        same = [
            np.array_equal(a.addressable_data(0), b.addressable_data(0))
            for a, b in zip(jax.tree.leaves(restored.params), jax.tree.leaves(model), strict=True)
        ]
        print(restored.step, restored.data, all(same), file=output, flush=True)


@pytest.mark.long
def test_two_processes(tmp_path):
    written = start.run(start.calling("tests.processes.test_states:one_of_two", tmp_path), 2, devices=2)
    for process, err in enumerate(written):
        output = (tmp_path / f"output-{process}.txt").read_text().splitlines()
        assert output == ["2", "1 {'0': [1]} True"], err
        assert "params.embedder.table: " in err
    assert sum("unreadable in another process" in err for err in written) == 1
    assert sum("moved to 2.damaged" in err for err in written) == 1

    expected = weights.model(tiny.GEMMA3)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        alone = checkpoints.restore(build.abstract(tiny.GEMMA3)).params
    for model in (alone, load_model(tmp_path / "model")):
        for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
