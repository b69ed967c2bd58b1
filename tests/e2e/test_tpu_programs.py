"""Programs for TPUs, compiled by their own compiler; none of them has run on one yet."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = Path(sys.prefix, "tpu-compiler")


@pytest.mark.long
@pytest.mark.skipif(not COMPILER.exists(), reason="no TPU compiler here; `make test` installs it (Linux, x86-64)")
def test_programs_of_tpus():
    """Attention of packed rows on 2 x 2 devices: one kernel forward and two backward, and no array of all pairs. The
    gradient of a tied table on 4: the sum of lookups and head is reduced and cut at once, never whole.
    """
    path = os.pathsep.join([str(COMPILER), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.e2e.tpu_programs"]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [line for line in result.stdout.splitlines() if " kernels=" in line]
    assert len(lines) == 8
    for line in lines:
        assert re.search(r"kernels=3 pairs=False$", line), line
    assert "v5p:2x2x1 table reduce-scatters=1 all-reduces=0" in result.stdout.splitlines()
