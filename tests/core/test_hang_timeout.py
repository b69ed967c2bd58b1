"""A process that gets no beat ends with status 1 and its stacks; one that is alone, or has ended its wait, does not."""

import subprocess
import sys

import pytest

CODE = """
import sys, time
import jax
from t5g2.core.hang_timeout import HangTimeout

jax.process_count = lambda: int(sys.argv[1])
with HangTimeout(1) as waiting:
    waiting.beat()
    for _ in range(3):
        time.sleep(0.5)
        if sys.argv[2] == "beats":
            waiting.beat()
    if sys.argv[2] == "ends":
        waiting.end()
time.sleep(1.5 * (sys.argv[2] != "hangs"))
"""


@pytest.mark.parametrize(
    ("processes", "what", "status"), [(2, "hangs", 1), (2, "beats", 0), (1, "hangs", 0), (1, "ends", 0)]
)
def test_who_is_ended(processes, what, status):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(processes), what], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status, done.stderr
    assert ("Timeout (0:00:01)!" in done.stderr and "Thread" in done.stderr) == (status == 1)
