"""Examples into rows: a set of rows is filled at a time, each row with examples that lie side by side in it.

The next example goes into one of the set's rows with room for it on every side; when none has, the set is closed, and
the example begins the next one. So a set holds examples that follow each other, and where a run stands is said by the
first of them. Which row it is:

    first_fit  the first with room.
    best_fit   the one whose sides are then filled most alike: the difference of the shares that are left of encoder and
               decoder (and of the teacher's text) is least; of equal ones the one with the least room, the first of
               those. With one side alone this is best fit as it is known.
    none       a set is one row, and holds one example.

Rows of 8 encoder and 8 decoder tokens; examples (encoder, decoder) a = (6, 2), b = (2, 2), c = (2, 6):

                first_fit                       best_fit
    row 0       a b   left 0 and 4              a c   left 0 and 0
    row 1       c     left 6 and 2              b     left 6 and 6

With a span corruption that leaves most of a text to the encoder and another that takes most of it away, which row has
least room in sum says nothing about what fits into it; `bench/data.py` has the shares of padding of all three.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from t5g2.data.packed_rows import SIDES, Feature, Rows

PackingPolicy = Literal["first_fit", "best_fit", "none"]
# Examples drawn when the rows being given out were begun; how many of those rows are given out; rows given out in all.
Position = tuple[int, int, int]
START: Position = (0, 0, 0)


class ExampleSequence(Protocol):
    """Examples by number, as the packer takes them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, np.ndarray]: ...


class Packer:
    """A set of rows that is being filled.

    Args:
      layout: the features of a row. An example has each of them, and as many of any feature that lies `beside` another
        as of that one.
      rows: of the set.
      rule: which row an example goes to.
    """

    def __init__(self, features: Mapping[str, Feature], rows: int, *, policy: PackingPolicy):
        self._layout, self._rows, self._rule = features, rows, policy
        # what an example takes of a row: the sides first, then what there is a number of
        self._counted = sorted((n for n, f in features.items() if f.aligned_with is None), key=lambda n: n not in SIDES)
        self._room = [features[name].length for name in self._counted]
        sides = [i for i, name in enumerate(self._counted) if name in SIDES and self._room[i]]
        self._parts = [(i, 1.0 / self._room[i]) for i in sides]
        self._padding = {n: np.full((f.length, *f.shape), f.padding, f.dtype) for n, f in features.items()}
        self._clear()

    def _clear(self) -> None:
        self._rooms = [list(self._room) for _ in range(self._rows)]
        self._held: list[list[Mapping[str, np.ndarray]]] = [[] for _ in range(self._rows)]

    def add(self, example: Mapping[str, np.ndarray]) -> bool:
        """Puts an example into a row; False if none has room for it, and nothing is done.

        Raises:
          ValueError: it is longer than a row.
        """
        takes = [len(example[name]) for name in self._counted]
        row = self._first(takes) if self._rule != "best_fit" else self._best(takes)
        if row is None:
            for name, length, room in zip(self._counted, takes, self._room, strict=True):
                if length > room:
                    raise ValueError(f"an example has {length} of {name!r}, and a row holds {room}")
            return False
        self._rooms[row] = [room - length for room, length in zip(self._rooms[row], takes, strict=True)]
        self._held[row].append(example)
        return True

    def _first(self, takes: Sequence[int]) -> int | None:
        for row, rooms in enumerate(self._rooms):
            for length, room in zip(takes, rooms, strict=True):
                if length > room:
                    break
            else:
                return row
        return None

    def _best(self, takes: Sequence[int]) -> int | None:
        best, found = (2.0, 0.0), None
        for row, rooms in enumerate(self._rooms):
            for length, room in zip(takes, rooms, strict=True):
                if length > room:
                    break
            else:
                left = [(rooms[i] - takes[i]) * part for i, part in self._parts]
                score = (max(left) - min(left), sum(left))
                if score < best:
                    best, found = score, row
        return found

    def finish(self) -> Rows:
        """The arrays of the rows that hold an example, [rows, length, ...]; the set is empty again."""
        held = [examples for examples in self._held if examples]
        self._clear()
        lengths = {name: [[len(example[name]) for example in row] for row in held] for name in self._layout}
        out: dict[str, np.ndarray] = {}
        for name, feature in self._layout.items():
            beside = feature.aligned_with
            if beside is not None and lengths[name] != lengths[beside]:
                raise ValueError(f"an example has not as many of {name!r} as of {beside!r}")
            padding, parts = self._padding[name], []
            for row, taken in zip(held, lengths[name], strict=True):
                parts += [*(example[name] for example in row), padding[sum(taken) :]]
            array = np.empty((len(held) * feature.length, *feature.shape), feature.dtype)
            if len(array):
                np.concatenate(parts, out=array, casting="same_kind")
            out[name] = array.reshape(len(held), *padding.shape)
            if name in SIDES:
                out |= _segments_and_positions(name, lengths[name], feature.length)
        return out


