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
    # as on slices of TPUs, whose meshes have the devices in an order of their own
    start.interleave()
    answers = []
    with HangTimeout(60) as waiting, jax.set_mesh(sharding.make(MeshShape(data=2, fsdp=-1))):
        preemption = Preemption(waiting)
        for call in range(CALLS):
            if call == SIGNALLED and jax.process_index() == 1:
                preemption.signal = 15
            answers.append(preemption.agreed_before())
        answers.append(preemption.agreed())
        preemption.signal = 20 if jax.process_index() == 0 else 0
        answers.append(preemption.agreed())
    with open(f"{path}/{jax.process_index()}.txt", "w") as file:
        file.write(" ".join(map(str, answers)))


def test_all_processes_know_of_a_signal_at_the_same_call(tmp_path):
    """Of a step one call later; of an evaluation at once."""
    start.run(start.calling("tests.processes.test_preemption:calling", tmp_path), 2, devices=2)
    expected = " ".join(str(15 * (call > SIGNALLED)) for call in range(CALLS)) + " 15 20"
    assert [(tmp_path / f"{i}.txt").read_text() for i in range(2)] == [expected] * 2
