"""SIGTERM and Ctrl-C as a question that the loop asks between two steps."""

import contextlib
import signal
from collections.abc import Iterator

import numpy as np


class Stopping:
    """Which signal asked for an end; 0 = none."""

    signal: int = 0

    def agreed(self) -> int:
        """The same answer on every process, which must all ask at the same step: one that was signalled counts."""
        import jax

        if jax.process_count() == 1:
            return self.signal
        from jax.experimental import multihost_utils

        return int(multihost_utils.process_allgather(np.int32(self.signal)).max())


@contextlib.contextmanager
def on_signals() -> Iterator[Stopping]:
    """Notes the first SIGTERM or SIGINT instead of dying of it; a second Ctrl-C ends the process at once."""
    stopping = Stopping()

    def note(number: int, _frame: object) -> None:
        if stopping.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopping.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
