"""The temporary arrays of a scheduled program where they take the most memory, read from its HLO text.

An array is there from the operation that makes it to the last one that reads it. Loops, slices that are updated and
kernels that say so work in place; results of the program take the memory of its arguments. Arrays in a core's own
memory do not count. The compiler places arrays by the same rule, and packs them a little worse.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from t5g2.core import scopes
from t5g2.jobs.hlo_text import Instruction, Program

_UPDATE = ("optimizer", "gradients")  # scopes
_VIEWS = ("bitcast", "opt-barrier", "while")


class LiveMemory(NamedTuple):
    """Bytes of temporary arrays at the fullest moment.

    Attributes:
      total: of all.
      gradients: of gradients of weights, which the optimizer reads.
      kept: of what the forward pass makes and the backward pass reads.
      largest: the largest arrays, as (bytes, name of the operation).
    """

    total: int
    gradients: int
    kept: int
    largest: tuple[tuple[int, str], ...]


@dataclass
class _Buffer:
    """An array that takes memory from the `first` operation to the `last`, by their places in a computation."""

    size: int
    maker: Instruction
    first: int
    last: int
    readers: list[Instruction] = field(default_factory=list)

    @property
    def made_by(self) -> Instruction:
        """Its maker; of memory that is set aside without a name, the first operation with one that uses it."""
        return next((i for i in (self.maker, *self.readers) if i.op_name), self.maker)

    @property
    def is_gradient(self) -> bool:
        """True if the optimizer reads it, and does not make it."""
        return not _is_of(self.made_by, *_UPDATE) and any(_is_of(reader, *_UPDATE) for reader in self.readers)

    @property
    def is_kept(self) -> bool:
        """True if the forward pass makes it and the backward pass reads it; the loss head makes gradients in both."""
        if self.is_gradient or _is_of(self.made_by, "head") or _is_backward(self.made_by):
            return False
        return any(_is_backward(reader) for reader in self.readers)


def at_most(program: Program) -> LiveMemory:
    """Returns the temporary arrays at the moment at which they take the most memory."""
    return _at_most(program, program.entry)


def _at_most(program: Program, computation: str) -> LiveMemory:
    instructions = program.computations[computation]
    buffers = _buffers(program, computation)
    within: Mapping[int, LiveMemory] = {
        time: _at_most(program, i.attribute("body")) for time, i in enumerate(instructions) if i.opcode == "while"
    }
    sizes = [0] * (len(instructions) + 1)
    for buffer in buffers:
        sizes[buffer.first] += buffer.size
        sizes[buffer.last + 1] -= buffer.size
    total, best, moment = 0, -1, 0
    for time in range(len(instructions)):
        total += sizes[time]
        needed = total + (within[time].total if time in within else 0)
        if needed > best:
            best, moment = needed, time
    live = [buffer for buffer in buffers if buffer.first <= moment <= buffer.last]
    inner = within.get(moment, LiveMemory(0, 0, 0, ()))
    largest = sorted([*((b.size, f"{b.maker.name} {b.maker.op_name}") for b in live), *inner.largest], reverse=True)
    return LiveMemory(
        max(best, 0),
        sum(b.size for b in live if b.is_gradient) + inner.gradients,
        sum(b.size for b in live if b.is_kept) + inner.kept,
        tuple(largest[:20]),
    )


def _buffers(program: Program, computation: str) -> list[_Buffer]:
    """Returns the arrays that a computation makes; what it is given, and what it returns, is its caller's."""
    instructions = program.computations[computation]
    buffers: list[_Buffer] = []
    values: dict[str, list[_Buffer | None]] = {}
    for time, instruction in enumerate(instructions):
        read = [values.get(name, [None]) for name in instruction.operands]
        if instruction.opcode == "tuple":
            values[instruction.name] = [buffer for value in read for buffer in value]
            continue
        if instruction.opcode == "get-tuple-element":
            index = int(re.findall(r"\bindex=(\d+)", instruction.text)[-1])
            values[instruction.name] = read[0][index : index + 1] or [None]
            continue
        for buffer in (buffer for value in read for buffer in value if buffer is not None):
            buffer.last = time
            buffer.readers.append(instruction)
        if instruction.opcode in _VIEWS:
            values[instruction.name] = read[0]
        elif instruction.opcode.endswith("-done"):
            values[instruction.name] = [buffer for buffer in read[0] if buffer is not None] or [None]
        else:
            values[instruction.name] = _made(instruction, time, read)
            buffers += [b for b in values[instruction.name] if b is not None and b.first == time]
    # results take the memory of the arguments, or of the state of the loop
    returned = {id(b) for i in instructions if i.root for b in values[i.name]}
    return [buffer for buffer in buffers if id(buffer) not in returned]


def _made(instruction: Instruction, time: int, read: list[list[_Buffer | None]]) -> list[_Buffer | None]:
    """Returns the arrays of an operation's results: new ones, or those of its operands that it changes in place."""
    if instruction.opcode in ("parameter", "constant"):
        return [None] * len(instruction.arrays)
    result: list[_Buffer | None] = [
        _Buffer(array.padded_size, instruction, time, time) if array.on_device else None for array in instruction.arrays
    ]
    if instruction.opcode.endswith("-start"):  # what it reads is among its results, and a semaphore
        copied = instruction.opcode == "copy-start"
        taken = range(1, len(result)) if copied else range(sum(len(value) for value in read))
        return [None if i in taken else buffer for i, buffer in enumerate(result)]
    if instruction.opcode.endswith("-update"):  # what it reads, then its results, then what the start has made
        given, of_start = sum(len(value) for value in read[1:]), len(read[0])
        if not given:
            return read[0]
        return [buffer if given <= i < len(result) - of_start else None for i, buffer in enumerate(result)]
    # numbers of operands, and after them of results, that have the same memory
    for same in re.findall(r'"indices":\[([^\]]*)\]', instruction.text.partition('"aliasing_operands"')[2]):
        places = sorted(int(number) for number in re.findall(r"\d+", same))
        operands = [place for place in places if place < len(read)]
        for place in places[len(operands) :]:
            if operands and place - len(read) < len(result):
                result[place - len(read)] = read[operands[0]][0]
    return result


def _is_of(instruction: Instruction, *parts: str) -> bool:
    return scopes.dotted(instruction.op_name or "").split(".")[0] in parts


def _is_backward(instruction: Instruction) -> bool:
    return "transpose(" in (instruction.op_name or "")
