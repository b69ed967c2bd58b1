"""Processes that end when the one that started them does."""

import os
import threading
import time

WATCH_SECS = 0.5


class EndWithParent:
    """Called in a process that `parent` started, ends it about WATCH_SECS after that one is gone, however it went.

    The kernel's parent-death signal would do so at once, but it follows the thread that started the process, not the
    process. When the last one is gone, Python's resource tracker removes what they left in shared memory.
    """

    def __init__(self, parent: int):
        self._parent = parent

    def __call__(self, *_: int) -> None:
        """Begins to watch; grain says which worker this is, of how many."""
        threading.Thread(target=self._watch, daemon=True, name="t5g2-watch-parent").start()

    def _watch(self) -> None:
        while os.getppid() == self._parent:
            time.sleep(WATCH_SECS)
        os._exit(1)
