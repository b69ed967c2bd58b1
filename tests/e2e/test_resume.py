"""A run that is killed, stopped or damaged, and started again, ends in the same bits as one left alone."""

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from t5g2 import cli
from tests.data.test_workers import added_memory, await_end, shared_memory
from tests.e2e.conftest import CONFIG, command, environment, run

# rates and times differ from run to run, and so do lines that a stop cut short; everything else must not
TIMED = ("wall", "tokens_per_s", "mfu", "memory", "steps_per_s", "seconds")


def train(corpus: Path, workdir: Path, *changes: str) -> list[str]:
    return ["train", f"--config={CONFIG}:scratch@{corpus}", f"--workdir={workdir}", *changes]


def metrics(workdir: Path) -> dict[tuple[int, str], float]:
    """{(step, name): value} of what a run recorded, rates and times left out."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and not any(part in name for part in TIMED):
                assert (row["step"], name) not in found, f"{name} is recorded twice at step {row['step']}"
                found[row["step"], name] = value
    return found


def checksums(workdir: Path, step: int) -> dict[str, int]:
    """The checksum of every leaf of a saved state."""
    meta = json.loads(next((workdir / "checkpoints" / str(step) / "meta").glob("*.json")).read_text())
    return {name: facts["checksum"] for name, facts in meta["body"]["leaves"].items()}


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run(*train(corpus, workdir))
    return workdir


def reached(file: Path, step: int, *, since: float) -> bool:
    """True if a step was recorded after that moment, so by this run and not by one before it."""
    if not file.exists():
        return False
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    return any(row["step"] >= step and row["wall"] >= since for row in rows)


def interrupted(arguments: list[str], workdir: Path, number: int, *, at_step: int, delay: float) -> int:
    """Starts a run, sends it a signal some time after it has recorded a step, and returns its exit status."""
    file, started = workdir / "metrics.jsonl", time.time()
    child = subprocess.Popen(
        command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    )
    end = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < end and not reached(file, at_step, since=started):
        time.sleep(0.01)
    time.sleep(delay)
    child.send_signal(number)
    _, said = child.communicate(timeout=120)
    assert "Traceback" not in said, said
    return child.returncode


@pytest.mark.long
def test_a_run_stopped_in_every_way_ends_as_if_left_alone(corpus, alone, tmp_path):
    workdir, draw = tmp_path / "run", random.Random(3)
    arguments = train(corpus, workdir)
    # a step takes some 10 ms here, so the kills fall anywhere: into a step, a save, the start of the next
    for number, at_step, status in (
        (signal.SIGKILL, 2, -signal.SIGKILL),
        (signal.SIGTERM, 8, 143),
        (signal.SIGKILL, 12, -signal.SIGKILL),
        (signal.SIGINT, 16, 130),
        (signal.SIGKILL, 18, -signal.SIGKILL),
    ):
        found = interrupted(arguments, workdir, number, at_step=at_step, delay=draw.uniform(0, 0.05))
        assert found == status, found
    run(*arguments)
    assert checksums(workdir, 48) == checksums(alone, 48)
    assert metrics(workdir) == metrics(alone)


@pytest.mark.long
def test_a_signal_saves_first_and_a_finished_run_says_so(corpus, alone, tmp_path):
    workdir = tmp_path / "run"
    arguments = [*train(corpus, workdir), "--config.save.every_steps=0", "--config.train.steps=100000"]
    assert interrupted(arguments, workdir, signal.SIGTERM, at_step=6, delay=0) == 143
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert len(steps) == 1
    assert steps[0] >= 6
    assert not (workdir / "done.json").exists()
    before = sorted((path, path.stat().st_mtime_ns) for path in alone.rglob("*") if path.parent.name == "checkpoints")
    again = run(*train(corpus, alone))
    assert "done" in again.stdout + again.stderr
    assert before == sorted(
        (path, path.stat().st_mtime_ns) for path in alone.rglob("*") if path.parent.name == "checkpoints"
    )


@pytest.mark.long
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(corpus, alone, tmp_path):
    """Every kind of damage is tested where checkpoints are: tests/checkpoint/test_train_states.py."""
    workdir = tmp_path / "run"
    shutil.copytree(alone, workdir)
    (workdir / "done.json").unlink()
    folder = workdir / "checkpoints" / "48" / "params" / "embedder.table"
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = run(*train(corpus, workdir))
    assert "params.embedder.table" in done.stderr
    assert "48.damaged" in done.stderr
    assert (workdir / "checkpoints" / "48.damaged").is_dir()
    assert checksums(workdir, 48) == checksums(alone, 48)
    assert metrics(workdir) == metrics(alone)


@pytest.mark.long
def test_what_may_differ_on_resume_and_what_may_not(corpus, alone, one_device, tmp_path, capfd):
    """In this process, on one device as the run was, and compiled as the tests are."""
    workdir = tmp_path / "run"
    shutil.copytree(alone, workdir)
    longer = [*train(corpus, workdir), "--config.train.steps=50", "--config.compute.remat=block"]
    assert cli.main([*longer, "--config.train.seed=8"]) == 2
    assert "changed  train.seed: 7 -> 8" in capfd.readouterr().err
    assert cli.main([*longer, "--config.train.z_loss=1e-4", "--allow_change=train.z_loss"]) == 0
    said = capfd.readouterr().err
    assert "resumed with another train.steps: 48 -> 50" in said
    assert "resumed with another compute.remat: 'none' -> 'block'" in said
    assert "resumed with another train.z_loss: 0.0 -> 0.0001" in said


@pytest.mark.long
def test_killed_with_data_workers_leaves_nothing_behind(corpus, tmp_path):
    workdir = tmp_path / "run"
    before = shared_memory()
    arguments = [*train(corpus, workdir), "--config.data.workers=2", "--config.train.steps=100000"]
    child = subprocess.Popen(
        command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    file, end = workdir / "metrics.jsonl", time.monotonic() + 120
    while not (file.exists() and '"step": 4,' in file.read_text()) and time.monotonic() < end:
        assert child.poll() is None
        time.sleep(0.05)
    workers = descendants(child.pid)
    segments = added_memory(before, [child.pid, *workers])
    assert len(workers) >= 2
    child.kill()
    child.wait()
    await_end(workers, segments)


def descendants(pid: int) -> list[int]:
    children = [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    return children + [d for child in children for d in descendants(child)]
