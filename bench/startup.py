"""Start-up: `import t5g2` and `t5g2 --help` beside `import jax`, and a training run of T5Gemma 2 270M-270M by part.

Fresh processes, in turn, the best of each. The run has new weights, text as bytes, rows of 512 and 128 tokens and no
compilation cache, and ends after one step; its parts are those that its log tells.

Must: `import t5g2` at most 1.5 times `import jax`; a part of the start of a run that is not the compiler below 5 s on
two cores.
"""

import os
import re
import subprocess
import sys
import tempfile
import time

from measure import table, write

PROGRAMS = {
    "python": "pass",
    "import jax": "import jax",
    "import t5g2": "import t5g2",
    "t5g2 --help": "from t5g2.cli import main; main(['--help'])",
    "import t5g2.train.loop": "import t5g2.train.loop",
}


def get_config():
    """Returns the config of the run: `--config=bench/startup.py`."""
    from ml_collections import ConfigDict

    config = ConfigDict()
    config.model = {"size": "t5gemma2:270m-270m", "encoder": {"images": None}}
    config.data = {
        "sources": [{"text": {"kind": "python"}, "objective": {"kind": "ul2"}}],
        "tokenizer": {"kind": "bytes", "sentinels": 100},
        "chunk_tokens": 160,
        "rows": 1,
        "encoder_length": 512,
        "decoder_length": 128,
        "streams": 4,
    }
    config.optim = {"optimizer": {"kind": "adamw"}, "schedule": {"kind": "constant", "peak": 1e-3}}
    config.train = {"steps": 1}
    config.compute = {"dtype": "float32"}
    config.save = {"every_steps": 0, "model": False}
    return config


def imports() -> dict[str, float]:
    best = dict.fromkeys(PROGRAMS, float("inf"))
    for _ in range(5):
        for name, code in PROGRAMS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def run() -> dict[str, tuple[float, float]]:
    """Returns the seconds of each part of the start of a run, and those of the compiler in it, the least of two."""
    best: dict[str, tuple[float, float]] = {}
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "t5g2", "train", f"--config={__file__}", f"--workdir={folder}/run"]
            environment = os.environ | {"T5G2_CACHE": f"{folder}/cache"}
            done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr)
        [line] = re.findall(r"start-up [\d.]+ s: (.*)", done.stderr)
        for name, whole, compiling in re.findall(r"([a-z][a-z ]*) ([\d.]+) s(?: \(compiling ([\d.]+) s\))?", line):
            seconds = float(whole), float(compiling or 0)
            best[name] = min(best.get(name, seconds), seconds, key=lambda pair: pair[0] - pair[1])
    return best


def main():
    seconds = imports()
    ratios = [(name, f"{s / seconds['import jax']:.2f}", f"{s:.2f}") for name, s in seconds.items()]
    parts = [(name, f"{whole:.1f}", f"{whole - compiling:.1f}") for name, (whole, compiling) in run().items()]
    write(
        "startup",
        "Start-up",
        table(("program", "times `import jax`", "seconds"), ratios),
        "From the command to the end of the first step of T5Gemma 2 270M-270M, which is the last part:",
        table(("part", "seconds", "without the compiler"), parts),
    )


if __name__ == "__main__":
    main()
