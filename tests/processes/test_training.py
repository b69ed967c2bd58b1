"""A run of several processes is that of one with as many devices; when one process dies, the others end too."""

import json
import signal
import sys
import time

import jax
import numpy as np
import pytest

from t5g2 import cli
from t5g2.checkpoint import folder as folders
from t5g2.core import tree
from tests.e2e.conftest import CONFIG, write_corpus
from tests.e2e.run_results import metrics, saved_steps
from tests.processes import start

STEPS = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpora") / "corpus")


def train(corpus, workdir, *settings):
    shared = (f"train.steps={STEPS}", "log.every_steps=1", "save.every_steps=2", "log.tensorboard=False", *settings)
    changes = [f"--config.{setting}" for setting in shared]
    return ["train", f"--config={CONFIG}:scratch@{corpus}", f"--workdir={workdir}", *changes]


def interleaved(*command: str) -> None:
    """Runs a command with the devices of the processes in turn: of two with four each, one has rows 0, 2, 4, 6."""
    start.interleave()
    sys.exit(cli.main(list(command)))


INTERLEAVED = start.calling("tests.processes.test_training:interleaved")


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "devices", "mesh", "command"),
    [
        (2, 2, ["mesh.fsdp=2"], start.T5G2),
        (4, 1, ["mesh.data=4"], start.T5G2),
        (2, 4, ["mesh.strategy=fsdp"], INTERLEAVED),
        (2, 2, ["mesh.strategy=zero1", "mesh.tensor=2"], start.T5G2),
        (2, 2, ["mesh.fsdp=2", "mesh.context=2"], INTERLEAVED),
    ],
)
def test_several_processes_train_as_one(corpus, devices, number, mesh, command, tmp_path, monkeypatch):
    """The same tokens in the same batches, the same losses and weights, whosever devices are neighbours."""
    start.run([*command, *train(corpus, tmp_path / "several", *mesh)], number, devices=devices)
    some = jax.devices()[: number * devices]
    monkeypatch.setattr(jax, "devices", lambda: some)
    assert cli.main(train(corpus, tmp_path / "one", *mesh)) == 0
    ours, expected = (metrics(tmp_path / name) for name in ("several", "one"))
    assert ours.keys() == expected.keys()
    assert {(step, name) for step, name in ours if name == "train/loss"} == {
        (step, "train/loss") for step in range(1, STEPS + 1)
    }
    for key, value in expected.items():
        same = ours[key] == value if isinstance(value, str) else ours[key] == pytest.approx(value, rel=1e-4, abs=1e-6)
        assert same, (key, ours[key], value)
    several, one = (folders.load_model(folders.open_model(tmp_path / name / "model")) for name in ("several", "one"))
    for name, value in tree.named(several).items():
        np.testing.assert_allclose(value, tree.named(one)[name], atol=1e-5, err_msg=name)


@pytest.mark.long
def test_when_one_process_dies_the_others_end_and_a_rerun_goes_on(corpus, tmp_path):
    workdir = tmp_path / "run"
    endless = [*start.T5G2, *train(corpus, workdir, "train.steps=100000", "train.hang_timeout_secs=20")]
    with start.started(endless, 2) as processes:
        await_step(workdir, 6, processes)
        processes[1].send_signal(signal.SIGKILL)
        _, written = processes[0].communicate(timeout=100)
    assert processes[0].returncode == 1, written
    assert "Traceback" in written or "Timeout (0:00:20)!" in written
    last = saved_steps(workdir)[-1]
    changes = [f"--config.train.steps={last + 2}", "--allow_change=optim.schedule"]
    written = start.run([*start.T5G2, *train(corpus, workdir), *changes], 2)
    assert f"weights: from step {last} of" in written[0]
    assert saved_steps(workdir)[-1] == last + 2


def await_step(workdir, step, processes):
    """Returns when a step has been recorded."""
    file, end = workdir / "metrics.jsonl", time.monotonic() + 120
    while not (file.exists() and any(json.loads(line)["step"] >= step for line in whole_lines(file))):
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < end
        time.sleep(0.05)


def whole_lines(file):
    return [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
