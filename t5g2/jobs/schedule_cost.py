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

import numpy as np
from jax.sharding import Mesh

from t5g2.core.tpu_chips import Target
from t5g2.jobs.hlo_text import Instruction, Program
from t5g2.jobs.kernel_blocks import site_of, visible_pairs
from t5g2.jobs.program_operations import CONTROL, NOTHING, ProgramOperation, operations
from t5g2.models.backends.site import Site

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
UNESTIMATED = 0.5  # of the peak, or of the bandwidth, that an operation without an estimate is charged
# begun and ended around other work by a unit of their own, or nothing at all; a send between slices ends in a recv-done
_FREE = (*NOTHING, "copy-start", "copy-done", "partition-id", "after-all", "opt-barrier", "recv", "send-done")
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_KERNEL = re.compile(r"splash_m[qh]a_(fwd|dq|dkv)")
# what hosts of several slices do with the arrays that their devices send and receive, by the compiler's name
_BETWEEN_SLICES = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_HOSTS_OPERATION = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
# matrix products in a kernel of attention: two in the forward pass, five gradients of which two kernels share two
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


class Speeds(NamedTuple):
    """Speeds of one device.

    Attributes:
      flops_per_s: peak of matrix products.
      bytes_per_s: bandwidth of its memory.
      cycles_per_s: clock.
      link_bytes_per_s: of a link to a neighbour, in one direction.
      network_bytes_per_s: to other slices.
    """

    flops_per_s: float
    bytes_per_s: float
    cycles_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float


@dataclass(frozen=True)
class Transfer:
    """A collective of a program.

    Attributes:
      kind: all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute, with " of slices" after it if it is
        between them.
      group: devices that take part together, or slices.
      sent: bytes that a device sends, in one execution.
      times: executions in a step.
      seconds: of one execution on the links.
      waited: seconds of one execution for which the core waits.
      scope: part of the model, dotted.
    """

    kind: str
    group: int
    sent: int
    times: int
    seconds: float
    waited: float
    scope: str

    @property
    def overlapped(self) -> bool:
        """True if the core does other work for most of it."""
        return self.waited < self.seconds / 2


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


class Network(NamedTuple):
    """The devices of a program in its order, and the slice that they are in, which may be one of several.

    Of several each has the same program, in which groups of devices are of its own slice.
    """

    target: Target
    coordinates: np.ndarray  # int[devices of a slice, axes of the slice]

    @classmethod
    def of(cls, target: Target, mesh: Mesh) -> "Network":
        """Returns the network of a mesh of the target's devices, whose outermost part is the slices."""
        axes, devices = len(target.sides), mesh.devices.size // target.slices
        return cls(target, np.array([device.coords[:axes] for device in mesh.devices.flat[:devices]]))

    def links(self, group: np.ndarray) -> int:
        """Returns the links through which a device of a group sends to the others: at least one."""
        span = tuple(len(set(axis)) for axis in self.coordinates[group].T.tolist())
        return max(1, self.target.chip.links(span, self.target.sides))


def schedule_cost(
    program: Program, speeds: Speeds, network: Network, sites: Mapping[str, Site] | None = None
) -> ScheduleCost:
    """Returns the cost of a program, which is scheduled: its instructions are in the order of their execution.

    Args:
      sites: the attention of the model by kind of layer; a kernel of an unknown one is charged all its blocks.
    """
    schedule = _Clock(program, operations(program), speeds, network, sites or {})
    schedule.cost.seconds = schedule.run(program.entry, 1)
    collectives = {
        i.name
        for i in program.by_name.values()
        if i.opcode.removesuffix("-start") in COLLECTIVES or (i.opcode == "send" and _HOSTS_OPERATION.search(i.text))
    }
    schedule.cost.uncounted = len(collectives - schedule.counted)
    return schedule.cost


