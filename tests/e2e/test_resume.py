"""A run that is killed, stopped or damaged, and started again, ends in the same bits as one left alone."""

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from t5g2 import cli
from t5g2.checkpoint import folder as folders
from t5g2.core import tree
from tests.data.test_workers import added_memory, await_end, shared_memory
from tests.e2e.conftest import CONFIG, command, environment, run
from tests.e2e.run_results import checksums, metrics, saved_steps

SAVE_STEPS = 8  # a save takes longer than eight steps


def train(corpus: Path, workdir: Path, *changes: str) -> list[str]:
    settings = [f"--config.save.every_steps={SAVE_STEPS}", "--config.optim.ema=0.9"]
    return ["train", f"--config={CONFIG}:scratch@{corpus}", f"--workdir={workdir}", *settings, *changes]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run(*train(corpus, workdir), "--config.save.every_steps=40")  # and at the end
    return workdir


def reached(file: Path, step: int, *, since: float) -> bool:
    """True if a step has been recorded after a moment, so by this run and not by one before it."""
    if not file.exists():
        return False
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    return any(row["step"] >= step and row["wall"] >= since for row in rows)


def begin(arguments: list[str], workdir: Path, *, at_step: int) -> subprocess.Popen:
    """Starts a run, and returns it when it has recorded a step."""
    file, started = workdir / "metrics.jsonl", time.time()
    child = subprocess.Popen(
        command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    )
    end = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < end and not reached(file, at_step, since=started):
        time.sleep(0.01)
    return child


def stop(child: subprocess.Popen, number: int) -> int:
    """Sends a run a signal, and returns its exit status."""
    child.send_signal(number)
    _, said = child.communicate(timeout=120)
    assert "Traceback" not in said, said
    return child.returncode


@pytest.mark.long
def test_a_run_stopped_in_every_way_ends_as_if_left_alone(corpus, alone, tmp_path):
    """One run, because each start costs seconds: killed before a save with its data workers and after one, stopped by
    either signal, and begun again from the checkpoint before a damaged one.
    """
    workdir, draw = tmp_path / "run", random.Random(3)
    arguments = [*train(corpus, workdir), "--config.log.tensorboard=False"]

    def anywhere():
        """A step takes some 10 ms here, so what follows falls into a step, a save, or the start of the next."""
        time.sleep(draw.uniform(0, 0.05))

    others = shared_memory()
    child = begin([*arguments, "--config.data.workers=2"], workdir, at_step=2)
    child.send_signal(signal.SIGSTOP)  # while its processes are counted
    workers = descendants(child.pid)
    segments = added_memory(others, [child.pid, *workers])
    assert len(workers) >= 2
    assert stop(child, signal.SIGKILL) == -signal.SIGKILL
    await_end(workers, segments)

    # the signal saves first, at whichever step it comes: nothing else does here
    before = saved_steps(workdir)
    child = begin([*arguments, "--config.save.every_steps=0"], workdir, at_step=6)
    assert stop(child, signal.SIGTERM) == 143
    [step] = [step for step in saved_steps(workdir) if step not in before]
    assert step >= 6
    assert not (workdir / "done.json").exists()

    child = begin(arguments, workdir, at_step=step + 8)
    anywhere()
    assert stop(child, signal.SIGINT) == 130
    child = begin(arguments, workdir, at_step=saved_steps(workdir)[-1] + 2)
    anywhere()
    assert stop(child, signal.SIGKILL) == -signal.SIGKILL

    # every kind of damage is tested where checkpoints are: tests/checkpoint/test_train_states.py
    newest = saved_steps(workdir)[-1]
    file = largest_file(workdir / "checkpoints" / str(newest) / "params" / "embedder.table")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = run(*arguments)
    assert "params.embedder.table" in done.stderr
    assert f"{newest}.damaged" in done.stderr
    assert (workdir / "checkpoints" / f"{newest}.damaged").is_dir()
    assert checksums(workdir, 48) == checksums(alone, 48)
    assert metrics(workdir) == metrics(alone)


def test_the_mean_of_the_weights_is_a_model_folder_too(alone):
    last, mean = (folders.load_model(folders.open_model(alone / name)) for name in ("model", "model_ema"))
    step = saved_steps(alone)[-1]
    saved = {name: path for path in (alone / "checkpoints" / str(step) / "opt").iterdir() if (name := path.name)}
    assert {f"mean.{name}" for name in tree.named(mean)} <= saved.keys()
    last, mean = (np.asarray(model.embedder.table[...]) for model in (last, mean))
    assert 0 < np.abs(last - mean).max() < 0.05


@pytest.mark.long
def test_a_finished_run_says_so_and_writes_nothing(corpus, alone, one_device, capfd):
    def files():
        return sorted((path, path.stat().st_mtime_ns) for path in alone.rglob("*") if path.is_file())

    before = files()
    assert cli.main(train(corpus, alone)) == 0
    assert "done: 48 steps" in capfd.readouterr().err
    assert files() == before


@pytest.mark.long
def test_what_may_differ_on_resume_and_what_may_not(corpus, alone, one_device, tmp_path, capfd):
    """In this process, on one device as the run was, and compiled as the tests are; from the checkpoint before the
    newest, of which a file is cut short.
    """
    workdir = tmp_path / "run"
    shutil.copytree(alone, workdir)
    file = largest_file(workdir / "checkpoints" / "48" / "opt" / "optimizer.0.mu.embedder.table")
    file.write_bytes(file.read_bytes()[:-7])
    longer = [*train(corpus, workdir), "--config.train.steps=50", "--config.compute.remat=block"]
    longer.append("--config.save.every_steps=0")
    assert cli.main([*longer, "--config.train.seed=8"]) == 2
    assert "changed  train.seed: 7 -> 8" in capfd.readouterr().err
    assert cli.main([*longer, "--config.train.z_loss=1e-4", "--allow_change=train.z_loss"]) == 0
    said = capfd.readouterr().err
    assert "opt.optimizer.0.mu.embedder.table: " in said
    assert "moved to 48.damaged; the step before is used" in said
    assert "resumed with another train.steps: 48 -> 50" in said
    assert "resumed with another compute.remat: 'none' -> 'block'" in said
    assert "resumed with another train.z_loss: 0.0 -> 0.0001" in said


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def descendants(pid: int) -> list[int]:
    children = [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    return children + [d for child in children for d in descendants(child)]
