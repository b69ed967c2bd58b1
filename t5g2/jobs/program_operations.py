"""The operations of a compiled program, read from its HLO text: the named scope, FLOPs and bytes of each.

Counted are the FLOPs of matrix products, two for each multiply-add, and the bytes that an operation reads and writes if
nothing stays in a cache. Of an array that is only sliced, or updated in place, the slice counts. A number is of one
execution: an operation in a loop is executed as often as the loop turns.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from t5g2.core import scopes
from t5g2.jobs import hlo_text
from t5g2.jobs.hlo_text import Instruction, Program

_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
# operations that read a part of their first operand; those that change a part of it in place, and which operand that is
_SLICES = ("dynamic-slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
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


def operations(program: str | Program) -> dict[str, ProgramOperation]:
    """Returns the operations of a program by name, those in loops included, from it or from `compiled.as_text()`."""
    program = hlo_text.read(program) if isinstance(program, str) else program
    by_name = program.by_name
    # what a fusion or a reduction computes is part of it
    parts = {i.called for i in by_name.values() if i.called and i.opcode not in CONTROL}
    executed = [i for i in by_name.values() if i.computation not in parts and i.opcode not in (*NOTHING, *CONTROL)]
    found = {}
    for instruction in executed:
        inside = program.inside(instruction) if instruction.opcode == "fusion" else ()
        products = [(_flops(part, by_name), part) for part in (instruction, *program.within(instruction))]
        found[instruction.name] = ProgramOperation(
            instruction.name,
            instruction.opcode,
            _scope(instruction, products),
            sum(flops for flops, _ in products),
            _moved(instruction, inside, by_name),
        )
    return _with_neighbours(found, by_name)


def scope_of(instruction: Instruction) -> str | None:
    """Returns the dotted scopes of an instruction; None if XLA gave it no name."""
    return None if instruction.op_name is None else scopes.dotted(instruction.op_name)


def _scope(instruction: Instruction, products: list[tuple[int, Instruction]]) -> str:
    """Returns the scope of its largest matrix product, or else of its result; "-" if XLA left no name."""
    flops, largest = max(products, key=lambda product: product[0])
    scope = scope_of(largest) if flops else None
    scope = scope_of(instruction) if scope is None else scope
    return "-" if scope is None else scope


def _with_neighbours(
    found: dict[str, ProgramOperation], by_name: Mapping[str, Instruction]
) -> dict[str, ProgramOperation]:
    """Returns the operations with a scope for those that XLA made without a name: that of what they read or feed."""
    users = defaultdict(list)
    for instruction in by_name.values():
        for operand in instruction.operands:
            users[operand].append(instruction.name)
    scoped = {name: operation.scope for name, operation in found.items() if operation.scope != "-"}
    scoped |= {name: scope for name, i in by_name.items() if name not in found and (scope := scope_of(i))}
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


def _flops(instruction: Instruction, by_name: Mapping[str, Instruction]) -> int:
    """Returns the FLOPs of a matrix product, also of one that a library computes; 0 for anything else."""
    if instruction.opcode == "convolution":  # XLA for TPU has no dot
        return _convolution_flops(instruction, by_name)
    match = _CONTRACTED.search(instruction.text)
    if match is None or instruction.opcode not in ("dot", "custom-call"):
        return 0
    left = by_name[instruction.operands[0]].arrays[0].shape
    contracted = math.prod(left[axis] for axis in hlo_text.sizes(match[1].replace('"', "")))
    return 2 * math.prod(instruction.arrays[0].shape) * contracted


def _convolution_flops(instruction: Instruction, by_name: Mapping[str, Instruction]) -> int:
    """Returns the FLOPs of a convolution: of a matrix product as well, whose other axes are spatial ones.

    A spatial axis of the result is one of both operands (a batch), of one of them, or that of a true convolution, where
    the operand is longer than the window; an axis of both operands alone is summed over.
    """
    match = _LABELS.search(instruction.text)
    if match is None:
        return 0
    left, right, out = (
        dict(zip(labels, by_name[name].arrays[0].shape, strict=True))
        for labels, name in zip(match.groups(), (*instruction.operands, instruction.name), strict=True)
    )
    summed = right["i"]
    for axis in (label for label in out if label.isdigit()):
        window, positions = right[axis], out[axis]
        if positions == 1 or left[axis] not in (1, window):
            summed *= window
    return 2 * math.prod(out.values()) * summed


def _moved(instruction: Instruction, inside: tuple[Instruction, ...], by_name: Mapping[str, Instruction]) -> int:
    """Returns the bytes that an operation reads and writes."""
    if instruction.opcode in (*_SLICES, *_UPDATES):
        inside = (instruction,)
    updates = [i for i in inside if i.opcode in _UPDATES]
    written = sum(by_name[i.operands[_UPDATES[i.opcode]]].size for i in updates) if updates else instruction.size
    read = 0
    parameters = {int(m[1]): i for i in inside if (m := re.search(r" parameter\((\d+)\)", i.text))}
    for number, operand in enumerate(instruction.operands):
        parameter = parameters.get(number)
        name = operand if parameter is None else parameter.name
        uses = [i for i in inside if name in i.operands]
        sliced = uses and all(i.opcode in (*_SLICES, *_UPDATES) and i.operands[0] == name for i in uses)
        if sliced:
            read += sum(i.size for i in uses if i.opcode in _SLICES)
        else:
            read += by_name[operand].size
    return read + written