class _Clock:
    """Executes a program by the clock."""

    def __init__(
        self,
        program: Program,
        parts: Mapping[str, ProgramOperation],
        speeds: Speeds,
        network: Network,
        sites: Mapping[str, Site],
    ):
        self.program, self.parts, self.speeds, self.network, self.sites = program, parts, speeds, network, sites
        self.cost = ScheduleCost()
        self.counted: set[str] = set()  # names of collectives
        # where hosts of several slices exchange arrays, by the name that both sides know: the one that is received
        self._received = {_rendezvous(i): i for i in program.by_name.values() if i.opcode == "recv"}

    def run(self, computation: str, times: int) -> float:
        """Returns the seconds of one execution of a computation that is executed so often."""
        now = links_free = network_free = 0.0
        begun: dict[str, tuple[Transfer, float]] = {}  # with the time of its end
        prepared: dict[str, Transfer] = {}  # begun without operands, which an update gives
        for instruction in self.program.computations[computation]:
            if instruction.opcode in _FREE:
                continue
            if instruction.opcode in CONTROL:
                now += self._control(instruction, times)
            elif instruction.opcode == "send" and (transfer := self._between_slices(instruction, times)) is not None:
                network_free = max(now, network_free) + transfer.seconds
                begun[self._received[_rendezvous(instruction)].name] = transfer, network_free
            elif instruction.opcode.endswith("-done"):
                transfer, end = begun.pop(instruction.operands[0], (None, now))
                self._record(transfer, end - now)
                now = max(now, end)
            elif instruction.opcode.endswith("-update") and instruction.operands[0] in begun:
                begun[instruction.name] = begun.pop(instruction.operands[0])
            elif instruction.opcode.endswith(("-start", "-update")):
                transfer = prepared.pop(next(iter(instruction.operands), ""), None)
                transfer = transfer or self._transfer(instruction, times)
                if transfer is not None and instruction.operands:
                    links_free = max(now, links_free) + transfer.seconds
                    begun[instruction.name] = transfer, links_free
                elif transfer is not None:
                    prepared[instruction.name] = transfer
            else:
                transfer, seconds = self._transfer(instruction, times), self._seconds(instruction, times)
                if transfer is not None:  # beside what the same operation computes
                    links_free = max(now, links_free) + transfer.seconds
                    self._record(transfer, links_free - now - seconds)
                    seconds = max(seconds, links_free - now)
                now += seconds
        return now

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
        elif "AllocateBuffer" in instruction.text or self._collective(instruction) is not None:
            return 0.0
        else:
            moving = part.moved_bytes / self.speeds.bytes_per_s
            seconds = max(flops / self.speeds.flops_per_s, moving) / UNESTIMATED
            cost.kernels += seconds * times if kernel is not None else 0.0
            cost.others += seconds * times if kernel is None else 0.0
        cost.by_scope[part.scope] += seconds * times
        return seconds

    def _collective(self, instruction: Instruction) -> Instruction | None:
        """Returns the collective that an instruction is, or has in it; None if there is none.

        What is begun ahead may have it in a computation of another unit of the chip (`async-start`, `call-start`).
        """
        inside = self.program.inside(instruction) if instruction.opcode.endswith("-start") else ()
        candidates = (instruction, *self.program.within(instruction), *inside)
        return next((i for i in candidates if i.opcode.removesuffix("-start") in COLLECTIVES), None)

    def _transfer(self, instruction: Instruction, times: int) -> Transfer | None:
        """Returns the collective of an instruction, `waited` for whole; None if it has none, or nobody to send to."""
        collective = self._collective(instruction)
        if collective is None:
            return None
        self.counted.add(collective.name)
        kind = collective.opcode.removesuffix("-start")
        inside = self.program.computations[collective.computation]
        # the compiler's own reduce-scatter is a fusion of an all-reduce and a slice
        if kind == "all-reduce" and collective is not instruction and inside[-1].opcode == "dynamic-slice":
            kind = "reduce-scatter"
        groups = replica_groups(collective.text, len(self.network.coordinates))
        given = sum(self.program.by_name[name].size for name in collective.operands)
        result = collective.size - given if collective.opcode.endswith("-start") else collective.size
        sent = _sent(kind, groups.shape[1], given=given, result=result)
        if not sent:
            return None
        links = 1 if kind == "collective-permute" else self.network.links(groups[0])
        seconds = sent / (links * self.speeds.link_bytes_per_s)
        scope = self.parts[instruction.name].scope if instruction.name in self.parts else ""
        return Transfer(kind, groups.shape[1], sent, times, seconds, seconds, scope)

    def _between_slices(self, send: Instruction, times: int) -> Transfer | None:
        """Returns the collective between slices that begins with a send; None if it is none that is known."""
        operation, received = _HOSTS_OPERATION.search(send.text), self._received.get(_rendezvous(send))
        kind = _BETWEEN_SLICES.get(operation[1]) if operation else None
        if kind is None or received is None:
            return None
        self.counted.add(send.name)
        slices = self.network.target.slices
        sent = _sent(kind, slices, given=send.arrays[0].size, result=received.arrays[0].size)
        seconds = sent / self.speeds.network_bytes_per_s
        scope = self.parts[send.name].scope if send.name in self.parts else ""
        return Transfer(f"{kind} of slices", slices, sent, times, seconds, seconds, scope)

    def _record(self, transfer: Transfer | None, waited: float) -> None:
        if transfer is not None:
            self.cost.transfers.append(replace(transfer, waited=max(0.0, waited)))


