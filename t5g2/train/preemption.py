"""SIGTERM and Ctrl-C: recorded when they arrive, obeyed between two steps."""

import contextlib
import signal
from collections.abc import Iterator

import numpy as np

from t5g2.core.hang_timeout import HangTimeout


class Preemption:
    """The signal that asked the run to stop; 0 = none.

    Args:
      waiting: gets a beat whenever the processes of a run agree.
    """

    def __init__(self, waiting: HangTimeout):
        self.signal, self._waiting = 0, waiting

    def agreed(self) -> int:
        """Returns the signal, the same on every process: a signal to one process stops all.

        All processes must call this at the same step, because it is a collective operation.
        """
        self._waiting.beat()
        import jax

        if jax.process_count() == 1:
            return self.signal
        from jax.experimental import multihost_utils

        # one process that leaves the loop alone would leave the others waiting in a collective operation
        return int(multihost_utils.process_allgather(np.int32(self.signal)).max())


@contextlib.contextmanager
def on_signals(waiting: HangTimeout) -> Iterator[Preemption]:
    """Records the first SIGTERM or SIGINT, which would end the process; a second Ctrl-C ends it at once."""
    preemption = Preemption(waiting)

    def record(number: int, _frame: object) -> None:
        if preemption.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        preemption.signal = number

    handlers = {number: signal.signal(number, record) for number in (signal.SIGTERM, signal.SIGINT)}
    # the caller's handlers come back even if the run fails, because a program may train several times
    try:
        yield preemption
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def signal_name(number: int) -> str:
    """Returns the name of a signal: SIGTERM for 15."""
    return signal.Signals(number).name
