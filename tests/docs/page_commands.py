"""The commands of pages as a reader gives them, once each, and those that no test gives.

NOT_RUN says why a command is not run: each of its rules is a reason. Any other command of a page is run.
"""

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from t5g2 import cli
from tests.docs.pages import PAGES, ROOT, Command, commands

# first, as every other page goes on from what they have made
TUTORIALS = ("docs/tutorial/first_model.md", "docs/tutorial/real_checkpoint.md")
COMMANDS = [command for page in PAGES for command in commands(page)]
PROGRAM_OF_SET_UP = re.compile(r"(make|pip|python3?|\.venv/bin/\w+)$")
SET_UP = "it sets up an environment, or runs tests"
# each of its variants is read and checked; small, many would be the same, as they differ in what is made small
RESULT = "it is the sweep of a page of results"

NOT_RUN: dict[str, Callable[[Command], bool]] = {
    "a synopsis: the reader fills in its values": lambda command: command.is_synopsis,
    SET_UP: lambda command: bool(PROGRAM_OF_SET_UP.match(command.words[0])),
    RESULT: lambda command: is_of_results(command) and command.words[1] == "sweep",
    "it takes several processes": lambda command: command.words[0] in ("launch/local.sh", "mpirun", "sbatch"),
    "it takes the compiler of TPUs": lambda command: "--target=v5p:" in command.text,
    "it takes torch": lambda command: "--verify" in command.words,
    "it downloads tasks": lambda command: "--harness=" in command.text,
}
# what a command says of machines, and what is there: a folder of all hosts, devices, cores
SMALL = {
    r"=/shared/": "=shared/",
    r"--devices=\d+": "--devices=8",
    r"--workers=\d+": "--workers=1",
}


def page_name(command: Command) -> str:
    return str(command.page.relative_to(ROOT))


def is_of_results(command: Command) -> bool:
    return bool(re.match(r"docs/experiments/(?!index)", page_name(command)))


def why_not(command: Command) -> str:
    """Returns why a command is not run, "" if it is."""
    return next((why for why, applies in NOT_RUN.items() if applies(command)), "")


def made_small(words: Sequence[str]) -> list[str]:
    """Returns the words of a command, of the machines that are here."""
    for pattern, small in SMALL.items():
        words = [re.sub(pattern, small, word) for word in words]
    return list(words)


def run(command: Command, capsys) -> None:
    """Runs a command, whose output is not there yet for the reader of the page."""
    words = made_small(command.words[1:])
    for word in words:
        if word.startswith("--out=") and (path := Path(word.removeprefix("--out="))).exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        assert cli.main(words) == 0, f"{command}\n{capsys.readouterr().err}"
    finally:
        # of `profile`, whose process ends with it
        jax.config.update("jax_compilation_cache_include_metadata_in_key", False)


class Reader:
    """Somebody who gives the commands of pages in the folder of the repository, each once."""

    def __init__(self):
        self._given: set[str] = set()

    def follow(self, page: str, capsys) -> None:
        """Runs the commands of a page in its order, after those of the tutorials."""
        for name in (*TUTORIALS, page):
            for command in COMMANDS:
                if page_name(command) == name and not why_not(command) and command.text not in self._given:
                    # before it runs: one that fails is one failure, and not another of each page that goes on from it
                    self._given.add(command.text)
                    run(command, capsys)
