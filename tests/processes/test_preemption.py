"""A signal to one process is known to all at the same call."""

import jax

from t5g2.core import distributed, sharding
from t5g2.core.hang_timeout import HangTimeout
from t5g2.core.sharding import MeshShape
from t5g2.train.preemption import Preemption
from tests.processes import start

CALLS, SIGNALLED = 4, 2


def calling(path: str) -> None:
    """Writes what each call of one of the two processes returned; the second has a signal before one of them."""
    distributed.initialize("on")
    answers = []
    with HangTimeout(60) as waiting, jax.set_mesh(sharding.make(MeshShape(data=2, fsdp=-1))):
        preemption = Preemption(waiting)
        for call in range(CALLS):
            if call == SIGNALLED and jax.process_index() == 1:
                preemption.signal = 15
            answers.append(preemption.agreed())
    with open(f"{path}/{jax.process_index()}.txt", "w") as file:
        file.write(" ".join(map(str, answers)))


def test_all_processes_know_of_a_signal_one_call_later(tmp_path):
    """Not at the same call, for which the host would wait until the devices have done what was started before."""
    start.run(start.calling("tests.processes.test_preemption:calling", tmp_path), 2, devices=2)
    expected = " ".join(str(15 * (call > SIGNALLED)) for call in range(CALLS))
    assert [(tmp_path / f"{i}.txt").read_text() for i in range(2)] == [expected] * 2
