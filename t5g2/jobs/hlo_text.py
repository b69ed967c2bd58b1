"""A reader of HLO text: the computations of a compiled program, their instructions, and the turns of its loops.

The text is that of `compiled.as_text()`, of any platform. Instructions of a scheduled program stand in the order in
which they are executed.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>\S+) = (?P<shape>.*?) (?P<opcode>[a-z][\w-]*)\((?P<rest>.*)", re.DOTALL
)
_BEGIN = re.compile(r"\s+(?:ROOT )?%?\S+ = ")
_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\](?:\{([^{}]*)\})?")
_ALTERNATIVES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.-]+))")
# operations whose result is their operand, somewhere else or in another shape
_SAME = ("bitcast", "copy", "copy-start", "copy-done", "convert", "opt-barrier", "reshape")


@dataclass(frozen=True)
class ResultArray:
    """An array of a result.

    Attributes:
      dtype: HLO's name: f32, bf16, pred, ….
      layout: its axes from the fastest to the slowest, and the tiles that the fastest are stored in: "1,0:T(8,128)".
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def on_device(self) -> bool:
        """True if it stands in the device's memory, and not in one of its core, S(1), or the host's, S(5)."""
        return re.search(r"S\([1-9]", self.layout) is None

    @property
    def size(self) -> int:
        """Bytes, without padding."""
        return self._bits * math.prod(self.shape) // 8

    @property
    def padded_size(self) -> int:
        """Bytes, with those that fill up the last tiles."""
        axes, _, tiles = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        shape = list(self.shape)
        for axis, multiple in zip(sizes(axes), reversed(sizes(tile[1])) if tile else (), strict=False):
            shape[axis] += -shape[axis] % multiple
        return self._bits * math.prod(shape) // 8

    @property
    def _bits(self) -> int:
        digits = re.sub(r"\D", "", self.dtype)
        return int(digits) if digits else 8  # pred


@dataclass(frozen=True)
class Instruction:
    """An instruction.

    Attributes:
      opcode: dot, fusion, while, ….
      arrays: its results: one, or those of a tuple, those of nested tuples in a row.
      operands: names of instructions.
      text: all of it.
      computation: name of the computation that it stands in.
      root: its result is that of the computation.
    """

    name: str
    opcode: str
    arrays: tuple[ResultArray, ...]
    operands: tuple[str, ...]
    text: str
    computation: str
    root: bool

    @property
    def size(self) -> int:
        """Bytes of its results."""
        return sum(array.size for array in self.arrays)

    @property
    def op_name(self) -> str | None:
        """Name of the operation that it was made from; None if the compiler made it."""
        match = re.search(r'op_name="([^"]*)"', self.text)
        return match and match[1]

    @property
    def called(self) -> str | None:
        """The computation that it calls, if it calls one: of a fusion, a call, a reduction, an asynchronous start."""
        match = re.search(r"(?:calls|to_apply|called_computations)=\{?%?([\w.-]+)", self.text)
        return match and match[1]

    @property
    def branches(self) -> tuple[str, ...]:
        """The computations of a conditional, one of which is executed."""
        names = [name for pair in _ALTERNATIVES.findall(self.text) for part in pair for name in part.split(",")]
        return tuple(name.strip().lstrip("%") for name in names if name.strip())

    def attribute(self, name: str) -> str:
        """Returns the computation that an attribute names: the `body` or the `condition` of a loop.

        Raises:
          ValueError: there is no such attribute.
        """
        match = re.search(rf"\b{name}=%?([\w.-]+)", self.text)
        if match is None:
            raise ValueError(f"the instruction {self.name} has no {name}: {self.text[:200]}")
        return match[1]

    def number(self, name: str) -> int | None:
        """Returns a whole number of the compiler's settings of the instruction ("estimated_cycles":"12"), or None."""
        match = re.search(rf'"{name}":"?(\d+)', self.text)
        return int(match[1]) if match else None


@dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
      computations: instructions by computation, in order.
      entry: name of the computation that is executed first.
    """

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """All instructions; their names are unique in a program."""
        return {instruction.name: instruction for part in self.computations.values() for instruction in part}

    def inside(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """Returns the instructions of the computation that an instruction calls; none if it calls none."""
        return self.computations.get(instruction.called or "", ())

    def within(self, fusion: Instruction) -> Iterator[Instruction]:
        """Yields the instructions of a fusion, and of the fusions in it."""
        for instruction in self.inside(fusion) if fusion.opcode == "fusion" else ():
            yield instruction
            yield from self.within(instruction)

    def turns(self, loop: Instruction) -> int | None:
        """Returns how often the body of a `while` is executed; None if it depends on data.

        XLA for CPU writes the number; XLA for TPU leaves a counter that is compared with a constant.
        """
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(match[1])
        condition = self.computations[loop.attribute("condition")]
        compared = [i for part in condition for i in (part, *self.inside(part)) if i.opcode == "compare"]
        if len(compared) != 1 or "direction=LT" not in compared[0].text:
            return None
        counter, limit = (self._origin(name) for name in compared[0].operands)
        index = _element(counter)
        if index is None:
            return None
        start, step = self._initial(loop, index), self._step(loop, index)
        # the limit may be carried through the loop as well
        carried = _element(limit)
        end = _constant(limit) if carried is None else self._initial(loop, carried)
        if start is None or end is None:
            return None
        return max(0, -(-(end - start) // step))

    def _origin(self, name: str) -> Instruction:
        """Returns the instruction that a value comes from unchanged, through copies and parameters of fusions."""
        instruction = self.by_name[name]
        while True:
            if instruction.opcode in _SAME and instruction.operands:
                instruction = self.by_name[instruction.operands[0]]
            elif instruction.opcode == "parameter" and (caller := self._fusions.get(instruction.computation)):
                instruction = self.by_name[caller.operands[int(_argument(instruction))]]
            else:
                return instruction

    @functools.cached_property
    def _fusions(self) -> dict[str, Instruction]:
        return {i.called: i for i in self.by_name.values() if i.opcode == "fusion" and i.called is not None}

    def _initial(self, loop: Instruction, index: int) -> int | None:
        """Returns the constant that an element of a loop's state has at first; None if it is not a constant."""
        state = self._origin(loop.operands[0])
        return _constant(self._origin(state.operands[index])) if state.opcode == "tuple" else None

    def _step(self, loop: Instruction, index: int) -> int:
        """Returns what a turn adds to the counter: 1, unless the compiler has put several turns into one."""
        (root,) = (i for i in self.computations[loop.attribute("body")] if i.root)
        if root.opcode != "tuple":
            return 1
        sum_ = self._origin(root.operands[index])
        if sum_.opcode == "fusion":
            (sum_,) = (i for i in self.inside(sum_) if i.root)
        added = [_constant(self._origin(name)) for name in sum_.operands] if sum_.opcode == "add" else []
        return next((number for number in added if number), 1)


def read(text: str) -> Program:
    """Returns the program of a text.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry = computation = ""
    for lines in _statements(text):
        if not lines[:1].isspace():
            computation = lines.removeprefix("ENTRY ").lstrip("%").split(" ")[0].split("(")[0]
            computations[computation] = []
            entry = computation if lines.startswith("ENTRY ") else entry
        elif match := _INSTRUCTION.match(lines):
            computations[computation].append(_instruction(match, lines, computation))
    if not entry:
        raise ValueError(f"the text is no HLO module: it has no ENTRY computation; it begins {text[:80]!r}")
    return Program({name: tuple(part) for name, part in computations.items()}, entry)


def arrays(shape: str) -> tuple[ResultArray, ...]:
    """Returns the arrays of a shape: `f32[2,3]{1,0:T(8,128)S(1)}`, or a tuple of them."""
    return tuple(ResultArray(dtype, sizes(dims), layout) for dtype, dims, layout in _ARRAY.findall(shape))


def sizes(text: str) -> tuple[int, ...]:
    """Returns the numbers of `2,3`."""
    return tuple(int(size) for size in text.split(",") if size)


def _statements(text: str) -> Iterator[str]:
    """Yields the heads of computations and their instructions, which may have several lines."""
    statement, within = "", False
    for line in text.splitlines():
        begins = within and _BEGIN.match(line)
        ends = line == "}" or line.startswith("}, execution_thread=")
        opens = not within and line.endswith("{") and not line[:1].isspace()
        if (begins or ends or opens) and statement:
            yield statement
            statement = ""
        if begins:
            statement = line
        elif ends:
            within = False
        elif opens:
            within = True
            yield line
        elif statement:
            statement += "\n" + line


def _instruction(match: re.Match[str], text: str, computation: str) -> Instruction:
    operands = tuple(re.findall(r"%([\w.-]+)", _argument_list(match["rest"])))
    root = text.lstrip().startswith("ROOT ")
    return Instruction(match["name"], match["opcode"], arrays(match["shape"]), operands, text, computation, root)


def _argument_list(rest: str) -> str:
    """Returns what stands before the parenthesis that closes the operands, whose types may have parentheses too."""
    depth = 1
    for end, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[:end]
    return rest


def _argument(instruction: Instruction) -> str:
    """Returns what stands in the parentheses of a constant or a parameter."""
    return _argument_list(instruction.text.split(f" {instruction.opcode}(", 1)[1])


def _constant(instruction: Instruction) -> int | None:
    if instruction.opcode != "constant" or instruction.arrays[0].shape:
        return None
    text = _argument(instruction)
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _element(instruction: Instruction) -> int | None:
    """Returns which element of a tuple an instruction is; None if it is none."""
    match = re.search(r"\bindex=(\d+)", instruction.text)
    return int(match[1]) if instruction.opcode == "get-tuple-element" and match else None
