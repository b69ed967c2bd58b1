"""SIGTERM and Ctrl-C: recorded when they arrive, obeyed between two steps."""

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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

        All processes must call this at the same step, because it is a collective operation. It waits for what the
        devices do.
        """
        self.agreed_before()
        return self._result()

    def agreed_before(self) -> int:
        """Returns what `agreed` would have at the last call of either, and starts the next question.

        The host does not wait for the step that it has just started. A process that is alone has no need of that.
        """
        self._waiting.beat()
        earlier = self._result()
        # one process that leaves the loop alone would leave the others waiting in a collective operation
        self._asked = _largest(self.signal) if jax.process_count() > 1 else None
        return earlier

    def _result(self) -> int:
        """Returns the answer to the last question."""
        if jax.process_count() == 1:
            return self.signal
        return 0 if self._asked is None else int(self._asked.addressable_data(0))


def _largest(number: int) -> jax.Array:
    """Starts the computation of the largest of the numbers of all processes."""
    mesh, largest = _program()
    parts = [jax.device_put(np.array([number], np.int32), device) for device in jax.local_devices()]
    of_devices = NamedSharding(mesh, PartitionSpec("devices"))
    # the mesh of a run may have the devices in another order
    with jax.set_mesh(mesh):
        return largest(jax.make_array_from_single_device_arrays((mesh.size,), of_devices, parts))


@functools.cache
def _program() -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
    """Returns a mesh of all devices, and the program that gives the largest of their numbers to each of them."""
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    return mesh, jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))


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
