"""Packing of examples into rows: one set of rows is filled at a time, each row with one example after another.

The next example goes into one of the set's rows with room for it on every side (encoder, decoder, teacher's text); when
none has, the set is closed, and the example is the first of the next set. So a set holds consecutive examples, and a
run is resumed at the number of the first. The policy chooses the row:

    first_fit  the first row with room.
    best_fit   the row whose sides are then filled most evenly: the shares of room left on its sides differ least. Of
               equal rows the one with the least room; of those the first. With only one side this is the usual best
               fit.
    none       a set is one row, and holds one example.

Rows of 8 encoder and 8 decoder tokens; examples (encoder, decoder) a = (6, 2), b = (2, 2), c = (2, 6):

                first_fit                       best_fit
    row 0       a b   left 0 and 4              a c   left 0 and 0
    row 1       c     left 6 and 2              b     left 6 and 6

Best fit by the sum of the room would pack badly: some denoisers put most of a text on the encoder's side, others on the
decoder's, so the sum does not tell which examples still fit into a row. `bench/data.py` measures the padding of all
three.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from t5g2.data.packed_rows import SIDES, Feature, Rows

PackingPolicy = Literal["first_fit", "best_fit", "none"]
# number of the first example of the current set; number of the set's rows returned so far; number of all rows returned
Position = tuple[int, int, int]
START: Position = (0, 0, 0)


class ExampleSequence(Protocol):
    """Examples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, np.ndarray]: ...


class Packer:
    """A set of rows that is being filled.

    Args:
      features: features of a row; an example has the same ones.
      rows: number of rows of the set.
      policy: choice of an example's row.
    """

    def __init__(self, features: Mapping[str, Feature], rows: int, *, policy: PackingPolicy):
        self._features, self._rows, self._policy = features, rows, policy
        # the features whose entries must fit: the sides first, which most often lack room
        self._counted = sorted((n for n, f in features.items() if f.aligned_with is None), key=lambda n: n not in SIDES)
        self._capacity = [features[name].length for name in self._counted]
        sides = [i for i, name in enumerate(self._counted) if name in SIDES and self._capacity[i]]
        self._side_scales = [(i, 1.0 / self._capacity[i]) for i in sides]
        self._padding = {n: np.full((f.length, *f.shape), f.padding, f.dtype) for n, f in features.items()}
        self._clear()

    def _clear(self) -> None:
        self._rooms = [list(self._capacity) for _ in range(self._rows)]
        self._examples: list[list[Mapping[str, np.ndarray]]] = [[] for _ in range(self._rows)]

    def add(self, example: Mapping[str, np.ndarray]) -> bool:
        """Puts an example into a row and returns True; returns False if no row has room for it.

        Raises:
          ValueError: the example is longer than a row.
        """
        lengths = [len(example[name]) for name in self._counted]
        row = self._best_fit(lengths) if self._policy == "best_fit" else self._first_fit(lengths)
        if row is None:
            for name, length, room in zip(self._counted, lengths, self._capacity, strict=True):
                if length > room:
                    raise ValueError(f"an example has {length} of {name!r}, and a row holds {room}")
            return False
        self._rooms[row] = [room - length for room, length in zip(self._rooms[row], lengths, strict=True)]
        self._examples[row].append(example)
        return True

    # both methods run over all rows of the set for every example, so they are plain loops without temporaries

    def _first_fit(self, lengths: Sequence[int]) -> int | None:
        for row, rooms in enumerate(self._rooms):
            for length, room in zip(lengths, rooms, strict=True):
                if length > room:
                    break
            else:
                return row
        return None

    def _best_fit(self, lengths: Sequence[int]) -> int | None:
        best_score, best_row = (2.0, 0.0), None  # above every score: shares are at most 1
        for row, rooms in enumerate(self._rooms):
            for length, room in zip(lengths, rooms, strict=True):
                if length > room:
                    break
            else:
                shares = [(rooms[i] - lengths[i]) * scale for i, scale in self._side_scales]
                score = (max(shares) - min(shares), sum(shares))
                if score < best_score:
                    best_score, best_row = score, row
        return best_row

    def finish(self) -> Rows:
        """Returns the arrays of the rows that hold an example, [rows, length, ...], and empties the set."""
        rows = [examples for examples in self._examples if examples]
        self._clear()
        lengths = {name: [[len(example[name]) for example in row] for row in rows] for name in self._features}
        out: dict[str, np.ndarray] = {}
        for name, feature in self._features.items():
            other = feature.aligned_with
            if other is not None and lengths[name] != lengths[other]:
                raise ValueError(f"an example has different numbers of {name!r} and of {other!r}")
            # one concatenation per feature is faster than one per row: each row's examples, and the padding after them
            padding, parts = self._padding[name], []
            for row, row_lengths in zip(rows, lengths[name], strict=True):
                parts += [*(example[name] for example in row), padding[sum(row_lengths) :]]
            array = np.empty((len(rows) * feature.length, *feature.shape), feature.dtype)
            if len(array):
                np.concatenate(parts, out=array, casting="same_kind")
            out[name] = array.reshape(len(rows), *padding.shape)
            if name in SIDES:
                out |= _segments_and_positions(name, lengths[name], feature.length)
        return out


