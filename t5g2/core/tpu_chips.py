"""The kinds of TPU that programs are compiled for: the topologies that there are, memory, clock and links."""

import functools
import math
import re
from typing import NamedTuple

from t5g2.core.errors import UserError, unknown

# all topologies of the flat chips, and the small ones of the others
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


@functools.cache
def _whole_cubes(most: int) -> tuple[str, ...]:
    """Returns the slices of at most so many chips whose sides are multiples of 4, the smaller ones first."""
    sides = range(4, most // 16 + 1, 4)
    sizes = (
        (a, b, c)
        for a in sides
        for b in range(a, math.isqrt(most // a) + 1, 4)
        for c in range(b, most // (a * b) + 1, 4)
    )
    return tuple("x".join(map(str, size)) for size in sorted(sizes, key=lambda size: (math.prod(size), size)))


class Chip(NamedTuple):
    """A kind of TPU.

    Attributes:
      name: in a target, and libtpu's: "v5p".
      kind: jax's `device_kind`, or its beginning.
      hbm_gib: memory of a chip, from the documentation of Google Cloud ("TPU v5p" and so on, System architecture).
      cycles_per_s: clock of the cores. Of v4, v5e and v5p from "How to Scale Your Model"
        (jax-ml.github.io/scaling-book/tpus); with it the fastest products of the compiler's estimates reach 97% of the
        peak on v5e and v5p. Those of v6e and tpu7x are not published: for v6e the one with which they do so too, for
        tpu7x one with which a product of 8192 x 8192 x 8192 reaches 80%, between those of v6e (62%) and v4 (93%).
      link_bytes_per_s: of one link between chips, in one direction (the same book, and chapter 12 of it for tpu7x).
      network_bytes_per_s: that a chip sends to other slices, through its host (that documentation for v5p, v6e and
        tpu7x, the book for v4 and v5e).
      most: chips of the largest slice (documentation of Google Cloud).
      flat: a torus of two axes, which only a side of 16 closes; else of three, which multiples of 4 close.
      devices: that jax has of a chip.
    """

    name: str
    kind: str
    hbm_gib: float
    cycles_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    most: int
    flat: bool
    devices: int = 1

    @property
    def topologies(self) -> tuple[str, ...]:
        """The slices that there are: sides with x between them."""
        return _FLAT if self.flat else (*_CUBES, *_whole_cubes(self.most))

    def links(self, span: tuple[int, ...], slice_: tuple[int, ...]) -> int:
        """Returns the links through which a chip reaches the others of a group.

        Args:
          span: chips of the group along each axis.
          slice_: chips of the slice along each axis.
        """
        closed = 16 if self.flat else 4
        ring = [1 if reach == side and side % closed == 0 else 0 for reach, side in zip(span, slice_, strict=True)]
        return sum(1 + wraps for reach, wraps in zip(span, ring, strict=True) if reach > 1)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 32, 1.05e9, 45e9, 6.25e9, 4096, False),
        Chip("v5e", "TPU v5 lite", 16, 1.5e9, 45e9, 3.125e9, 256, True),
        Chip("v5p", "TPU v5", 95, 1.75e9, 90e9, 6.25e9, 6144, False),
        Chip("v6e", "TPU v6 lite", 32, 1.53e9, 90e9, 12.5e9, 256, True),
        Chip("tpu7x", "TPU7x", 192, 2.2e9, 90e9, 12.5e9, 9216, False, 2),
    )
}


class Target(NamedTuple):
    """A slice of a kind of TPU, "v5p:4x4x4", or several of them.

    Attributes:
      sides: chips of a slice along each axis.
    """

    chip: Chip
    sides: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        return self.topology if self.slices == 1 else f"{self.slices} slices of {self.topology}"

    @property
    def topology(self) -> str:
        """The text of one slice, which is libtpu's name of it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.sides))}"

    @property
    def chips(self) -> int:
        """Number of chips, of all slices."""
        return self.slices * math.prod(self.sides)


def target(text: str) -> Target:
    """Returns the slice of a text such as "v5p:4x4x4".

    Raises:
      UserError: there is no such chip or slice; the message has the nearest.
    """
    name, _, topology = text.partition(":")
    if name not in CHIPS:
        raise unknown("chip", name, CHIPS, where=f"in --target={text}")
    chip = CHIPS[name]
    if topology in chip.topologies:
        return Target(chip, _sides(topology))
    # longer numbers are no sides, and Python neither reads nor divides numbers of any length
    is_sides = re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9}){0,3}", topology)
    numbers = _sides(topology) if is_sides else ()
    chips = math.prod(numbers) if numbers else 4
    nearest = sorted(chip.topologies, key=lambda other: abs(math.log(math.prod(_sides(other)) / max(chips, 1))))[:3]
    given = f"no slice of {chips:,} chips with these sides" if numbers else "slices that are named by their sides"
    raise UserError(
        f"--target={text}: {name} has {given}; the nearest are "
        f"{', '.join(f'{name}:{other}' for other in nearest)}; write CHIP:SIDES, the smaller sides first"
    )


def _sides(topology: str) -> tuple[int, ...]:
    return tuple(int(side) for side in topology.split("x"))
