"""Worker processes that end with their parent."""

import os
import threading
import time

WATCH_SECS = 0.5


class EndWithParent:
    """Initialiser of worker processes: ends the worker at most WATCH_SECS after its parent has ended, even by a signal.

    The kernel's parent-death signal would be immediate, but it follows the thread that started the worker, not the
    parent process. When the last worker is gone, Python's resource tracker frees their shared memory.

    Args:
      parent: process id of the parent.
    """

    def __init__(self, parent: int):
        self._parent = parent

    def __call__(self, *_: int) -> None:
        """Starts watching the parent; ignores grain's arguments, the worker's number and the number of workers."""
        threading.Thread(target=self._watch, daemon=True, name="t5g2-watch-parent").start()

    def _watch(self) -> None:
        # an orphan gets another parent id; polling it works for every way in which the parent can end
        while os.getppid() == self._parent:
            time.sleep(WATCH_SECS)
        os._exit(1)
