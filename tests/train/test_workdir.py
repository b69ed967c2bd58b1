import json
import os
import signal

import jax
import numpy as np
import pytest

from t5g2.core import files
from t5g2.core.errors import UserError
from t5g2.core.sharding import MeshShape, make
from t5g2.data.pipeline import Pipeline
from t5g2.train import config_file, loop, plan, preemption, restore
from t5g2.train import experiment as experiments
from t5g2.train import workdir as workdirs


@pytest.fixture
def tiny():
    return config_file.load("configs/quickstart.py:source")


@pytest.mark.parametrize(
    ("every", "expected"),
    [(0, [0, 10]), (4, [0, 4, 8, 10]), (5, [0, 5, 10])],
)
def test_due(every, expected):
    assert [s for s in range(11) if loop.due(s, every, first=True, last=s == 10)] == expected
    assert [s for s in range(11) if loop.due(s, every, last=s == 10)] == expected[1:]


def test_positions_of_all_streams():
    assert workdirs.gather_positions({1: (8, 6, 14), 0: (2**40, 0, 9)}, 2) == {
        0: (2**40, 0, 9),
        1: (8, 6, 14),
    }
    with pytest.raises(AssertionError, match="read by no process"):
        workdirs.gather_positions({1: (8, 6, 14)}, 2)


@pytest.mark.parametrize(
    ("arm", "objective"), [("source", "causal"), ("source", "prefix_lm_decoder"), ("scratch", "ul2")]
)
def test_the_planned_batch_is_what_the_pipeline_gives(arm, objective, devices):
    """The same arrays, blocks only where the objective makes some: the compiled step takes nothing else."""
    source = "[{'text': {'kind': 'python'}, 'objective': {'kind': '" + objective + "'}}]"
    experiment = config_file.load(f"configs/quickstart.py:{arm}", [("data.sources", source)])
    with Pipeline(experiment.data, seed=0) as pipeline:
        batch = pipeline.next().batch
    planned = plan.make(experiment, make(MeshShape(data=4, fsdp=2))).batch
    assert jax.tree.structure(planned) == jax.tree.structure(batch)
    for abstract, array in zip(*map(jax.tree.leaves, (planned, batch)), strict=True):
        assert (abstract.shape, abstract.dtype) == (array.shape, array.dtype)
    assert (planned.decoder.blocks is not None) == (objective == "prefix_lm_decoder")


def test_rows_that_cannot_be_dealt_out(tiny, devices):
    mesh = make(MeshShape(data=4, fsdp=2))
    assert plan.local_rows(tiny, mesh) == range(8)
    with pytest.raises(
        UserError, match=r"data\.rows = 12 cannot be split evenly .* on 8 groups .* must be a multiple of 8"
    ):
        plan.local_rows(
            config_file.load("configs/quickstart.py:source", [("data.rows", "12"), ("data.streams", "12")]), mesh
        )


def test_a_workdir_is_claimed_by_one_trainer_at_a_time(tiny, tmp_path):
    workdir = tmp_path / "run"
    with workdirs.claimed(workdir, tiny):
        workdirs.write_experiment(workdir, tiny, {"rows": []})
        assert json.loads((workdir / "experiment.json").read_text()) == experiments.dump(tiny)
        assert json.loads((workdir / "provenance.json").read_text()) == {"rows": []}
        with pytest.raises(UserError, match="another process trains in"), workdirs.claimed(workdir, tiny):
            pass
    with workdirs.claimed(workdir, tiny):
        pass


def test_a_run_that_fails_before_it_begins_leaves_nothing(tiny, tmp_path):
    def fail():
        with workdirs.claimed(tmp_path / "run", tiny):
            (tmp_path / "run" / "checkpoints").mkdir()
            raise UserError("no text")

    with pytest.raises(UserError, match="no text"):
        fail()
    assert not (tmp_path / "run").exists()


def test_a_workdir_without_a_checkpoint_is_free_and_one_with_is_not(tiny, tmp_path):
    other = config_file.load("configs/quickstart.py:source", [("train.seed", "1")])
    with workdirs.claimed(tmp_path, other):
        workdirs.write_experiment(tmp_path, other, None)
    with workdirs.claimed(tmp_path, tiny):
        pass
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(UserError, match=r"changed  train\.seed: 1 -> 0"), workdirs.claimed(tmp_path, tiny):
        pass
    assert json.loads((tmp_path / "experiment.json").read_text()) == experiments.dump(other)
    (tmp_path / "experiment.json").write_text("{")
    with pytest.raises(UserError, match=r"experiment\.json is not JSON"), workdirs.claimed(tmp_path, tiny):
        pass


def test_done_is_a_step_and_what_it_leaves(tiny, tmp_path):
    files.write_json(tmp_path / "done.json", {"step": 400})
    assert not workdirs.is_done(tmp_path, tiny, 400)
    (tmp_path / "model").mkdir()
    assert workdirs.is_done(tmp_path, tiny, 400)
    assert not workdirs.is_done(tmp_path, tiny, 300)
    files.write_json(tmp_path / "done.json", {"step": 300})
    assert not workdirs.is_done(tmp_path, tiny, 400)


def test_a_workdir_that_is_something_else(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; give a folder"), workdirs.claimed(tmp_path / "file", tiny):
        pass
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="is the workdir of a sweep"), workdirs.claimed(tmp_path, tiny):
        pass


def test_a_replay_writes_nothing(tiny, tmp_path):
    with workdirs.claimed(tmp_path / "run", tiny, replay=3):
        assert not (tmp_path / "run").exists()


def test_a_second_ctrl_c_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    with preemption.on_signals() as preempted:
        os.kill(os.getpid(), signal.SIGINT)
        assert preempted.agreed() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_first_weights_are_the_same_on_any_mesh(tiny, devices):
    found = []
    for shape in (MeshShape(data=1, fsdp=4, tensor=2), MeshShape(data=8)):
        mesh = make(shape)
        with jax.set_mesh(mesh):
            params, _ = restore.initial_params(plan.make(tiny, mesh))
            found.append([np.asarray(x) for x in jax.tree.leaves(params)])
    assert all((a == b).all() for a, b in zip(*found, strict=True))
