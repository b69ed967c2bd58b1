"""An estimate of the time of a scheduled TPU program, from the compiler's own estimates in its HLO text.

An operation takes the `estimated_cycles` that the compiler has written beside it, at the clock of the chip; the body of
a loop counts once for each turn. The compiler writes none beside collectives, which are charged the bytes that a device
sends at the speed of its links to the others of its group, or of its host's network to other slices, nor beside kernels
and a few others, which are charged their FLOPs at half of the peak, or their bytes at half of the memory's bandwidth,
whichever is more. Copies between memory and core that are begun ahead cost nothing. A collective that is begun ahead,
or is part of an operation that computes, runs on the links while the core computes; the step waits for what is left of
it.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from t5g2.jobs.hlo_text import Instruction, Program
from t5g2.jobs.kernel_blocks import site_of, visible_pairs
from t5g2.jobs.program_operations import CONTROL, NOTHING, ProgramOperation, operations
from t5g2.jobs.transfers import Network, Transfer, Transfers
from t5g2.models.backends.site import Site

UNESTIMATED = 0.5  # of the peak, or of the bandwidth, that an operation without an estimate is charged
# begun and ended around other work by a unit of their own, or nothing at all; a send between slices ends in a recv-done
_FREE = (*NOTHING, "copy-start", "copy-done", "partition-id", "after-all", "opt-barrier", "recv", "send-done")
_KERNEL = re.compile(r"splash_m[qh]a_(fwd|dq|dkv)")
# matrix products in a kernel of attention: two in the forward pass, five gradients of which two kernels share two
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


class Speeds(NamedTuple):
    """Speeds of one device.

    Attributes:
      flops_per_s: peak of matrix products.
      bytes_per_s: bandwidth of its memory.
      cycles_per_s: clock.
    """

    flops_per_s: float
    bytes_per_s: float
    cycles_per_s: float


@dataclass
class ScheduleCost:
    """Seconds of a step on one device, and what they are for.

    Attributes:
      seconds: of the step.
      estimated: of operations with an estimate of the compiler's.
      kernels: of kernels, which are charged.
      others: of other operations without an estimate, which are charged.
      transfers: the collectives.
      flops: of matrix products by scope, those of kernels included; recomputed ones too.
      by_scope: seconds of the core by scope.
      loops: number of loops whose turns depend on data, and that are counted as one turn.
      uncounted: number of collectives that stand in no operation whose time is known to hold them.
    """

    seconds: float = 0.0
    estimated: float = 0.0
    kernels: float = 0.0
    others: float = 0.0
    transfers: list[Transfer] = field(default_factory=list)
    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    by_scope: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    loops: int = 0
    uncounted: int = 0

    @property
    def waited(self) -> float:
        """Seconds for which the core waits for collectives."""
        return sum(transfer.waited * transfer.times for transfer in self.transfers)

    def add(self, part: "ScheduleCost") -> None:
        """Adds what a part of the step is for; its seconds are on the clock of the step."""
        self.estimated += part.estimated
        self.kernels += part.kernels
        self.others += part.others
        self.transfers += part.transfers
        self.loops += part.loops
        for sums, added in ((self.flops, part.flops), (self.by_scope, part.by_scope)):
            for scope, number in added.items():
                sums[scope] += number


def schedule_cost(
    program: Program, speeds: Speeds, network: Network, sites: Mapping[str, Site] | None = None
) -> ScheduleCost:
    """Returns the cost of a program, which is scheduled: its instructions are in the order of their execution.

    Args:
      sites: the attention of the model by kind of layer; a kernel of an unknown one is charged all its blocks.
    """
    schedule = _Clock(program, operations(program), speeds, Transfers(program, network), sites or {})
    schedule.cost.seconds = schedule.run(program.entry, 1)
    schedule.cost.uncounted = schedule.transfers.unread
    return schedule.cost


class _Clock:
    """Executes a program by the clock."""

    def __init__(
        self,
        program: Program,
        parts: Mapping[str, ProgramOperation],
        speeds: Speeds,
        transfers: Transfers,
        sites: Mapping[str, Site],
    ):
        self.program, self.parts, self.speeds, self.sites = program, parts, speeds, sites
        self.transfers = transfers
        self.cost = ScheduleCost()

    def run(self, computation: str, times: int) -> float:
        """Returns the seconds of one execution of a computation that is executed so often."""
        instructions = [i for i in self.program.computations[computation] if i.opcode not in _FREE]
        # a collective that is spread over several operations ends with the last of them
        last = {name: i.name for i in instructions for name in self.transfers.collectives(i)}
        timeline = _Timeline()
        for instruction in instructions:
            if instruction.opcode in CONTROL:
                timeline.now += self._control(instruction, times)
            elif instruction.opcode == "send" and (exchange := self._exchange(instruction, times)) is not None:
                timeline.begin(*exchange)
            elif instruction.opcode.endswith("-done"):
                self._record(timeline.end(instruction.operands[0]))
            elif instruction.opcode.endswith(("-start", "-update")):
                self._begin(instruction, timeline, times)
            else:
                collectives = self.transfers.collectives(instruction)
                for name in (name for name in collectives if name not in timeline.begun):
                    timeline.begin(name, self._transfer(instruction, name, times))
                timeline.now += self._seconds(instruction, times)
                for name in collectives:
                    if last[name] == instruction.name:
                        self._record(timeline.end(name))
        for name in list(timeline.begun):  # ended where this does not look: no time is better than one too small
            self._record(timeline.end(name))
        return timeline.now

    def _begin(self, instruction: Instruction, timeline: "_Timeline", times: int) -> None:
        """Begins a collective, or goes on with one that has begun, or that lacked its operands until now."""
        before = next(iter(instruction.operands), "")
        if instruction.opcode.endswith("-update") and before in timeline.begun:
            timeline.begun[instruction.name] = timeline.begun.pop(before)
            return
        transfer = timeline.prepared.pop(before, None)
        for name in self.transfers.collectives(instruction):
            transfer = transfer or self._transfer(instruction, name, times)
        if instruction.operands:
            timeline.begin(instruction.name, transfer)
        else:
            timeline.prepared[instruction.name] = transfer

    def _control(self, instruction: Instruction, times: int) -> float:
        """Returns the seconds of a loop, a call, or the longest branch of a conditional."""
        if instruction.opcode == "while":
            turns = self.program.turns(instruction)
            self.cost.loops += turns is None
            turns = 1 if turns is None else turns
            return turns * self.run(instruction.attribute("body"), times * turns)
        if instruction.opcode == "conditional":
            return self._longest(instruction.branches, times)
        return self.run(instruction.called or "", times)

    def _longest(self, branches: Sequence[str], times: int) -> float:
        """Returns the seconds of the longest branch, whose cost alone is added: the program executes one of them."""
        before, costs = self.cost, []
        for branch in branches:
            self.cost = ScheduleCost()
            self.cost.seconds = self.run(branch, times)
            costs.append(self.cost)
        longest, self.cost = max(costs, key=lambda cost: cost.seconds), before
        self.cost.add(longest)
        return longest.seconds

    def _seconds(self, instruction: Instruction, times: int) -> float:
        """Returns the seconds that the core takes for an operation."""
        part, cost = self.parts[instruction.name], self.cost
        kernel = _kernel_flops(instruction, self.program, site_of(part.scope, self.sites))
        flops = part.flops if kernel is None else kernel
        cost.flops[part.scope] += flops * times
        cycles = instruction.number("estimated_cycles")
        if cycles is not None:
            seconds = cycles / self.speeds.cycles_per_s
            cost.estimated += seconds * times
        elif "AllocateBuffer" in instruction.text or self.transfers.collectives(instruction):
            return 0.0
        else:
            moving = part.moved_bytes / self.speeds.bytes_per_s
            seconds = max(flops / self.speeds.flops_per_s, moving) / UNESTIMATED
            cost.kernels += seconds * times if kernel is not None else 0.0
            cost.others += seconds * times if kernel is None else 0.0
        cost.by_scope[part.scope] += seconds * times
        return seconds

    def _transfer(self, instruction: Instruction, name: str, times: int) -> Transfer | None:
        collective = self.transfers.collectives(instruction)[name]
        return self.transfers.transfer(collective, instruction, self._scope(instruction), times)

    def _exchange(self, send: Instruction, times: int) -> tuple[str, Transfer] | None:
        return self.transfers.between_slices(send, self._scope(send), times)

    def _scope(self, instruction: Instruction) -> str:
        return self.parts[instruction.name].scope if instruction.name in self.parts else ""

    def _record(self, transfer: Transfer | None) -> None:
        if transfer is not None:
            self.cost.transfers.append(transfer)


class _Timeline:
    """The time of one execution of a computation: of the core, of the links, and of the network between slices.

    Attributes:
      now: seconds of the core.
      begun: transfers on their way, by the instruction or collective that begins them, with the time of their end.
      prepared: transfers that will begin.
    """

    def __init__(self):
        self.now = 0.0
        self.begun: dict[str, tuple[Transfer, float]] = {}
        self.prepared: dict[str, Transfer | None] = {}
        self._free = {False: 0.0, True: 0.0}  # from when on the links are, and the network between slices

    def begin(self, name: str, transfer: Transfer | None) -> None:
        """Begins a transfer, if there is one, as soon as those before it have ended."""
        if transfer is not None:
            free = max(self.now, self._free[transfer.between_slices]) + transfer.seconds
            self._free[transfer.between_slices] = free
            self.begun[name] = transfer, free

    def end(self, name: str) -> Transfer | None:
        """Waits for a transfer, and returns it with the seconds that it is waited for; None if it has not begun."""
        if name not in self.begun:
            return None
        transfer, end = self.begun.pop(name)
        waited = max(0.0, end - self.now)
        self.now = max(self.now, end)
        return replace(transfer, waited=waited)


def _kernel_flops(instruction: Instruction, program: Program, site: Site | None) -> int | None:
    """Returns the FLOPs of the blocks that a kernel of attention goes through; None for anything else."""
    match = _KERNEL.search(instruction.name)
    if match is None or instruction.opcode != "custom-call":
        return None
    name = "" if match[1] == "fwd" else f"_{match[1]}"
    q_block, k_block = (re.search(rf'\bblock_{side}{name}\\?": (\d+)', instruction.text) for side in ("q", "kv"))
    operands = [program.by_name[operand].arrays[0] for operand in instruction.operands]
    table, queries = operands[0].shape, next(a.shape for a in operands if a.dtype in ("bf16", "f32"))
    if q_block is None or k_block is None or len(table) != 3:
        return None
    block = int(q_block[1]), int(k_block[1])
    if site is not None and site.queries == queries[-2]:
        pairs = visible_pairs(site, *block)
    else:  # the table has a row of blocks for each block of queries or keys, as wide as the longest row
        pairs = table[1] * table[2] * math.prod(block)
    return 2 * math.prod(queries[:-2]) * pairs * queries[-1] * _PRODUCTS[match[1]]
