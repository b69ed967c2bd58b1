"""Contents of a compiled program, and what it sends between devices, read from its text."""

import re
from typing import NamedTuple

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


class Collective(NamedTuple):
    """One array that crosses devices, as each of them sees it; `looped` = in the body of a loop, not once."""

    kind: str
    shape: tuple[int, ...]
    looped: bool


def shapes(text: str) -> set[tuple[int, ...]]:
    """The shapes of all arrays of the program, each as one device holds it."""
    return {_sizes(s) for s in re.findall(r"\b[a-z]\w*\[([\d,]+)\]", text)}


def collectives(text: str) -> list[Collective]:
    """Everything that crosses devices."""
    found, looped = [], True
    for line in text.splitlines():
        if line and not line[0].isspace():
            looped = not line.startswith("ENTRY")
        if match := re.search(rf" = (.*?) ({KINDS})(?:-start)?\(", line):
            found += [Collective(match[2], _sizes(s), looped) for s in re.findall(r"\[([\d,]+)\]", match[1])]
    return found


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))
