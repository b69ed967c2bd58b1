"""A folder of text, and the `t5g2` command in processes of its own."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

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
    """One device, as on a laptop; the suite's compilation cache."""
    of_tests = {"XLA_FLAGS", "PJRT_NPROC", "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    kept = {name: value for name, value in os.environ.items() if name not in of_tests}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


def run(*arguments: str, status: int = 0) -> subprocess.CompletedProcess:
    """Runs a `t5g2` command and checks its exit status."""
    done = subprocess.run(command(*arguments), check=False, capture_output=True, text=True, env=environment())
    assert done.returncode == status, done.stdout + done.stderr
    return done
