"""SIGTERM and Ctrl-C: recorded when they arrive, obeyed between two steps."""

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5g2.core.hang_timeout import HangTimeout


class Preemption:
    """The signal that asked the run to stop; 0 = none.

    Args:
      waiting: gets a beat whenever the processes of a run agree.
    """

    def __init__(self, waiting: HangTimeout):
        self.signal, self._waiting = 0, waiting
        self._asked: jax.Array | None = None

    def agreed(self) -> int:
        """Returns the signal, the same on every process: a signal to one process stops all.

        All processes must call this at the same step, because it is a collective operation. Of several processes it
        returns what was asked at the call before, so that the host does not wait for the step that it has just started.
        """
        self._waiting.beat()
        if jax.process_count() == 1:
            return self.signal
        # one process that leaves the loop alone would leave the others waiting in a collective operation
        earlier, self._asked = self._asked, _largest(self.signal)
        return 0 if earlier is None else int(earlier.addressable_data(0))


def _largest(number: int) -> jax.Array:
    """Starts the computation of the largest of the numbers of all processes."""
    each, largest = _program()
    parts = [jax.device_put(np.array([number], np.int32), device) for device in jax.local_devices()]
    return largest(jax.make_array_from_single_device_arrays((jax.device_count(),), each, parts))


@functools.cache
def _program() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """Returns the sharding of a number for each device, and the program that gives the largest to all."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    each, all_alike = (NamedSharding(mesh, spec) for spec in (PartitionSpec("devices"), PartitionSpec()))
    return each, jax.jit(jnp.max, out_shardings=all_alike)


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