def _sent(kind: str, group: int, *, given: int, result: int) -> int:
    """Returns the bytes that a device sends in a collective of a group on a ring.

    Args:
      given, result: bytes of the operands and of the results on one device.
    """
    if kind == "collective-permute":
        return given
    whole = {"all-gather": result, "all-reduce": 2 * given}.get(kind, given)
    return whole * (group - 1) // group


def _rendezvous(transfer: Instruction) -> str:
    """Returns the name by which hosts know an array that is sent or received; "" = they do not."""
    match = _RENDEZVOUS.search(transfer.text)
    return match[1] if match else ""


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


def replica_groups(text: str, devices: int) -> np.ndarray:
    """Returns the groups of a collective, int[groups, devices of a group].

    >>> replica_groups("replica_groups={{0,1},{2,3}}", 4).tolist()
    [[0, 1], [2, 3]]
    >>> replica_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4).tolist()
    [[0, 2], [1, 3]]
    >>> replica_groups("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", 4).tolist()
    [[0, 2], [1, 3]]

    Raises:
      ValueError: they are written in another way.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", text):
        return np.array([_numbers(pair) for pair in re.findall(r"\{([\d, ]*)\}", pairs[1])])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", text):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        within = re.findall(r"'([^']+)'", mesh[3])
        listed = _IOTA.search(mesh[2])
        if ":" not in mesh[3] and (listed or not mesh[2].strip()):
            ids = np.arange(math.prod(axes.values())) if listed is None else _iota(listed[0])
            order = [list(axes).index(name) for name in (*(name for name in axes if name not in within), *within)]
            grouped = math.prod(axes[name] for name in within)
            return ids.reshape(tuple(axes.values())).transpose(order).reshape(-1, grouped)
    if iota := re.search(rf"replica_groups=({_IOTA.pattern})", text):
        return _iota(iota[1])
    if listed := re.search(r"replica_groups=\{([\d,{} ]*)\}", text):
        groups = [_numbers(group) for group in re.findall(r"\{([\d, ]*)\}", listed[1])]
        return np.array(groups or [list(range(devices))])
    raise ValueError(f"a collective has groups of devices that are not known: {text[:400]}")


def _iota(text: str) -> np.ndarray:
    """Returns the array that `[2,2]<=[4]`, `[2,2]<=[2,2]T(1,0)` or `[2,2]T(1,0)`, of the same shape, stands for."""
    match = _IOTA.fullmatch(text)
    assert match is not None
    shape, from_, order = (None if part is None else _numbers(part) for part in match.groups())
    from_ = from_ or shape
    assert from_ is not None
    numbers = np.arange(math.prod(from_)).reshape(from_).transpose(order)
    return numbers if match[2] is None else numbers.reshape(shape)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number.strip()]
