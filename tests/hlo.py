"""Contents of a compiled program, what it computes and what it sends between devices, read from its text."""

import re
from typing import NamedTuple

from t5g2.jobs.program_operations import operations

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


def flops(text: str) -> int:
    """FLOPs of all matrix products, each as often as the loops around it turn; for programs without other loops."""
    computations, callers, computation = {}, {}, ""
    for line in text.splitlines():
        if line.endswith("{") and not line[:1].isspace():
            computation = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0].split("(")[0]
        elif match := re.match(r"\s+(?:ROOT )?%?(\S+) = ", line):
            computations[match[1]] = computation
            if called := re.search(r" (?:while\(.* body|call\(.* to_apply)=%?([\w.-]+)", line):
                turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                assert turns or " while(" not in line, line
                callers[called[1]] = computation, int(turns[1]) if turns else 1

    def times(computation: str) -> int:
        caller, turns = callers.get(computation, (None, 1))
        return turns if caller is None else turns * times(caller)

    return sum(operation.flops * times(computations[name]) for name, operation in operations(text).items())


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))
