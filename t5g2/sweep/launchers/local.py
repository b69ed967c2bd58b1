"""The launcher `local`: commands as processes of this machine."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from signal import SIGTERM

from typing_extensions import override

from t5g2.core import bounds, paths
from t5g2.core.bounds import Count, CountOrZero
from t5g2.core.errors import UserError
from t5g2.sweep.job_files import JobFiles, LaunchRecord
from t5g2.sweep.launchers.job_queue import JobQueue, QueueRules, append_to, exit_status
from t5g2.sweep.launchers.launcher import Launcher, words_of
from t5g2.sweep.sweep_job import SweepJob

PROGRAM = shlex.join([sys.executable, "-m", "t5g2"])
# a program that asks for SIGTERM at its parent's death (PR_SET_PDEATHSIG = 1, linux/prctl.h), then becomes the command
STOP_WITH_PARENT = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, {int(SIGTERM)})
os.execvp(sys.argv[1], sys.argv[1:])
"""


@dataclass(frozen=True)
@bounds.checked
class Local(Launcher):
    """Runs the commands on this machine.

    Attributes:
      at_once: most commands that run at a time; the output of a single one is shown.
      retries: how often a command is started again after it has failed, except by wrong input.
      program: the command for `t5g2`.
    """

    at_once: Count = 1
    retries: CountOrZero = 0
    program: str = PROGRAM

    def __post_init__(self):
        words_of("program", self.program, least=1)

    def _program(self) -> list[str]:
        return list(map(paths.expand_home, words_of("program", self.program)))

    @override
    def check(self, name: str) -> None:
        if shutil.which(self._program()[0]) is None:
            raise UserError(
                f"program = {self.program!r} of --launcher={name} is no program here (not in PATH, or not executable); "
                f"install it, give its path, or leave --launcher.program out for this Python's t5g2"
            )

    @override
    def launch(self, jobs: Sequence[SweepJob], job_files: JobFiles) -> bool:
        program = self._program()

        def start(job: SweepJob) -> LocalProcess:
            process = LocalProcess([*program, *job.arguments], job_files, job)
            job_files.set_launched(job, "local", process.handle, f"process {process.handle}", job_files.log(job))
            return process

        rules = QueueRules(self.at_once, self.retries, follow=self.at_once == 1)
        JobQueue(jobs, job_files, start, rules).run()
        return True

    @override
    @classmethod
    def states(cls, records: Mapping[str, LaunchRecord]) -> dict[str, str]:
        return {name: "running" for name, record in records.items() if is_alive(record.handle)}


class LocalProcess:
    """A process that writes to its job's log.

    It is a session of its own, so that Ctrl-C on the terminal reaches it once, forwarded by the sweep, and not twice.
    It inherits the lock: if the sweep is killed, the process gets SIGTERM (Linux), and the next sweep waits until it
    has ended. Its output goes to a file and not through this process, so that it can save after that.
    """

    def __init__(self, command: Sequence[str], job_files: JobFiles, job: SweepJob):
        sys.stdout.flush()
        if sys.platform == "linux":
            command = [sys.executable, "-ISc", STOP_WITH_PARENT, *command]
        log = append_to(job_files.log(job))
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(job_files.lock,) if job_files.lock >= 0 else (),
                # or what is printed would come when the process ends
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        finally:
            os.close(log)

    @property
    def handle(self) -> str:
        """Process id and machine."""
        return f"{self._process.pid} on {platform.node()}"

    def poll(self) -> int | None:
        """Returns the exit status, 128 + n if signal n ended it; None while it runs."""
        code = self._process.poll()
        return None if code is None else exit_status(code)

    def send_signal(self, number: int) -> None:
        """Forwards a signal."""
        self._process.send_signal(number)


def is_alive(handle: str) -> bool:
    """True if there is a process on this machine with the handle's number."""
    number, _, host = handle.partition(" on ")
    if host != platform.node() or not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the number has gone to a process of another user
        return False
    return True
