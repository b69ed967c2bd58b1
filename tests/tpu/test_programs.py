"""Programs for TPUs, compiled by their own compiler; none of them has run on one yet."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = Path(sys.prefix, "tpu-compiler")


@pytest.mark.long
@pytest.mark.skipif(not COMPILER.exists(), reason="no TPU compiler here; `make test-tpu` installs it (Linux, x86-64)")
def test_programs_of_tpus():
    """Attention of packed rows on 2 x 2 devices, and with the encoder's columns cut over 4: one kernel forward and two
    backward, and no array of all pairs. A step with FSDP on 4, whose encoder and decoder layer keep their output, and
    whose tied table's gradient, of two lookups and the head, is cut where it is summed over devices, never whole. The
    step is what `t5g2 check --target` compiles, whose estimate without the compiler is near the compiler's figure. Each
    of two slices is a part of the data axis, between which the sums of the gradients cross the network.
    """
    path = os.pathsep.join([str(COMPILER), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.tpu.programs"]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    step, *attention = [line for line in result.stdout.splitlines() if " kernels=" in line]
    assert step == "v5p:2x2x1 step kernels=6 pairs=False table reduce-scatters=1 all-reduces=0"
    assert len(attention) == 14
    printed, twice = result.stdout.split("v5e:2x2 twice: [[0], [1]]\n")
    assert re.search(r"^it fits: .* of a device of 2 slices of v5e:2x2$", twice, re.MULTILINE)
    (sums,) = re.findall(r"^  all-reduce of slices +2 +\d+ +([\d.]+) ", twice, re.MULTILINE)
    # float32 gradients, each device's quarter; a device sends as much, as there is one other slice
    table = 262_144 * 640 * 4 / 4 / 2**20
    assert table < float(sums) < 1.1 * table
    assert "stand where it does not look" not in twice
    by_formula, compiled = (
        float(re.search(rf"  {name} +([\d.]+)", printed)[1]) for name in ("in all, about", "in all")
    )
    assert by_formula == pytest.approx(compiled, rel=0.15)
    assert re.search(
        r"compiled for v5p:2x2x1 in \d+ s, nothing run or allocated; (99\.\d|100\.0)% of the new state", printed
    )
    # the head is computed once, for padding too; layers twice forward, and attention in whole blocks: those of 512 that
    # a window of 512 meets are three times its pairs
    ratios = {
        part: float(ratio)
        for part, ratio in re.findall(r"  (encoder|decoder|head) .* ([\d.]+) +[\d.]+$", printed, re.MULTILINE)
    }
    assert 1 <= ratios["head"] < 1.1
    assert 4 / 3 < ratios["encoder"] < 2
    assert re.search(r"  reduce-scatter +4 +\d+ .* of \d+\n", printed)
    assert re.search(r"a step by the compiler's estimates: [\d.]+ ms, MFU [\d.]+% of 459 TFLOP/s a device", printed)
    assert re.search(r"it fits: [\d.]+ of 95\.00 GiB of a device of v5p:2x2x1\n", printed)
    # only our own log, whose lines begin with the time
    assert not [line for line in result.stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    for line in attention:
        assert re.search(r"kernels=3 pairs=False$", line), line
