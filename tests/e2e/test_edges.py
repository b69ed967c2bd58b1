"""Ends of a run that are not its usual ones: weights that overflow, steps that go back, a run that goes on; signals."""

import hashlib
import json
import os
import re
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from t5g2 import cli
from t5g2.checkpoint.train_states import Checkpoints
from t5g2.eval.evaluation import Evaluator
from t5g2.train.schedules import Cosine
from tests.e2e.conftest import CONFIG

SMALL = ["--config.train.steps=4", "--config.save.every_steps=1", "--config.optim.schedule.warmup_steps=0"]


def train(corpus, workdir, *changes: str) -> list[str]:
    config = f"--config={CONFIG}:source@{corpus}"
    return ["train", config, f"--workdir={workdir}", "--config.eval.every_steps=0", *SMALL, *changes]


def heldout(corpus) -> str:
    text = {"kind": "text", "path": f"{corpus}/heldout"}
    task = {"kind": "heldout_loss", "text": text, "objective": {"kind": "causal"}, "examples": 4}
    return f"--config.eval.tasks={[task]}"


@pytest.mark.long
def test_weights_that_are_not_finite_are_never_saved(corpus, one_device, tmp_path, capsys, monkeypatch):
    # no setting within its range does this in one step, so the schedule is replaced
    monkeypatch.setattr(Cosine, "make", lambda self, steps: lambda step: jnp.where(step == 1, 1e38, 1e-3))
    run = tmp_path / "run"
    assert cli.main(train(corpus, run)) == 2
    message = capsys.readouterr().err
    assert re.search(r"step 2 is not finite: loss 5\S+ norm of the gradient \d\S+ of the updated weights inf", message)
    assert "(in embedder.table, final_norm.scale, layers.attention.k.0 and " in message
    assert f"its batch is in {run}/nonfinite/2.npz" in message
    assert [path.name for path in (run / "checkpoints").glob("[0-9]*")] == ["1"]
    batch = np.load(run / "nonfinite" / "2.npz")
    assert batch["decoder.tokens"].shape == batch["targets"].shape
    assert (batch["example_ids"] >= 0).any()

    # left out, and counted in the state, so that the run ends at the next one wherever it was stopped
    skip = "--config.train.max_nonfinite_updates=1"
    assert cli.main(train(corpus, run, skip, "--allow_change=train.max_nonfinite_updates")) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("train/skipped_updates") for line in lines if "train/loss" in line][-1] == 1
    monkeypatch.setattr(Cosine, "make", lambda self, steps: lambda step: jnp.where(step == 4, 1e38, 1e-3))
    assert cli.main(train(corpus, run, skip, "--config.train.steps=6")) == 2
    assert "it is number 2, and train.max_nonfinite_updates = 1" in capsys.readouterr().err


@pytest.mark.long
def test_a_run_goes_on_and_never_back(corpus, one_device, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(train(corpus, run)) == 0
    done = json.loads((run / "done.json").read_text())
    assert done["step"] == 4
    [weights] = (run / "model").glob("*.safetensors")
    assert done["files"][f"model/{weights.name}"] == {
        "bytes": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    capsys.readouterr()
    assert cli.main(train(corpus, run, "--config.train.steps=3")) == 2
    assert "holds step 4 and train.steps is 3; raise it to at least that" in capsys.readouterr().err
    assert json.loads((run / "experiment.json").read_text())["train"]["steps"] == 4
    # a run that was killed while it left its model folder is not done
    shutil.rmtree(run / "model")
    (run / "done.json").write_text('{"step": 2}')
    assert cli.main(train(corpus, run)) == 0
    assert (run / "model" / "model.json").exists()
    assert cli.main(train(corpus, run, "--config.train.steps=6")) == 0
    assert json.loads((run / "done.json").read_text())["step"] == 6


@pytest.mark.long
def test_a_run_that_cannot_begin_leaves_no_workdir(corpus, one_device, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(train(corpus, run, "--config.init.params=/nowhere/at/all")) == 2
    assert "/nowhere/at/all" in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.long
def test_a_signal_ends_an_evaluation_and_saves_its_step(corpus, one_device, tmp_path, monkeypatch):
    run, evaluations = tmp_path / "run", []
    whole = Evaluator.run

    def run_with_a_signal(self, model, names=None):
        evaluations.append(names)
        if len(evaluations) == 3:  # at step 2, after names and result of step 0
            os.kill(os.getpid(), signal.SIGTERM)
        result = whole(self, model, names)
        evaluations.append(result)
        return result

    monkeypatch.setattr(Evaluator, "run", run_with_a_signal)
    arguments = [*train(corpus, run, "--config.eval.every_steps=2", heldout(corpus)), "--config.save.every_steps=0"]
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 143
    assert [type(x).__name__ for x in evaluations] == ["list", "TaskResult", "list"]  # the second has no result
    assert [path.name for path in (run / "checkpoints").glob("[0-9]*")] == ["2"]

    assert cli.main(arguments) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if any(key.startswith("eval/") for key in line)] == [0, 2, 4]


@pytest.mark.long
def test_a_save_begins_before_the_evaluation_of_its_step(corpus, one_device, tmp_path, monkeypatch):
    order = []
    whole, save = Evaluator.run, Checkpoints.save
    monkeypatch.setattr(Evaluator, "run", lambda *args: order.append("evaluate") or whole(*args))
    monkeypatch.setattr(Checkpoints, "save", lambda *args, **kw: order.append("save") or save(*args, **kw))
    arguments = train(
        corpus, tmp_path / "run", "--config.eval.every_steps=1", "--config.train.steps=2", heldout(corpus)
    )
    assert cli.main(arguments) == 0
    assert order == ["evaluate", "save", "evaluate", "save", "evaluate"]
