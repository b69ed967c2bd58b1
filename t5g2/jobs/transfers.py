"""The collectives of a scheduled TPU program, read from its HLO text: who takes part, and the bytes that each sends.

The compiler has several ways of letting a collective run beside other work. It begins and ends it (`-start`, `-done`),
also in a computation of another unit of the chip; it makes an operation that computes as well of it; and it spreads it
over several such operations, which carry the same `chain_id`. Between slices hosts do the work: a device sends an
array to its host, and receives another one.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from t5g2.core.tpu_chips import Target
from t5g2.jobs.hlo_text import Instruction, Program

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# what the hosts of several slices do, by the compiler's name
_OF_SLICES = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_HOSTS_DO = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
_CHAIN = re.compile(r'\bchain_id="(\d+)"')
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")


@dataclass(frozen=True)
class Transfer:
    """A collective of a program.

    Attributes:
      kind: all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute; " of slices" after it = between
        them.
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

    @property
    def between_slices(self) -> bool:
        """True if it is between slices."""
        return self.kind.endswith(" of slices")


class Network(NamedTuple):
    """The devices of a program in its order, and what connects them.

    Of several slices each has the same program, in which groups of devices are of its own slice.

    Attributes:
      coordinates: int[devices of a slice, axes of the slice].
      link_bytes_per_s: of a device's link to a neighbour, in one direction.
      slices_bytes_per_s: that a device sends to other slices.
    """

    target: Target
    coordinates: np.ndarray
    link_bytes_per_s: float
    slices_bytes_per_s: float

    @classmethod
    def of(cls, target: Target, mesh: Mesh) -> "Network":
        """Returns the network of a mesh of the target's devices, whose outermost part is the slices."""
        axes, devices, chip = len(target.sides), mesh.devices.size // target.slices, target.chip
        coordinates = np.array([device.coords[:axes] for device in mesh.devices.flat[:devices]])
        # where a chip is two devices they share its links, and its host's network
        return cls(target, coordinates, chip.link_bytes_per_s / chip.devices, chip.network_bytes_per_s / chip.devices)

    def links(self, group: np.ndarray) -> int:
        """Returns the links through which a device of a group sends to the others: at least one."""
        span = tuple(len(set(axis)) for axis in self.coordinates[group].T.tolist())
        return max(1, self.target.chip.links(span, self.target.sides))


class Transfers:
    """A reader of the collectives of a program."""

    def __init__(self, program: Program, network: Network):
        self._program, self._network = program, network
        # where hosts of slices exchange arrays, by the name that both sides know: the array that is received
        self._received = {_rendezvous(i): i for i in program.by_name.values() if i.opcode == "recv"}
        self._read: set[str] = set()  # names of collectives

    @property
    def unread(self) -> int:
        """Number of collectives that no call has found."""
        every = {
            i.name
            for i in self._program.by_name.values()
            if i.opcode.removesuffix("-start") in COLLECTIVES or (i.opcode == "send" and _HOSTS_DO.search(i.text))
        }
        return len(every - self._read)

    def collectives(self, instruction: Instruction) -> dict[str, Instruction]:
        """Returns the collectives that an instruction is, or has in it, by name: that of a chain, or of its own.

        What is begun ahead may have it in a computation of another unit of the chip (`async-start`, `call-start`).
        """
        found = [i for i in self._candidates(instruction) if i.opcode.removesuffix("-start") in COLLECTIVES]
        chained = {match[0]: i for i in found if (match := _CHAIN.search(i.text))}
        self._read |= {i.name for i in found if chained or i is found[0]}
        return chained or {i.name: i for i in found[:1]}

    def _candidates(self, instruction: Instruction) -> Iterator[Instruction]:
        yield instruction
        yield from self._program.within(instruction)
        if instruction.opcode.endswith("-start"):
            yield from self._program.inside(instruction)

    def transfer(self, collective: Instruction, instruction: Instruction, scope: str, times: int) -> Transfer | None:
        """Returns what a collective sends, `waited` for whole; None if there is nobody to send to.

        Args:
          instruction: that is executed, and has the collective in it.
        """
        kind = collective.opcode.removesuffix("-start")
        inside = self._program.computations[collective.computation]
        # the compiler's own reduce-scatter is a fusion of an all-reduce and a slice
        if kind == "all-reduce" and collective is not instruction and inside[-1].opcode == "dynamic-slice":
            kind = "reduce-scatter"
        groups = replica_groups(collective.text, len(self._network.coordinates))
        given = sum(self._program.by_name[name].size for name in collective.operands)
        result = collective.size - given if collective.opcode.endswith("-start") else collective.size
        sent = _sent(kind, groups.shape[1], given=given, result=result)
        if not sent or not len(groups):
            return None
        links = 1 if kind == "collective-permute" else self._network.links(groups[0])
        seconds = sent / (links * self._network.link_bytes_per_s)
        return Transfer(kind, groups.shape[1], sent, times, seconds, seconds, scope)

    def between_slices(self, send: Instruction, scope: str, times: int) -> tuple[str, Transfer] | None:
        """Returns the instruction that receives what slices exchange, and what is sent; None if it is not known."""
        match, received = _HOSTS_DO.search(send.text), self._received.get(_rendezvous(send))
        kind = _OF_SLICES.get(match[1]) if match else None
        if kind is None or received is None:
            return None
        self._read.add(send.name)
        slices = self._network.target.slices
        sent = _sent(kind, slices, given=send.arrays[0].size, result=received.arrays[0].size)
        seconds = sent / self._network.slices_bytes_per_s
        return received.name, Transfer(f"{kind} of slices", slices, sent, times, seconds, seconds, scope)


def _rendezvous(transfer: Instruction) -> str:
    """Returns the name by which hosts know an array that is sent or received; "" = they do not."""
    match = _RENDEZVOUS.search(transfer.text)
    return match[1] if match else ""


def _sent(kind: str, group: int, *, given: int, result: int) -> int:
    """Returns the bytes that a device sends in a collective of a group on a ring.

    Args:
      given, result: bytes of the operands and of the results on one device.
    """
    if kind == "collective-permute":
        return given
    whole = {"all-gather": result, "all-reduce": 2 * given}.get(kind, given)
    return whole * (group - 1) // group


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
    if pairs := re.search(r"source_target_pairs=\{((?:\{[\d, ]*\}[, ]*)*)\}", text):
        return np.array([_numbers(pair) for pair in re.findall(r"\{([\d, ]*)\}", pairs[1])]).reshape(-1, 2)
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
