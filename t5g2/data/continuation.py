"""Streams that go on with other settings: each example that was not trained on comes, once, and no other.

A position counts draws and rows, so with other weights, streams or packing it means other examples. So every source
goes on from its own count instead: the examples that had been put into rows, but whose rows were not returned, come
first, and the draws of the new mixture after them. A stream with weights (3, 1), stopped within a set of rows, goes on
with (1, 3):

    before   rows returned of the set: a0 b0 a2    not yet: a1 a3    draws after the set: a4 b1 a5 …
    after    waiting (a1, a3), following a4 and b1: a1 a3 b1 a4 b2 b3 …
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from t5g2.core.errors import UserError
from t5g2.data.config import DataConfig
from t5g2.data.corpus import Corpus
from t5g2.data.mixture import source_mixture
from t5g2.data.packing import Position
from t5g2.data.streams import Continuation, MakeMixture, StreamDraws, StreamReader


@dataclass(frozen=True)
class StreamPositions:
    """Positions of streams, and the examples that they began with after the last change of settings."""

    positions: Mapping[int, Position]
    continuations: Mapping[int, Continuation] = field(default_factory=dict)

    def first(self) -> tuple[int, ...]:
        """Returns for each source the lowest number that a stream goes on with after its waiting examples."""
        return tuple(map(min, zip(*(following for _, following in self.continuations.values()), strict=True)))

    def to_plain(self) -> dict[str, list[Any]]:
        """Returns the positions as checkpoints hold them: {"0": [8, 6, 14]}, with a continuation
        {"0": [8, 6, 14, [[0, 11], [1, 4]], [96, 32]]}."""
        return {
            str(stream): [*position, *map(_lists, self.continuations.get(stream, ()))]
            for stream, position in self.positions.items()
        }

    @classmethod
    def from_plain(cls, saved: Mapping[Any, Sequence[Any]], *, streams: int) -> "StreamPositions":
        """Returns the positions of a run with this number of streams.

        Raises:
          UserError: they are those of another number of streams, or have another form.
        """
        positions, continuations = {}, {}
        try:
            for key, (first, second, third, *continuation) in saved.items():
                positions[int(key)] = int(first), int(second), int(third)
                if continuation:
                    waiting, following = continuation
                    pairs = tuple((int(source), int(example)) for source, example in waiting)
                    continuations[int(key)] = Continuation(pairs, tuple(map(int, following)))
        except (TypeError, ValueError) as error:
            raise UserError(f"the saved positions of the data have another form ({error}); use another step") from None
        if sorted(positions) != list(range(streams)):
            raise UserError(
                f"the saved positions are of {len(positions)} streams and data.streams is {streams}; set it to the "
                f"number that the run began with, or resume the run with --allow_change=data.streams"
            )
        return cls(positions, continuations)


def _lists(entries: Sequence[Any]) -> list[Any]:
    return [list(entry) if isinstance(entry, tuple) else entry for entry in entries]


@dataclass(frozen=True, eq=False)
class StoppedStreams:
    """All streams of a run as they were saved.

    Attributes:
      config: the data settings that they were read with.
      corpus: the sources, opened with these settings; None if they are not what they were.
      seed: the run's seed.
      streams: the positions.
      make_mixture: the mixture of the version that saved them.
    """

    config: DataConfig
    corpus: Corpus | None
    seed: int
    streams: StreamPositions
    make_mixture: MakeMixture = source_mixture

    def continuation(self, stream: int) -> Continuation:
        """Returns a stream's examples that are not trained on.

        Without the corpus, the rows of a set that is not finished cannot be made again, and the examples begin with the
        set's first.
        """
        position = self.streams.positions[stream]
        arguments: dict[str, Any] = {
            "seed": self.seed,
            "continuation": self.streams.continuations.get(stream),
            "make_mixture": self.make_mixture,
        }
        set_start, rows_of_set, _ = position
        if self.corpus is None or not rows_of_set:
            return StreamDraws(self.config, stream, **arguments).continuation(set_start)
        reader = StreamReader(self.corpus, stream, position=position, **arguments)
        untrained = set()
        while reader.position[1]:  # 0 after the last row of the set
            ids = reader.next()["ids"][:, 0]
            untrained |= set(ids[ids >= 0].tolist())
        sources, set_end = len(self.config.sources), reader.position[0]
        examples = [reader.draws[draw] for draw in range(set_start, set_end)]
        waiting = [(source, k) for source, k in examples if k * sources + source in untrained]
        rest = reader.draws.continuation(set_end)
        return Continuation((*waiting, *rest.waiting), rest.following)

    @property
    def repeated_rows(self) -> int:
        """Number of rows whose examples are trained on again, because the set that they are of is read again."""
        return 0 if self.corpus is not None else sum(rows for _, rows, _ in self.streams.positions.values())


class ContinuedStreams(NamedTuple):
    """Streams under new settings.

    Attributes:
      waiting: number of examples that were in rows which were not returned.
      lost: number of those that are not trained on, because their source is left out.
    """

    streams: StreamPositions
    waiting: int
    lost: int


def continue_streams(
    stopped: StoppedStreams, *, streams: int, sources: Sequence[int | None], source_count: int
) -> ContinuedStreams:
    """Returns all streams of a run under new settings.

    Args:
      streams: number of streams under the new settings.
      sources: for each source of before its number now; None if it is left out.
      source_count: number of sources now; those that are not among `sources` start at their first example.
    """
    before = [stopped.continuation(stream) for stream in range(stopped.config.streams)]
    kept, lost = [], 0
    for stream, (waiting, following) in enumerate(before):
        renumbered = [(sources[source], example) for source, example in waiting]
        known = tuple((source, example) for source, example in renumbered if source is not None)
        lost += len(waiting) - len(known)
        numbers = [stream] * source_count
        for source, example in zip(sources, following, strict=True):
            if source is not None:
                numbers[source] = example
        kept.append(Continuation(known, tuple(numbers)))
    if streams == stopped.config.streams:
        # the number of rows goes on, because it gives the order of a set's rows and the next stream of a group
        positions = {stream: (0, 0, stopped.streams.positions[stream][2]) for stream in range(streams)}
    else:
        kept, positions = _dealt_anew(kept, streams), dict.fromkeys(range(streams), (0, 0, 0))
    continued = StreamPositions(positions, dict(enumerate(kept)))
    return ContinuedStreams(continued, sum(len(waiting) for waiting, _ in kept), lost)


def _dealt_anew(before: Sequence[Continuation], streams: int) -> list[Continuation]:
    """Returns the same examples for another number of streams.

    Streams are not equally far, so of each source, the examples below the first number that no stream has reached are
    dealt out one by one, and the streams divide the rest as they do from a run's start.
    """
    reached = [max(numbers) for numbers in zip(*(following for _, following in before), strict=True)]
    waiting = {example for continuation in before for example in continuation.waiting}
    for _, following in before:
        for source, (first, end) in enumerate(zip(following, reached, strict=True)):
            waiting |= {(source, example) for example in range(first, end, len(before))}
    ordered = sorted(waiting, key=lambda entry: (entry[1], entry[0]))
    return [
        Continuation(tuple(ordered[stream::streams]), tuple(end + stream for end in reached))
        for stream in range(streams)
    ]
