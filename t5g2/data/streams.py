"""Virtual streams: an order of the data that depends only on the seed, not on the number of processes.

    each source:  chunks -> shuffle -> repeat -> example k = f(chunk, k) -> every streams-th example, from s on
    stream s:     its part of each source -> mix -> pack

Every epoch is shuffled anew. Streams have different examples of a source, so an epoch has each chunk once. The mix is
exact in each period of the weights (mixture.py). The position of a stream is three integers; after a change of settings
there are also the examples that it began with (continuation.py).

With B rows in the global batch: if B >= streams, row r comes from stream r // (B / streams). Otherwise, with g =
streams / B, row r of batch n comes from stream r * g + n mod g, so that all streams are read in turn. In both cases, a
*group* is max(B / streams, 1) rows and the max(g, 1) streams that fill them.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from t5g2.core.seeds import derive_seed
from t5g2.data import packed_rows
from t5g2.data.config import DataConfig
from t5g2.data.corpus import Corpus
from t5g2.data.examples import source_examples
from t5g2.data.mixture import SourceMixture, source_mixture
from t5g2.data.packing import START, ExampleSequence, PackedRows, Position


class Continuation(NamedTuple):
    """The examples of a stream after a change of settings (data/continuation.py), by their numbers in the sources.

    Attributes:
      waiting: (source, example) of examples that were in rows which were not returned; they come first.
      following: for each source the number of the stream's next example.
    """

    waiting: tuple[tuple[int, int], ...]
    following: tuple[int, ...]


# returns the mixture of a stream
MakeMixture = Callable[..., SourceMixture]


class StreamDraws:
    """The source and the example of each draw of a stream.

    Args:
      seed: the run's seed.
      continuation: the stream's first examples, if it goes on after a change of settings; None = the start.
    """

    def __init__(
        self,
        config: DataConfig,
        stream: int,
        *,
        seed: int,
        continuation: Continuation | None = None,
        make_mixture: MakeMixture = source_mixture,
    ):
        weights = [source.weight for source in config.sources]
        self._streams, self._mixture = (
            config.streams,
            make_mixture(weights, seed=derive_seed(seed, "mix"), stream=stream),
        )
        # stream s of S has the examples s, s + S, s + 2 S, … of each source
        self._start = continuation or Continuation((), (stream,) * len(weights))

    def __getitem__(self, draw: int) -> tuple[int, int]:
        """Returns a draw's source, and the number of its example in the source."""
        waiting, following = self._start
        if draw < len(waiting):
            return waiting[draw]
        source, earlier = self._mixture[draw - len(waiting)]
        return source, following[source] + earlier * self._streams

    def continuation(self, draw: int) -> Continuation:
        """Returns the stream's examples from a draw on, whatever the mixture of the draws after it."""
        waiting, following = self._start
        counts = self._mixture.counts(max(draw - len(waiting), 0))
        numbers = (first + count * self._streams for first, count in zip(following, counts, strict=True))
        return Continuation(waiting[draw:], tuple(numbers))


class StreamExamples:
    """The examples of a stream in the order of its draws: its part of each source, mixed."""

    def __init__(self, corpus: Corpus, draws: StreamDraws, *, seed: int):
        self._draws = draws
        self._sources = [source_examples(corpus, source, seed=seed) for source in range(len(corpus.config.sources))]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, draw: int) -> dict[str, np.ndarray]:
        source, example = self._draws[draw]
        return self._sources[source][example]


def pack_rows(examples: ExampleSequence, config: DataConfig, *, seed: int, position: Position = START) -> PackedRows:
    """Returns the rows of examples, packed by the config."""
    return PackedRows(
        examples,
        packed_rows.row_features(config),
        rows=config.packing_rows,
        policy=config.packing,
        seed=seed,
        position=position,
    )


class StreamReader:
    """The rows of one stream, from a position on; `arguments` are those of StreamDraws.

    Attributes:
      draws: the draws of the stream.
    """

    def __init__(self, corpus: Corpus, stream: int, *, seed: int, position: Position = START, **arguments: Any):
        self.stream = stream
        self.draws = StreamDraws(corpus.config, stream, seed=seed, **arguments)
        examples = StreamExamples(corpus, self.draws, seed=seed)
        self._rows = pack_rows(examples, corpus.config, seed=derive_seed(seed, "rows", stream), position=position)

    @property
    def position(self) -> Position:
        """Position after the row that was returned last."""
        return self._rows.position

    def next(self) -> dict[str, np.ndarray]:
        """Returns the arrays of the next row."""
        return next(self._rows)


@dataclass(frozen=True)
class StreamAssignment:
    """Assignment of streams to the rows of the global batch, by groups.

    Attributes:
      rows: number of rows of the global batch; it divides streams, or streams divides it.
    """

    rows: int
    streams: int

    @property
    def groups(self) -> int:
        """Number of groups."""
        return min(self.rows, self.streams)

    @property
    def rows_per_group(self) -> int:
        """Number of rows that a group fills."""
        return self.rows // self.groups

    def rows_of(self, group: int) -> range:
        """Returns the rows of the global batch that a group fills."""
        return range(group * self.rows_per_group, (group + 1) * self.rows_per_group)

    def streams_of(self, group: int) -> range:
        """Returns the streams that a group reads in turn."""
        count = self.streams // self.groups
        return range(group * count, (group + 1) * count)

    def groups_with(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Returns the groups that fill these rows, in order; each may fill other rows too."""
        return tuple(sorted({row // self.rows_per_group for row in rows}))


class StreamGroupReader:
    """The rows of some groups, batch by batch."""

    def __init__(
        self,
        corpus: Corpus,
        groups: Sequence[int],
        *,
        seed: int,
        positions: Mapping[int, Position] | None = None,
        continuations: Mapping[int, Continuation] | None = None,
    ):
        self._corpus = corpus
        positions, continuations = positions or {}, continuations or {}
        assignment = StreamAssignment(corpus.config.rows, corpus.config.streams)
        self._rows_per_group = assignment.rows_per_group

        def reader(stream: int) -> StreamReader:
            position, continuation = positions.get(stream, START), continuations.get(stream)
            return StreamReader(corpus, stream, seed=seed, position=position, continuation=continuation)

        self._groups = [[reader(stream) for stream in assignment.streams_of(group)] for group in groups]

    def next(self) -> dict[str, np.ndarray]:
        """Returns the arrays of this batch's rows, in the order of the groups, with "streams" and "positions"."""
        rows, streams, positions = [], [], []
        for readers in self._groups:
            # the number of rows that a group's streams have returned tells the next stream, after a resume too
            rows_returned = sum(reader.position[2] for reader in readers)
            reader = readers[rows_returned // self._rows_per_group % len(readers)]
            for _ in range(self._rows_per_group):
                rows.append(reader.next())
                streams.append(reader.stream)
                positions.append(reader.position)
        # images are decoded last, for whole rows: packing moves only their keys
        stacked = self._corpus.with_images({name: np.stack([row[name] for row in rows]) for name in rows[0]})
        return {**stacked, "streams": np.array(streams, np.int32), "positions": np.array(positions, np.int64)}

    def close(self) -> None:
        """Does nothing: no file is held open."""
