"""Memory that adaptation takes: sources of 4 GB, each case in a fresh process.

The sources are bfloat16 model folders with the shapes of released models, cut in depth or repeated to about 4 GB.
Memory is the most that was resident (VmHWM in /proc/self/status) less what was resident when everything was imported
and nothing was loaded, in 10^9 bytes. Everything is written to the temporary folder (TMPDIR), 16 GB at most at a time,
and removed.

Must: at most 1.2 GB. What it takes is the largest tensor, Gemma 2's embedding being 1.18. Measured on 2 CPU cores, jax
0.10.2:

    adaptation                                            sources  largest tensor  memory over idle, GB
    Gemma 3 to T5Gemma 2, all copied                      4.04     0.60            0.63
    Gemma 2 to T5Gemma, all copied                        3.98     1.18            1.19
    Gemma 2 to T5Gemma, two sources, new cross-attention  4.57     1.18            1.20
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import ml_dtypes
import numpy as np

from t5g2.checkpoint import folder as folders
from t5g2.core import tree
from t5g2.core.tree import Leaf
from t5g2.models import build, sizes
from t5g2.models.config import TextConfig
from t5g2.train.adaptation import adapt_folder
from t5g2.train.weight_origin import Adapt

LIMIT = 1.2e9
NEEDED = 16 * 10**9
GEMMA3 = replace(sizes.size("gemma3:1b"), layers=64)
GEMMA2_WIDE = replace(sizes.size("gemma2:2b"), layers=12)
GEMMA2_NARROW = replace(sizes.size("gemma2:2b"), width=1152, mlp_width=4608, heads=4, kv_heads=2, layers=24)
# name -> (sources, target)
CASES: dict[str, tuple[dict[str, TextConfig], str]] = {
    "Gemma 3 to T5Gemma 2, all copied": ({"source": GEMMA3}, "t5gemma2"),
    "Gemma 2 to T5Gemma, all copied": ({"source": replace(GEMMA2_WIDE, layers=18)}, "t5gemma"),
    "Gemma 2 to T5Gemma, two sources, new cross-attention": (
        {"encoder": GEMMA2_WIDE, "decoder": GEMMA2_NARROW},
        "t5gemma",
    ),
}


def make(out: Path, config: TextConfig) -> float:
    """A model folder of a pattern that every leaf begins elsewhere; its size in 10^9 bytes."""

    def leaf(number: int, leaf: Leaf) -> Leaf:
        def pattern() -> np.ndarray:
            count = np.arange(number, number + int(np.prod(leaf.shape)), dtype=np.uint32)
            return (count % 0x4000).astype(np.uint16).view(ml_dtypes.bfloat16).reshape(leaf.shape)  # finite, all

        return replace(leaf, read=pattern)

    leaves = tree.leaves(build.abstract(config, ml_dtypes.bfloat16))
    folders.save_leaves(out, config, {key: leaf(i, one) for i, (key, one) in enumerate(leaves.items())})
    return sum(file.stat().st_size for file in out.iterdir()) / 1e9


def largest(config: TextConfig) -> float:
    """The size of the largest tensor in 10^9 bytes: the embedding, in bfloat16."""
    return 2 * config.vocab_size * config.width / 1e9


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main():
    if not Path("/proc/self/status").exists():
        print("memory is read from /proc/self/status, which only Linux has")
        return
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        if (free := shutil.disk_usage(folder).free) < NEEDED:
            sys.exit(f"{folder} has {free / 1e9:.1f} GB of space; {NEEDED / 1e9:.0f} are needed (TMPDIR says where)")
        print("| adaptation | sources, GB | largest tensor, GB | memory over idle, GB |\n|---|---|---|---|", flush=True)
        for name, (sources, target) in CASES.items():
            size = sum(make(folder / source, config) for source, config in sources.items())
            given = ",".join(str(folder / source) for source in sources)
            command = [sys.executable, __file__, given, target, folder / "out"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            took = int(done.stdout.split()[-1])
            tensor = max(largest(config) for config in sources.values())
            missed = " (must be 1.20)" if took > LIMIT else ""
            print(f"| {name} | {size:.2f} | {tensor:.2f} | {took / 1e9:.3f}{missed} |", flush=True)
            for part in folder.iterdir():
                shutil.rmtree(part)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        idle = resident("VmRSS")
        adapt_folder(Adapt(sys.argv[1]), sys.argv[2], sys.argv[3])
        print(resident("VmHWM") - idle)