def _segments_and_positions(name: str, lengths: Sequence[Sequence[int]], room: int) -> dict[str, np.ndarray]:
    """Returns int32[rows, room] each: every token's segment (its example's number, from 1) and its position in it."""
    # each row is a run of equal segments per example, and a run of segment 0 for the padding
    repeats = np.array([n for row in lengths for n in (*row, room - sum(row))], np.int64)
    segments = np.repeat([s for row in lengths for s in (*range(1, len(row) + 1), 0)], repeats).astype(np.int32)
    starts = np.repeat(np.cumsum(repeats) - repeats, repeats)
    positions = np.where(segments, np.arange(len(segments)) - starts, 0).astype(np.int32)
    shape = (len(lengths), room)
    return {f"{name}_segment_ids": segments.reshape(shape), f"{name}_positions": positions.reshape(shape)}


class PackedRows:
    """Iterator over packed rows from a position on; each set's rows are shuffled by the seed.

    The next set is filled while the rows of the current one are returned, a few examples per row, so that every row
    takes about the same time.

    Args:
      features: features of a row.
      rows: number of rows of a set; with the policy "none" a set has 1.
      policy: choice of an example's row.
      seed: seed of the order of a set's rows.
      position: position to resume at.
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
        self._examples, self._seed, self._policy = examples, seed, policy
        self._set_start, self._rows_of_set, self._rows_in_all = map(int, position)
        self._next_example = self._set_start  # the first that is in no set yet
        self._packer = Packer(features, 1 if policy == "none" else rows, policy=policy)
        self._waiting: Mapping[str, np.ndarray] | None = None  # an example without room in the last set
        self._set: Rows | None = None
        self._order: Sequence[int] = ()
        self._examples_ahead = 0  # to put into the next set for each row that is returned

    @property
    def position(self) -> Position:
        """Position after the row that was returned last."""
        return self._set_start, self._rows_of_set, self._rows_in_all

    def __iter__(self) -> "PackedRows":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """Returns the arrays of the next row."""
        if self._set is None:
            self._close_set()
        rows: Any = self._set
        index = self._order[self._rows_of_set]
        row = {name: array[index] for name, array in rows.items()}
        self._rows_of_set += 1
        self._rows_in_all += 1
        if self._rows_of_set == len(self._order):
            self._set_start, self._rows_of_set, self._set = self._set_end, 0, None
        self._fill(self._examples_ahead)
        return row

    def _fill(self, limit: int | None) -> None:
        """Puts up to `limit` examples (None = all that fit) into the set that is being filled."""
        added, last = 0, len(self._examples)
        while added != limit:
            if self._waiting is None:
                if self._next_example == last:
                    return
                self._waiting = self._examples[self._next_example]
            if not self._packer.add(self._waiting):
                return
            self._waiting = None
            self._next_example += 1
            added += 1

    def _close_set(self) -> None:
        """Fills the set and makes its rows the current ones."""
        self._fill(None)
        self._set = self._packer.finish()
        count = len(self._set["decoder"])
        if not count:
            self._set = None
            raise StopIteration
        self._order = range(count)
        if self._policy != "none":
            # seeded by the number of rows before the set, so that a resumed run has the same order
            rng = np.random.default_rng(self._seed + self._rows_in_all - self._rows_of_set)
            self._order = rng.permuted(range(count)).tolist()
        self._set_end = self._next_example
        # the next set takes about as many examples as this one, so it is about full when the last row is returned
        self._examples_ahead = -(-(self._set_end - self._set_start) // count)
