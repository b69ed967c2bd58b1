"""Launchers of a sweep: run its parts here, or print their commands."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from t5g2.core import files, logs
from t5g2.core.errors import UserError, unknown
from t5g2.core.terminal import escaped
from t5g2.report import output
from t5g2.sweep.parts import Sweep, command_line
from t5g2.sweep.sweep_file import describe, load

PROGRAM = (sys.executable, "-m", "t5g2")
# a program that asks for SIGTERM at its parent's death (PR_SET_PDEATHSIG = 1, linux/prctl.h), then becomes the command
STOP_WITH_PARENT = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)})
os.execv(sys.argv[1], sys.argv[1:])
"""


def run_sweep(path: str | os.PathLike, workdir: str | os.PathLike, *, launcher: str = "local") -> None:
    """Runs a sweep file in a workdir and writes the report.

    Raises:
      UserError: the sweep file or a variant's config is wrong; nothing has been started then.
      SystemExit: a part failed, with its exit status; or after SIGTERM or SIGINT, when the running part has ended.
    """
    if launcher not in LAUNCHERS:
        raise unknown("launcher", launcher, LAUNCHERS)
    LAUNCHERS[launcher](load(path), Path(workdir))


def run_local(sweep: Sweep, folder: Path, *, program: Sequence[str] = PROGRAM) -> None:
    """Runs the parts here, one after the other; `program` is the command for `t5g2`."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={folder} is a file; give a folder, which is created if it is missing")
    if (folder / "experiment.json").exists():
        raise UserError(f"{folder} is the workdir of a single run; give the sweep a folder of its own")
    # every config is loaded here, so that a mistake in the last variant is an error before the first runs
    identities = _part_hashes(sweep, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={folder} cannot be created ({error}); give another folder") from None
    busy = f"another sweep still works in {folder}; this one goes on when it has ended"
    with files.locked(folder / ".lock", on_wait=lambda: _print(busy)) as lock, _ForwardedSignals() as signals:
        files.write_json(folder / "sweep.json", describe(sweep, folder))
        parts = sweep.ordered()
        width = max((len(part.name) for part in parts), default=0)
        for number, part in enumerate(parts, 1):
            label, mark = f"[{number}/{len(parts)}] {part.name:{width}}", folder / ".sweep" / f"{part.name}.json"
            # a part that was done with other settings runs again: the command itself checks which settings may differ
            if part.result(folder).exists() and _read_mark(mark) in (None, identities[part.name]):
                # a part that was done by hand has a result and no mark; from now on it has one
                files.write_json(mark, identities[part.name])
                _print(f"{label} already done")
                continue
            arguments = part.arguments(folder)
            _print(f"{label} {'resumes' if (folder / part.name).exists() else 'starts'}: {command_line(arguments)}")
            start = time.perf_counter()
            status = _run_command([*program, *arguments], signals, lock)
            duration = logs.duration(time.perf_counter() - start)
            if signals.received:
                _print(f"{label} stopped by a signal after {duration}; run the same command again to go on")
                sys.exit(128 + signals.received)
            if status:
                _print(f"{label} failed after {duration} with exit status {status}; its last lines are above")
                sys.exit(status)
            if not part.result(folder).exists():
                raise UserError(
                    f"{part.name} exited with status 0 but left no {part.result(folder)}; correct the part's `out`"
                )
            files.write_json(mark, identities[part.name])
            _print(f"{label} done in {duration}")

    output.write(folder)


def print_commands(sweep: Sweep, folder: Path) -> None:
    """Prints the commands for a shell, each after those that it needs; starts and writes nothing."""
    for part in sweep.ordered():
        print(f"# {part.name}" + (f", after {', '.join(part.after)}" if part.after else ""))
        print(command_line(part.arguments(folder)))


LAUNCHERS: dict[str, Callable[[Sweep, Path], None]] = {"local": run_local, "print": print_commands}


def _part_hashes(sweep: Sweep, folder: Path) -> dict[str, str]:
    """Returns a hash for each part, which changes with its settings and with those of the parts before it."""
    identities = {}
    for part in sweep.ordered():
        text = part.identity(folder) + "".join(identities[name] for name in sorted(part.after))
        identities[part.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return identities


class _ForwardedSignals:
    """Forwards SIGTERM and SIGINT to the running part; no part is started afterwards."""

    def __init__(self):
        self.received, self._child = 0, None

    def __enter__(self):
        self._before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, _frame: Any) -> None:
        self.received = number
        if self._child is not None:
            self._child.send_signal(number)

    def wait(self, child: subprocess.Popen) -> int:
        self._child = child
        if self.received:  # the signal came between the start of the child and this line
            child.send_signal(self.received)
        try:
            return child.wait()
        finally:
            self._child = None


def _run_command(command: Sequence[str], signals: _ForwardedSignals, lock: int) -> int:
    """Runs a command and returns its exit status, 128 + n if signal n ended it.

    The command is a session of its own, so that Ctrl-C on the terminal reaches it once, forwarded by the sweep, and
    not twice. It inherits the lock: if the sweep is killed, the command gets SIGTERM (Linux), and the next sweep waits
    until it has ended.
    """
    if signals.received:
        return 128 + signals.received
    sys.stdout.flush()
    if sys.platform == "linux":
        command = [sys.executable, "-ISc", STOP_WITH_PARENT, *command]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=(lock,))
    status = signals.wait(child)
    return status if status >= 0 else 128 - status


def _read_mark(path: Path) -> str | None:
    return files.read_json(path, fix="remove it, and run the sweep again") if path.exists() else None


def _print(text: str) -> None:
    print(escaped(text), flush=True)
