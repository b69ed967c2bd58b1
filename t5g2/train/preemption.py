"""SIGTERM and Ctrl-C, noted when they come and acted on between two steps."""

import contextlib
import signal
from collections.abc import Iterator

import numpy as np


class Preemption:
    """The signal that asked the run to stop; 0 = none."""

    signal: int = 0

    def agreed(self) -> int:
        """The signal, the same on every process: one process that was signalled stops all.

        All processes must call it at the same step.
        """
        import jax

        if jax.process_count() == 1:
            return self.signal
        from jax.experimental import multihost_utils

        return int(multihost_utils.process_allgather(np.int32(self.signal)).max())


@contextlib.contextmanager
def on_signals() -> Iterator[Preemption]:
    """Notes the first SIGTERM or SIGINT instead of dying of it; a second Ctrl-C ends the process at once."""
    preemption = Preemption()

    def note(number: int, _frame: object) -> None:
        if preemption.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        preemption.signal = number

    handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield preemption
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def signal_name(number: int) -> str:
    """The name of a signal: SIGTERM for 15."""
    return signal.Signals(number).name
