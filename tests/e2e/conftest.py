"""A folder of text, and the `t5g2` command in processes of its own."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

DEVICE_FLAGS = ("--xla_force_host_platform_device_count", "--xla_cpu_scheduler_type")
CONFIG = Path(__file__).parent / "config.py"
WORDS = "the a cat dog sat ran on under mat tree and then it saw one two three small big old new".split()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with train/ and heldout/ text, the same in every session."""
    return write_corpus(tmp_path_factory.mktemp("corpora") / "corpus")


def write_corpus(folder: Path) -> Path:
    """Makes a folder with train/ and heldout/ text; returns it."""
    draw = random.Random(0)
    for split, files in (("train", 12), ("heldout", 3)):
        (folder / split).mkdir(parents=True)
        for i in range(files):
            (folder / split / f"{i:02}.txt").write_text(" ".join(draw.choices(WORDS, k=300)))
    return folder


def command(*arguments: str) -> list[str]:
    """A `t5g2` command line."""
    return [sys.executable, "-m", "t5g2", *arguments]


def environment() -> dict[str, str]:
    """One device, as on a laptop; programs are compiled as in the tests, a third of the time, and shared with them."""
    kept = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
    flags = [flag for flag in kept.get("XLA_FLAGS", "").split() if not flag.startswith(DEVICE_FLAGS)]
    return kept | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


def run(*arguments: str, status: int = 0) -> subprocess.CompletedProcess:
    """Runs a `t5g2` command and checks its exit status."""
    done = subprocess.run(command(*arguments), check=False, capture_output=True, text=True, env=environment())
    assert done.returncode == status, done.stdout + done.stderr
    return done
