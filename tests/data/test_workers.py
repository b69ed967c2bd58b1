"""Data workers: the same batches whatever their number, and processes that never outlive their trainer."""

import collections
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t5g2.core.errors import MachineError, UserError
from t5g2.core.processes import Worker
from t5g2.data.pipeline import Pipeline
from tests.data import corpus

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_workers(tmp_path, workers):
    # 4 units; 3 workers have 2, 1 and 1 of them
    config = corpus.mixed(tmp_path, rows=8, streams=4)
    alone, positions = corpus.batches(config, count=5)
    shared, same_positions = corpus.batches(dataclasses.replace(config, workers=workers), count=5)
    corpus.assert_same(alone, shared)
    assert positions == same_positions


def test_resuming_with_other_workers_is_going_on(tmp_path):
    config = corpus.mixed(tmp_path, rows=2, streams=4)
    whole, _ = corpus.batches(config, count=8)
    _, positions = corpus.batches(dataclasses.replace(config, workers=2), count=5)
    rest, _ = corpus.batches(dataclasses.replace(config, workers=1), count=3, positions=positions)
    corpus.assert_same(whole[5:], rest)


def test_an_error_in_a_worker_reaches_the_trainer(tmp_path):
    config = dataclasses.replace(corpus.mixed(tmp_path, rows=2, streams=4), workers=1)
    with Pipeline(config, seed=0) as pipeline:
        for file in tmp_path.glob("*.txt"):
            file.unlink()  # a worker takes seconds to start, and reads its first text after that
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match=r"(many|few)\d+\.txt"):
                pipeline.next()


@pytest.fixture
def trainer(tmp_path):
    """(process, pids of its workers, what it added to shared memory) of a trainer in a process group of its own."""
    pids, before = tmp_path / "pids", shared_memory()
    command = [sys.executable, "-m", "tests.data.trainer", str(pids)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not pids.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    workers = [int(line) for line in pids.read_text().split()]
    yield process, workers, added_memory(before, [process.pid, *workers])
    if process.poll() is None:
        process.kill()
    process.communicate()


def test_workers_are_gone_after_the_trainer_is_killed_and_there_is_no_named_memory(trainer):
    """Segments and semaphores with names would stay when nobody is left to remove them."""
    process, workers, segments = trainer
    assert len(workers) == 2
    assert all(map(is_running, workers))
    assert not segments
    process.kill()
    await_end(workers, segments)


def test_the_whole_group_is_killed_at_once(trainer):
    process, workers, segments = trainer
    os.killpg(process.pid, signal.SIGKILL)
    await_end(workers, segments)
    assert not segments


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_alone_is_killed_or_stopped(tmp_path, number):
    """Killed: an error that tells so. Stopped for a while: the same batches."""
    config = corpus.mixed(tmp_path, rows=8, streams=4)
    alone, _ = corpus.batches(config, count=8)
    with Pipeline(dataclasses.replace(config, workers=2), seed=0) as pipeline:
        batches = [pipeline.next()]
        worker = multiprocessing.active_children()[0].pid
        os.kill(worker, number)
        if number == signal.SIGSTOP:
            time.sleep(0.2)
            os.kill(worker, signal.SIGCONT)
            batches += [pipeline.next() for _ in range(7)]
            corpus.assert_same(alone, batches)
            return
        # those that had been made before come first
        with pytest.raises(MachineError, match=r"a worker process ended with exit code -9 \(-9: it was killed"):
            collections.deque((pipeline.next() for _ in range(20)), maxlen=0)


class Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("no pickle of this")


def send_and_fail(connection, name):
    connection.send("fine")
    raise UserError("no such text") if name == "user" else Unpicklable("odd")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [("user", UserError, "no such text"), ("odd", RuntimeError, "Unpicklable: odd")],
)
def test_an_error_is_raised_again_as_it_was(name, kind, message):
    worker = Worker(send_and_fail, name)
    assert worker.receive() == "fine"
    with pytest.raises(kind, match=message) as raised:
        worker.receive()
    if kind is UserError:
        assert "in send_and_fail" in raised.value.__notes__[0]
    worker.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_is_for_the_trainer_alone(trainer, number):
    process, workers, segments = trainer
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    await_end(workers, segments)
    assert "Traceback" not in stderr
    if number == signal.SIGINT:  # the trainer closes its pipeline, and nobody has anything to say
        assert (process.returncode, stderr) == (0, "")


def test_a_pipeline_that_nobody_closed_ends_with_the_interpreter():
    code = "from tests.data import trainer; from t5g2.data.pipeline import Pipeline\n"
    code += "if __name__ == '__main__': pipeline = Pipeline(trainer.CONFIG, seed=0); pipeline.next()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=True)
    # a pipeline that is closed says nothing; of this one Python's resource tracker may say that it cleaned up after it
    assert "Traceback" not in done.stderr


def await_end(workers: list[int], segments: set[str]) -> None:
    """Waits until the processes and the segments are gone; it is an error if they are there after a minute."""
    deadline = time.monotonic() + 60
    while left := [*filter(is_running, workers), *sorted(shared_memory() & segments)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def added_memory(before: set[str], pids: list[int]) -> set[str]:
    """The segments that came since, but for those that another test's processes have, which runs at the same time."""
    others: set[str] = set()
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) not in pids:
            try:
                mapped = (process / "maps").read_text()
            except OSError:  # it ended, or is another user's
                continue
            others |= {line.split()[5].removeprefix("/dev/shm/") for line in mapped.splitlines() if "/dev/shm/" in line}
    return shared_memory() - before - others
