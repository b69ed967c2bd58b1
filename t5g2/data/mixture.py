"""The source of every draw of a stream, by the sources' weights: exact in each period, and found without a table.

Weights are numbers above 0, whole or not: 3 and 1, 0.7 and 0.3, the numbers of examples of each source. A *period* is
sum(weights) draws if all weights are whole; otherwise, the sum of the smallest whole numbers in their ratio, 10 draws
for 0.7 and 0.3. Each period has every source exactly as often as its weight says.

Periods of up to BLOCK_DRAWS draws are shuffled; longer ones are spread evenly, source by source, so that no part of a
period has too much of one.
"""

import abc
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from typing_extensions import override

# longest period that is held in memory as a shuffled list: 6 bytes a draw, in each stream
BLOCK_DRAWS = 1 << 16


def period(weights: Sequence[float]) -> tuple[int, ...]:
    """Returns the number of draws from each source in a period.

    (3, 1) stay as they are, and so do (6, 2); (0.7, 0.3) become (7, 3).
    """
    if all(isinstance(weight, int) for weight in weights):
        return tuple(map(int, weights))
    # of their decimal digits, because the binary value of 0.7 is a ratio of two huge numbers
    ratios = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(ratio.denominator for ratio in ratios))
    whole = [int(ratio * scale) for ratio in ratios]
    return tuple(count // math.gcd(*whole) for count in whole)


class SourceMixture(abc.ABC):
    """The source of each draw of a stream, and the number of earlier draws from that source.

    Args:
      counts: number of draws from each source in a period.
    """

    def __init__(self, counts: Sequence[int], *, seed: int, stream: int):
        self._period, self._seed, self._stream = tuple(counts), seed, stream

    @abc.abstractmethod
    def __getitem__(self, draw: int) -> tuple[int, int]: ...

    @abc.abstractmethod
    def counts(self, draws: int) -> list[int]:
        """Returns the number of the first `draws` draws that each source has."""


class SingleSource(SourceMixture):
    """The mixture of one source."""

    def __getitem__(self, draw: int) -> tuple[int, int]:
        return 0, draw

    @override
    def counts(self, draws: int) -> list[int]:
        return [draws]


class ShuffledMixture(SourceMixture):
    """Periods that are shuffled, each in an order drawn from seed, stream and period.

    With weights (2, 1), period 0 drawn as [0 1 0] and period 1 as [1 0 0]:

        draw                0      1      2      3      4      5
        (source, earlier)  (0,0)  (1,0)  (0,1)  (1,1)  (0,2)  (0,3)
    """

    def __init__(self, counts: Sequence[int], *, seed: int, stream: int):
        super().__init__(counts, seed=seed, stream=stream)
        self._number, self._sources, self._earlier = -1, np.empty(0, np.int32), np.empty(0, np.int32)

    def __getitem__(self, draw: int) -> tuple[int, int]:
        number, place = self._locate(draw)
        source = int(self._sources[place])
        return source, number * self._period[source] + int(self._earlier[place])

    @override
    def counts(self, draws: int) -> list[int]:
        number, place = self._locate(draws)
        within = np.bincount(self._sources[:place], minlength=len(self._period)).tolist()
        return [number * count + more for count, more in zip(self._period, within, strict=True)]

    def _locate(self, draw: int) -> tuple[int, int]:
        """Returns the number of a draw's period, whose order is then held, and the draw's place in it."""
        number, place = divmod(draw, sum(self._period))
        if number != self._number:
            # kept, because the next draws are of this period; its content follows from its number alone
            self._number = number
            self._sources, self._earlier = self._shuffled(number)
        return number, place

    def _shuffled(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns each draw's source, uint16[draws], and the number of earlier draws from it in the period."""
        sources = np.repeat(np.arange(len(self._period)), self._period)
        nth = np.concatenate([np.arange(count, dtype=np.int32) for count in self._period])
        order = np.random.default_rng([self._seed, self._stream, number]).permutation(sources)
        # the sort is stable, so a source's examples keep their order wherever its draws fall
        earlier = np.empty(len(order), np.int32)
        earlier[np.argsort(order, kind="stable")] = nth
        return order.astype(np.uint16), earlier


class SpreadMixture(SourceMixture):
    """Periods in which the draws of each source are spread evenly; neither time nor memory grows with the weights.

    A period lasts one unit of time. The j-th draw of source d, which has w of them in a period, is at the time
    (j + phase) / w, where the phase, between 0 and 1, is drawn from seed, stream and source; the draws are those of all
    sources in the order of their times. So each period has exactly w draws of source d, and the first n draws have its
    share of n, but for less than 1 + sources * share. With weights (3, 1) and phases (0.4, 0.5):

        time    0.13  0.47  0.5  0.8  1.13  1.47  1.5  1.8
        source  0     0     1    0    0     0     1    0
    """

    _UNIT = 1 << 32  # phases are whole numbers of this part of a draw

    def __init__(self, counts: Sequence[int], *, seed: int, stream: int):
        super().__init__(counts, seed=seed, stream=stream)
        rng = np.random.default_rng([seed, stream])
        self._phases = rng.integers(1, self._UNIT, len(self._period), dtype=np.int64).tolist()
        self._seek(0)

    def __getitem__(self, draw: int) -> tuple[int, int]:
        if draw != self._draw:
            self._seek(draw)
        source = self._times[0][1]
        earlier = self._counts[source]
        self._advance()
        return source, earlier

    @override
    def counts(self, draws: int) -> list[int]:
        self._seek(draws)
        return list(self._counts)

    def _seek(self, draw: int) -> None:
        """Makes `draw` the next one, whichever was before."""
        total, sources = sum(self._period), len(self._period)
        # at this time, sources draws early, at most `draw` draws have been; the few that are missing follow one by one
        early = max(draw - sources, 0)
        self._counts = [
            max(0, -((phase * total - early * count * self._UNIT) // (total * self._UNIT)))
            for count, phase in zip(self._period, self._phases, strict=True)
        ]
        self._draw = sum(self._counts)
        self._times = [(self._time(source), source) for source in range(sources)]
        heapq.heapify(self._times)
        while self._draw < draw:
            self._advance()

    def _advance(self) -> None:
        source = self._times[0][1]
        self._counts[source] += 1
        self._draw += 1
        heapq.heapreplace(self._times, (self._time(source), source))

    def _time(self, source: int) -> Fraction:
        """Returns the time of a source's next draw; a fraction, because floats would round large counts."""
        draws = self._counts[source] * self._UNIT + self._phases[source]
        return Fraction(draws, self._period[source] * self._UNIT)


def source_mixture(weights: Sequence[float], *, seed: int, stream: int) -> SourceMixture:
    """Returns the mixture of a stream."""
    counts = period(weights)
    if len(counts) == 1:
        return SingleSource(counts, seed=seed, stream=stream)
    kind = ShuffledMixture if sum(counts) <= BLOCK_DRAWS else SpreadMixture
    return kind(counts, seed=seed, stream=stream)
