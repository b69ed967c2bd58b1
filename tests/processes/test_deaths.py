"""The end of a process that is in no collective operation after another one has died: it leaves its stacks."""

import re
import signal

import pytest

from tests.processes import start

# argv: seconds of JAX's heartbeat and of the hang timeout
WAITS = """
import sys, time
from t5g2.core import distributed
from t5g2.core.hang_timeout import HangTimeout

distributed.HEARTBEAT_SECS = int(sys.argv[1])
distributed.initialize("auto")
distributed.any_process([True])
HangTimeout(float(sys.argv[2])).beat()
print("ready", flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize(
    ("dies", "heartbeat", "timeout", "status", "said"),
    [
        (0, 100, 100, -signal.SIGABRT, r"Terminating process because .*another task died"),
        (1, 5, 100, -signal.SIGABRT, r"tasks are unhealthy \(stopped sending heartbeats\):\s+1\s"),
        (1, 100, 3, 1, r"Timeout \(0:00:03\)!"),
    ],
    ids=["process 0", "process 1", "process 1, and the hang timeout comes first"],
)
def test_the_other_one_ends(dies, heartbeat, timeout, status, said):
    """-SIGABRT is 134 in a shell."""
    command = [start.T5G2[0], "-c", WAITS, str(heartbeat), str(timeout)]
    with start.started(command, 2) as processes:
        for process in processes:
            assert process.stdout is not None
            assert "ready\n" in iter(process.stdout.readline, ""), process.communicate()
        processes[dies].send_signal(signal.SIGKILL)
        _, written = processes[1 - dies].communicate(timeout=60)
    assert processes[1 - dies].returncode == status, written
    assert re.search(said, written), written
    assert re.search(r'hread 0x\w+ .*\n  File "<string>", line \d+ in <module>', written), written


def test_who_joins_nobody_ends_with_its_stacks():
    code = "from t5g2.core import distributed; distributed.JOIN_SECS = 2; distributed.initialize('auto')"
    with start.started([start.T5G2[0], "-c", code], 2) as processes:
        processes[0].send_signal(signal.SIGKILL)
        _, written = processes[1].communicate(timeout=60)
    assert processes[1].returncode == -signal.SIGABRT, written
    assert re.match(r"joining the processes of this run at localhost:\d+, for at most 2 s\n", written)
    assert re.search(r"Current thread .*\n.* in initialize\n", written), written
