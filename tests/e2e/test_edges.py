"""Ends of a run that are not its usual ones: weights that overflow, steps that go back, a run that goes on."""

import json
import shutil

import pytest

from t5g2 import cli

from .conftest import CONFIG

SMALL = ["--config.train.steps=4", "--config.save.every_steps=1", "--config.optim.schedule.warmup_steps=0"]


def train(corpus, workdir, *changes: str) -> list[str]:
    config = f"--config={CONFIG}:source@{corpus}"
    return ["train", config, f"--workdir={workdir}", "--config.eval.every_steps=0", *SMALL, *changes]


@pytest.mark.long
def test_weights_that_are_not_finite_are_never_saved(corpus, one_device, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 1 is not finite: loss 5.* of the updated weights inf"):
        cli.main(train(corpus, tmp_path, "--config.optim.schedule.peak=1e38"))
    assert not list((tmp_path / "checkpoints").glob("[1-9]*"))


@pytest.mark.long
def test_a_run_goes_on_and_never_back(corpus, one_device, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(train(corpus, run)) == 0
    assert json.loads((run / "done.json").read_text()) == {"step": 4}
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
    assert json.loads((run / "done.json").read_text()) == {"step": 6}


@pytest.mark.long
def test_a_run_that_cannot_begin_leaves_no_workdir(corpus, one_device, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(train(corpus, run, "--config.init.params=/nowhere/at/all")) == 2
    assert "/nowhere/at/all" in capsys.readouterr().err
    assert not run.exists()
