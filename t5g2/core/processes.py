"""Worker processes that end with their parent, and leave nothing on the machine however they end.

They are spawned and speak through a pipe: what multiprocessing's queues, pools and shared arrays have names for, locks
and memory, stays behind when parent, workers and the resource tracker are killed together.
"""

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from t5g2.core.errors import MachineError

WATCH_SECS = 0.5


class EndWithParent:
    """Initialiser of worker processes: ends the worker at most WATCH_SECS after its parent has ended, even by a signal.

    The kernel's parent-death signal would be immediate, but it follows the thread that started the worker, not the
    parent process.

    Args:
      parent: process id of the parent.
    """

    def __init__(self, parent: int):
        self._parent = parent

    def __call__(self) -> None:
        """Starts watching the parent."""
        threading.Thread(target=self._watch, daemon=True, name="t5g2-watch-parent").start()

    def _watch(self) -> None:
        # an orphan gets another parent id; polling it works for every way in which the parent can end
        while os.getppid() == self._parent:
            time.sleep(WATCH_SECS)
        os._exit(1)


class Worker:
    """A process that calls `target(connection, *arguments)`, and this process's end of the connection to it.

    Args:
      target: a function of a module, whose messages `receive` returns; it ends when the connection is closed.
      arguments: values that can be pickled.
    """

    def __init__(self, target: Callable[..., None], *arguments: Any):
        # Spawned, because a fork would inherit locks that threads of loaded libraries hold.
        context = get_context("spawn")
        self.connection, other_end = context.Pipe()
        self._process = context.Process(target=_work, args=(target, other_end, os.getpid(), arguments), daemon=True)
        self._process.start()
        # The worker has it now; as long as it is open here, the end of the worker is not noticed.
        other_end.close()

    def send(self, message: Any) -> None:
        """Sends a message, which the worker has to receive; if it has ended, `receive` raises the error."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def receive(self) -> Any:
        """Returns the next message; an error of the worker is raised here.

        Raises:
          MachineError: the worker has ended without an error, as when it is killed.
        """
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise MachineError(
                f"a worker process ended with exit code {self._process.exitcode} (-9: it was killed, often because "
                f"memory ran out; fewer workers take less); run the same command again to go on"
            ) from None
        if isinstance(message, BaseException):
            raise message
        return message

    def close(self) -> None:
        """Ends the process, which has nothing to save."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _work(target: Callable[..., None], connection: Connection, parent: int, arguments: tuple) -> None:
    EndWithParent(parent)()
    try:
        target(connection, *arguments)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent has closed the connection
        return
    except BaseException as error:  # raised again by `receive`
        error.add_note(f"In a worker process:\n{traceback.format_exc()}")
        try:
            connection.send(error)
        except (TypeError, AttributeError, ValueError):  # an error that cannot be pickled
            connection.send(RuntimeError(f"{type(error).__name__}: {error}"))
