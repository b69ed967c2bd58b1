"""Virtual streams: an order of the data that depends only on the seed, not on the number of processes.

    each source:  chunks -> shuffle -> repeat -> example k = f(chunk, k) -> every streams-th example, from s on
    stream s:     its part of each source -> mix -> pack

Every epoch is shuffled anew. Streams have different examples of a source, so an epoch has each chunk once. The mix is
exact in each block of sum(weights) draws; the order in a block follows from seed, stream and block. The position of a
stream is three integers.

With B rows in the global batch: if B >= streams, row r comes from stream r // (B / streams). Otherwise, with g =
streams / B, row r of batch n comes from stream r * g + n mod g, so that all streams are read in turn. In both cases, a
*group* is max(B / streams, 1) rows and the max(g, 1) streams that fill them.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from t5g2.core.seeds import derive_seed
from t5g2.data import packed_rows
from t5g2.data.config import DataConfig
from t5g2.data.corpus import Corpus
from t5g2.data.examples import source_examples
from t5g2.data.packing import START, ExampleSequence, PackedRows, Position


class SourceMixture:
    """The source of each draw of a stream, and the number of the example in the stream's part of that source.

    Of each block of sum(weights) draws, weights[d] come from source d, in an order drawn from seed, stream and block.
    With weights (2, 1), block 0 drawn as [0 1 0] and block 1 as [1 0 0]:

        draw                0      1      2      3      4      5
        (source, example)  (0,0)  (1,0)  (0,1)  (1,1)  (0,2)  (0,3)
    """

    def __init__(self, weights: Sequence[int], *, seed: int, stream: int):
        self._weights, self._seed, self._stream = tuple(weights), seed, stream
        self._block, self._order = -1, np.empty((0, 2), np.int64)

    def __getitem__(self, index: int) -> tuple[int, int]:
        block, draw = divmod(index, sum(self._weights))
        if block != self._block:
            # Kept, because the next draws are of this block; its content follows from its number alone.
            self._block, self._order = block, self._draw(block)
        source, nth = self._order[draw].tolist()
        return source, block * self._weights[source] + nth

    def _draw(self, block: int) -> np.ndarray:
        """Returns int64[draws, 2]: each draw's source, and the number of earlier draws from it in the block."""
        sources = np.repeat(np.arange(len(self._weights)), self._weights)
        nth = np.concatenate([np.arange(weight) for weight in self._weights])
        rng = np.random.default_rng([self._seed, self._stream, block])
        order = np.empty((len(sources), 2), np.int64)
        # The sort is stable, so a source's examples keep their order wherever its draws fall.
        order[np.argsort(rng.permutation(sources), kind="stable")] = np.stack([sources, nth], axis=1)
        return order


class StreamExamples:
    """The examples of a stream in the order of its draws: its part of each source, mixed."""

    def __init__(self, corpus: Corpus, stream: int, *, seed: int):
        config = corpus.config
        self._stream, self._streams = stream, config.streams
        self._sources = [source_examples(corpus, source, seed=seed) for source in range(len(config.sources))]
        weights = [source.weight for source in config.sources]
        self._mixture = SourceMixture(weights, seed=derive_seed(seed, "mix"), stream=stream)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, draw: int) -> dict[str, np.ndarray]:
        source, nth = self._mixture[draw] if len(self._sources) > 1 else (0, draw)
        # Stream s of S has the examples s, s + S, s + 2 S, … of each source.
        return self._sources[source][self._stream + nth * self._streams]


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
    """The rows of one stream, from a position on."""

    def __init__(self, corpus: Corpus, stream: int, *, seed: int, position: Position = START):
        self.stream = stream
        examples = StreamExamples(corpus, stream, seed=seed)
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

    def groups_with(self, rows: range) -> range:
        """Returns the groups that fill these rows; the first and the last may fill other rows too."""
        return range(rows.start // self.rows_per_group, -(-rows.stop // self.rows_per_group))


class StreamGroupReader:
    """The rows of some groups, batch by batch."""

    def __init__(
        self, corpus: Corpus, groups: Sequence[int], *, seed: int, positions: Mapping[int, Position] | None = None
    ):
        self._corpus = corpus
        assignment = StreamAssignment(corpus.config.rows, corpus.config.streams)
        self._rows_per_group = assignment.rows_per_group
        self._groups: list[list[StreamReader]] = []
        for group in groups:
            streams = assignment.streams_of(group)
            starts = {stream: START if positions is None else positions[stream] for stream in streams}
            self._groups.append([StreamReader(corpus, s, seed=seed, position=starts[s]) for s in streams])

    def next(self) -> dict[str, np.ndarray]:
        """Returns the arrays of this batch's rows, in the order of the groups, with "streams" and "positions"."""
        rows, streams, positions = [], [], []
        for readers in self._groups:
            # The number of rows that a group's streams have returned tells the next stream, after a resume too.
            rows_returned = sum(reader.position[2] for reader in readers)
            reader = readers[rows_returned // self._rows_per_group % len(readers)]
            for _ in range(self._rows_per_group):
                rows.append(reader.next())
                streams.append(reader.stream)
                positions.append(reader.position)
        # Images are decoded last, for whole rows: packing moves only their keys.
        stacked = self._corpus.with_images({name: np.stack([row[name] for row in rows]) for name in rows[0]})
        return {**stacked, "streams": np.array(streams, np.int32), "positions": np.array(positions, np.int64)}

    def close(self) -> None:
        """Does nothing: no file is held open."""
