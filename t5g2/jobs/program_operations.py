"""The operations of a compiled program, read from its HLO text: the named scope, FLOPs and bytes of each.

Counted are the FLOPs of matrix products, two for each multiply-add, and the bytes that an operation reads and writes if
nothing stays in a cache. Of an array that is only sliced, or updated in place, the slice counts. A number is of one
execution: an operation in a loop is executed as often as the loop turns.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from t5g2.core import scopes

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>\S+) = (?P<shape>.*?) (?P<opcode>[a-z][\w-]*)\((?P<rest>.*)")
_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\]")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]')
# operations that contain others, and those that compute nothing
CONTROL = ("while", "call", "conditional")
NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")


@dataclass(frozen=True)
class ProgramOperation:
    """An operation of a compiled program, as it is executed: a fusion is one.

    Attributes:
      opcode: HLO's name of what it computes: dot, fusion, copy, ….
      scope: the dotted scopes around it (core/scopes.py); "" = none.
      flops, moved_bytes: of one execution.
    """

    name: str
    opcode: str
    scope: str
    flops: int
    moved_bytes: int


@dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    arrays: list[tuple[str, tuple[int, ...]]]
    operands: list[str]
    line: str
    computation: str

    @property
    def size(self) -> int:
        """Bytes of its results."""
        return sum(_bits(dtype) * math.prod(shape) // 8 for dtype, shape in self.arrays)

    @property
    def scope(self) -> str | None:
        """Scopes of its name; None if XLA gave it no name."""
        match = re.search(r'op_name="([^"]*)"', self.line)
        return scopes.dotted(match[1]) if match else None

    @property
    def called(self) -> str | None:
        match = re.search(r"(?:calls|to_apply)=%?([\w.-]+)", self.line)
        return match[1] if match else None


def operations(text: str) -> dict[str, ProgramOperation]:
    """Returns the operations of a program by name, those in loops included, from `compiled.as_text()`."""
    program = list(_parse(text))
    by_name = {instruction.name: instruction for instruction in program}
    bodies = defaultdict(list)
    for instruction in program:
        bodies[instruction.computation].append(instruction)
    # what a fusion or a reduction computes is part of it
    parts = {i.called for i in program if i.called and i.opcode not in CONTROL}
    executed = [i for i in program if i.computation not in parts and i.opcode not in (*NOTHING, *CONTROL)]
    found = {}
    for instruction in executed:
        inside = bodies[instruction.called] if instruction.opcode == "fusion" and instruction.called else []
        products = [(_flops(part, by_name), part) for part in (instruction, *inside)]
        found[instruction.name] = ProgramOperation(
            instruction.name,
            instruction.opcode,
            _scope(instruction, products),
            sum(flops for flops, _ in products),
            _moved(instruction, inside, by_name),
        )
    return _with_neighbours(found, by_name)


def _parse(text: str) -> Iterator[_Instruction]:
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and not line[:1].isspace():
            computation = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0].split("(")[0]
        elif match := _INSTRUCTION.match(line):
            operands = re.findall(r"%([\w.-]+)", match["rest"].split(")", 1)[0])
            arrays = [(dtype, _sizes(dims)) for dtype, dims in _ARRAY.findall(match["shape"])]
            yield _Instruction(match["name"], match["opcode"], arrays, operands, line, computation)


def _scope(instruction: _Instruction, products: list[tuple[int, _Instruction]]) -> str:
    """Returns the scope of its largest matrix product, or else of its result; "-" if XLA left no name."""
    flops, largest = max(products, key=lambda product: product[0])
    scope = largest.scope if flops else None
    scope = instruction.scope if scope is None else scope
    return "-" if scope is None else scope


def _with_neighbours(
    found: dict[str, ProgramOperation], by_name: dict[str, _Instruction]
) -> dict[str, ProgramOperation]:
    """Returns the operations with a scope for those that XLA made without a name: that of what they read or feed."""
    users = defaultdict(list)
    for instruction in by_name.values():
        for operand in instruction.operands:
            users[operand].append(instruction.name)
    scoped = {name: operation.scope for name, operation in found.items() if operation.scope != "-"}
    scoped |= {name: i.scope for name, i in by_name.items() if name not in found and i.scope}
    unnamed = [name for name, operation in found.items() if operation.scope == "-"]
    while unnamed:
        # one step further from what has a name each time
        news = {}
        for name in unnamed:
            around = (*by_name[name].operands, *users[name])
            if scope := next((scoped[other] for other in around if scoped.get(other)), None):
                news[name] = scope
        if not news:
            break
        scoped |= news
        unnamed = [name for name in unnamed if name not in news]
    return {name: dataclasses.replace(o, scope=scoped.get(name, "")) for name, o in found.items()}


def _flops(instruction: _Instruction, by_name: dict[str, _Instruction]) -> int:
    """Returns the FLOPs of a matrix product, also of one that a library computes; 0 for anything else."""
    match = _CONTRACTED.search(instruction.line)
    if match is None or instruction.opcode not in ("dot", "custom-call"):
        return 0
    left = by_name[instruction.operands[0]].arrays[0][1]
    contracted = math.prod(left[axis] for axis in _sizes(match[1].replace('"', "")))
    return 2 * math.prod(instruction.arrays[0][1]) * contracted


def _moved(instruction: _Instruction, inside: list[_Instruction], by_name: dict[str, _Instruction]) -> int:
    """Returns the bytes that an operation reads and writes."""
    if instruction.opcode in ("dynamic-slice", "dynamic-update-slice"):
        inside = [instruction]
    updates = [i for i in inside if i.opcode == "dynamic-update-slice"]
    written = sum(by_name[i.operands[1]].size for i in updates) if updates else instruction.size
    read = 0
    parameters = {int(m[1]): i for i in inside if (m := re.search(r" parameter\((\d+)\)", i.line))}
    for number, operand in enumerate(instruction.operands):
        parameter = parameters.get(number)
        name = operand if parameter is None else parameter.name
        uses = [i for i in inside if name in i.operands]
        sliced = uses and all(
            i.opcode in ("dynamic-slice", "dynamic-update-slice") and i.operands[0] == name for i in uses
        )
        if sliced:
            read += sum(i.size for i in uses if i.opcode == "dynamic-slice")
        else:
            read += by_name[operand].size
    return read + written


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def _bits(dtype: str) -> int:
    digits = re.sub(r"\D", "", dtype)
    return int(digits) if digits else 8  # pred
