"""launch/local.sh: one run of several processes, started again when one dies, never after wrong input."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import write_corpus
from tests.e2e.run_results import saved_steps
from tests.processes import start
from tests.processes.test_training import recorded_step, train, wait_until

LOCAL = start.ROOT / "launch" / "local.sh"


def local(*arguments, **environ):
    return subprocess.run(
        [LOCAL, *map(str, arguments)], capture_output=True, text=True, env=os.environ | environ, timeout=60, check=False
    )


def test_each_process_knows_its_place():
    done = local(3, "sh", "-c", "echo $JAX_PROCESS_ID/$JAX_NUM_PROCESSES $JAX_COORDINATOR_ADDRESS")
    assert done.returncode == 0
    places, addresses = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert sorted(places) == ["0/3", "1/3", "2/3"]
    assert len(set(addresses)) == 1


@pytest.mark.parametrize(
    ("command", "status", "starts"),
    [
        ("exit 0", 0, 1),
        ("exit $((JAX_PROCESS_ID * 2))", 2, 1),  # wrong input stays wrong
        ("exit $JAX_PROCESS_ID", 1, 3),
        ("[ $JAX_PROCESS_ID = 0 ] || kill -9 $$", 137, 3),
        ("[ $JAX_PROCESS_ID = 0 ] || kill -ABRT $$", 134, 3),
        ("exit $((JAX_PROCESS_ID + 1))", 2, 1),  # of 1 and 2, 2
    ],
)
def test_what_is_started_again(tmp_path, command, status, starts):
    done = local(2, "sh", "-c", f"echo started >> {tmp_path}/$JAX_PROCESS_ID; {command}", RETRIES="2")
    assert done.returncode == status
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == "started\n" * starts
    assert done.stderr.count("start again") == starts - 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_and_nothing_starts_again(tmp_path, number, status):
    """Each process has time to save: its status is that of the launcher."""
    code = (
        "import pathlib, signal, sys, time, os\n"
        "def stop(number, frame):\n"
        "    time.sleep(0.3); pathlib.Path(sys.argv[1], 'saved' + os.environ['JAX_PROCESS_ID']).touch()\n"
        "    sys.exit(128 + number)\n"
        "signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)\n"
        "pathlib.Path(sys.argv[1], 'ready' + os.environ['JAX_PROCESS_ID']).touch()\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen([LOCAL, "2", "python3", "-c", code, tmp_path], stderr=subprocess.PIPE, text=True)
    while not all((tmp_path / f"ready{i}").exists() for i in range(2)):
        time.sleep(0.02)
    child.send_signal(number)
    _, written = child.communicate(timeout=30)
    assert child.returncode == status, written
    assert all((tmp_path / f"saved{i}").exists() for i in range(2))
    assert "start again" not in written


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_process_starts_none(tmp_path, number):
    """It comes while the port is chosen."""
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nkill -{number.value} $PPID\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = local(2, "touch", tmp_path / "started", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 128 + number
    assert not (tmp_path / "started").exists()


def test_each_process_has_a_gpu_of_its_own():
    shown = "echo $JAX_LOCAL_DEVICE_IDS"
    assert local(2, "sh", "-c", shown).stdout.split() in (["0", "1"], ["1", "0"])
    assert local(2, "sh", "-c", shown, JAX_LOCAL_DEVICE_IDS="0,1").stdout.split() == ["0,1", "0,1"]


@pytest.mark.parametrize("arguments", [(), ("2",), ("0", "true"), ("two", "true"), ("-1", "true")])
def test_a_wrong_use_is_named(arguments):
    done = local(*arguments)
    assert done.returncode == 2
    assert "usage: launch/local.sh PROCESSES COMMAND" in done.stderr
    assert local(1, "true", RETRIES="many").returncode == 2


@pytest.mark.parametrize("program", ["no-such-program", "./no-such-program", str(start.ROOT)])
def test_a_program_that_there_is_not(program):
    done = local(2, program)
    assert done.returncode == 2
    assert f"launch/local.sh: {program} is no program here" in done.stderr
    assert "start again" not in done.stderr


@pytest.mark.long
def test_a_run_goes_on_after_process_0_was_killed(tmp_path):
    """The other one ends with status 134, or with 1 if it was in a collective operation."""
    workdir, corpus = tmp_path / "run", write_corpus(tmp_path / "corpus")
    command = [LOCAL, "2", *start.T5G2, *train(corpus, workdir, "train.steps=60", "train.hang_timeout_secs=20")]
    environ = os.environ | {"XLA_FLAGS": start.flags(1)}
    child = subprocess.Popen(command, cwd=start.ROOT, stderr=subprocess.PIPE, text=True, env=environ)
    try:
        wait_until(lambda: recorded_step(workdir) >= 6, [child])
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        _, written = child.communicate(timeout=240)
    finally:
        child.kill()
    assert child.returncode == 0, written
    assert written.count("start again") == 1
    assert "weights: from step" in written
    assert saved_steps(workdir)[-1] == 60