def _segments_and_positions(name: str, lengths: Sequence[Sequence[int]], room: int) -> dict[str, np.ndarray]:
    """int32[rows, room] each: which example of its row every token is of (from 1 on), and where it stands there."""
    repeats = np.array([n for row in lengths for n in (*row, room - sum(row))], np.int64)
    segments = np.repeat([s for row in lengths for s in (*range(1, len(row) + 1), 0)], repeats).astype(np.int32)
    starts = np.repeat(np.cumsum(repeats) - repeats, repeats)
    positions = np.where(segments, np.arange(len(segments)) - starts, 0).astype(np.int32)
    shape = (len(lengths), room)
    return {f"{name}_segment_ids": segments.reshape(shape), f"{name}_positions": positions.reshape(shape)}


class PackedRows:
    """The rows of examples, one by one, from a position on; a set's rows come in an order drawn from the seed.

    The next set is begun while the rows of this one are given out, some examples a row, so that every row costs alike.

    Args:
      layout: the features of a row.
      rows: of a set; 1 if the rule is "none".
      rule: which row an example goes to.
      seed: of the order of the rows.
    """

    def __init__(
        self,
        examples: ExampleSequence,
        features: Mapping[str, Feature],
        *,
        rows: int,
        policy: PackingPolicy,
        seed: int,
        position: Position = START,
    ):
        self._examples, self._seed, self._rule = examples, seed, policy
        self._begun, self._given, self._count = map(int, position)
        self._drawn = self._begun  # examples that are in a set
        self._packer = Packer(features, 1 if policy == "none" else rows, policy=policy)
        self._waiting: Mapping[str, np.ndarray] | None = None  # drawn, and without room in the last set
        self._set: Rows | None = None
        self._order: Sequence[int] = ()
        self._share = 0  # examples to draw ahead with each row

    @property
    def position(self) -> Position:
        """Where to go on."""
        return self._begun, self._given, self._count

    def __iter__(self) -> "PackedRows":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The arrays of the next row."""
        if self._set is None:
            self._close()
        rows: Any = self._set
        at = self._order[self._given]
        row = {name: array[at] for name, array in rows.items()}
        self._given += 1
        self._count += 1
        if self._given == len(self._order):
            self._begun, self._given, self._set = self._end, 0, None
        self._fill(self._share)
        return row

    def _fill(self, examples: int | None) -> bool:
        """Draws so many examples into the set, all that it holds if None; whether it is full."""
        drawn, last = 0, len(self._examples)
        while drawn != examples:
            if self._waiting is None:
                if self._drawn == last:
                    return True
                self._waiting = self._examples[self._drawn]
            if not self._packer.add(self._waiting):
                return True
            self._waiting = None
            self._drawn += 1
            drawn += 1
        return False

    def _close(self) -> None:
        """Makes the rows of the set that is being filled."""
        self._fill(None)
        self._set = self._packer.finish()
        count = len(self._set["decoder"])
        if not count:
            self._set = None
            raise StopIteration
        self._order = range(count)
        if self._rule != "none":
            # the seed of a set follows from how many rows came before it
            rng = np.random.default_rng(self._seed + self._count - self._given)
            self._order = rng.permuted(range(count)).tolist()
        self._end = self._drawn
        self._share = -(-(self._end - self._begun) // count)
