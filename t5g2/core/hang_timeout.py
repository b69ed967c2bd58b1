"""The end of a process that waits for others for too long, as when one of them has died."""

import faulthandler
import sys
from types import TracebackType

import jax


class HangTimeout:
    """Ends this process with status 1, and the stacks of its threads on stderr, when no `beat` comes for so long.

    A collective operation waits for ever for a process that has died, or that is in another one. A process that is
    alone waits for nobody, and is never ended.

    Args:
      secs: the time between two beats, after which the process ends.
    """

    def __init__(self, secs: float):
        self._secs = secs

    def beat(self) -> None:
        """Starts the time anew."""
        if jax.process_count() > 1:
            # by a thread that is not Python's, because a collective operation may hold the interpreter's lock
            faulthandler.dump_traceback_later(self._secs, exit=True, file=sys.__stderr__ or 2)

    def end(self) -> None:
        """Stops the time, until the next beat."""
        faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> "HangTimeout":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()
