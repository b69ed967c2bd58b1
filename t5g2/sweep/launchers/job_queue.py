"""The queue of launchers whose jobs this process waits for: order, repetitions, signals, and what is said of them."""

import codecs
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from t5g2.core import logs
from t5g2.core.errors import UserError
from t5g2.core.terminal import escaped
from t5g2.sweep.job_files import JobFiles, indented, last_lines
from t5g2.sweep.launchers.launcher import unfinished
from t5g2.sweep.sweep_job import SweepJob
from t5g2.sweep.words import command_line

WRONG_INPUT = 2


class RunningJob(Protocol):
    """A job that has been started."""

    def poll(self) -> int | None:
        """Returns its exit status, 128 + n if signal n ended it; None while it runs."""
        ...

    def send_signal(self, number: int) -> None:
        """Lets it know that it is to end, or that nobody waits for it any more."""
        ...


@dataclass(frozen=True)
class QueueRules:
    """The rules of a queue.

    Attributes:
      at_once: most jobs that run at a time.
      retries: how often a job is started again after it has failed, except by wrong input (exit status 2).
      poll_secs: seconds between two looks at the running jobs.
      follow: the output of jobs is shown as it comes.
      on_signal: the words for a job that a signal to this process has ended, or has left alone.
    """

    at_once: int
    retries: int
    poll_secs: float = 0.05
    follow: bool = False
    on_signal: str = "stopped by a signal after {}; run the same command again to go on"


@dataclass
class _Started:
    job: SweepJob
    running: RunningJob
    begun: float
    follower: "_Follower | None"
    attempts: int = 1


@dataclass
class JobQueue:
    """Jobs that are started as soon as those before them are done.

    After a failure nothing new is started; what runs is waited for, because it is not to blame.

    Attributes:
      jobs: those that are not done, each after those that it needs.
      job_files: their files.
      start: starts a job, notes how, and returns it.
      rules: how the queue is worked off.
    """

    jobs: Sequence[SweepJob]
    job_files: JobFiles
    start: Callable[[SweepJob], RunningJob]
    rules: QueueRules
    _running: list[_Started] = field(default_factory=list, init=False)
    _failures: list[int | UserError] = field(default_factory=list, init=False)
    _signals: "ForwardedSignals" = field(init=False)

    def __post_init__(self):
        self._signals = ForwardedSignals(lambda: [started.running for started in self._running])

    def run(self) -> None:
        """Runs all jobs.

        Raises:
          UserError: a job has left no result.
          SystemExit: a job has failed, with its exit status; or after SIGTERM or SIGINT.
        """
        waiting = list(self.jobs)
        with self._signals as signals:
            while True:
                if not (signals.received or self._failures):
                    self._start_ready(waiting)
                if not self._running:
                    break
                for started in list(self._running):
                    self._look(started, stopped=bool(signals.received))
                if self._running:
                    signals.wait(self.rules.poll_secs)
            if signals.received:
                sys.exit(128 + signals.received)
        for failure in self._failures:
            if isinstance(failure, UserError):
                raise failure
            sys.exit(failure)

    def _start_ready(self, waiting: list[SweepJob]) -> None:
        undone = {job.name for job in waiting} | {started.job.name for started in self._running}
        for job in list(waiting):
            if len(self._running) == self.rules.at_once:
                return
            if undone.isdisjoint(job.after):
                waiting.remove(job)
                say(f"{job.label} {'resumes' if job.has_begun else 'starts'}: {command_line(job.arguments)}")
                self._start(job)

    def _start(self, job: SweepJob, attempts: int = 1) -> None:
        self.job_files.prepare(job)
        follower = _Follower(self.job_files.log(job)) if self.rules.follow else None
        begun = time.perf_counter()
        started = _Started(job, self.start(job), begun, follower, attempts)
        self._running.append(started)
        self._signals.catch_up(started.running)

    def _look(self, started: _Started, *, stopped: bool) -> None:
        # asked before the output is shown, so that none is missing at the end
        status = started.running.poll()
        if started.follower is not None:
            started.follower.show()
        if status is None:
            return
        self._running.remove(started)
        job, took = started.job, logs.duration(time.perf_counter() - started.begun)
        if stopped and status:
            say(f"{job.label} {self.rules.on_signal.format(took)}")
            return
        self.job_files.set_status(job, status)
        if status:
            self._failed(started, status, took)
        elif not job.result.exists():
            self._failures.append(unfinished(job))
        else:
            self.job_files.set_done(job)
            say(f"{job.label} done in {took}")

    def _failed(self, started: _Started, status: int, took: str) -> None:
        job, log = started.job, self.job_files.log(started.job)
        if status != WRONG_INPUT and started.attempts <= self.rules.retries:
            again = f"it starts again ({started.attempts} of {self.rules.retries})"
            say(f"{job.label} failed after {took} with exit status {status}; {again}")
            self._start(job, started.attempts + 1)
            return
        shown = (
            "its last lines are above" if started.follower else f"the last lines of {log}:{indented(last_lines(log))}"
        )
        say(f"{job.label} failed after {took} with exit status {status}; {shown}")
        self._failures.append(status)


class ForwardedSignals:
    """Forwards SIGTERM and SIGINT to the running jobs.

    Attributes:
      received: number of the signal that came last; 0 = none.
    """

    def __init__(self, running: Callable[[], Sequence[RunningJob]]):
        self.received, self._running, self._came = 0, running, threading.Event()
        self._told: list[RunningJob] = []

    def __enter__(self) -> "ForwardedSignals":
        self._before = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _frame: Any) -> None:
        self.received = number
        self._came.set()
        for job in self._running():
            self._told.append(job)
            job.send_signal(number)

    def catch_up(self, job: RunningJob) -> None:
        """Forwards a signal that came while the job was being started."""
        if self.received and job not in self._told:
            job.send_signal(self.received)

    def wait(self, seconds: float) -> None:
        """Waits, and no longer than until the first signal."""
        if self.received:
            time.sleep(seconds)
        else:
            self._came.wait(seconds)


class _Follower:
    """Shows what is added to a log from now on."""

    def __init__(self, log: Path):
        self._log, self._at = log, log.stat().st_size if log.exists() else 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(self) -> None:
        """Prints what has been added since the last call."""
        if not self._log.exists():
            return
        with open(self._log, "rb") as file:
            file.seek(self._at)
            added = file.read()
        if added:
            self._at += len(added)
            sys.stdout.write(self._decoder.decode(added))
            sys.stdout.flush()


def say(text: str) -> None:
    """Prints a line about a job."""
    print(escaped(text), flush=True)


def exit_status(returncode: int) -> int:
    """Returns the exit status of a shell for the return code of a process."""
    return returncode if returncode >= 0 else 128 - returncode


def append_to(log: Path) -> int:
    """Opens a log to be added to, as a file descriptor."""
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
