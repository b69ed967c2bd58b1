"""Mixtures: exact in each period, the same from any draw on, of any weights."""

import itertools
import tracemalloc

import numpy as np
import pytest

from t5g2.data.mixture import BLOCK_DRAWS, ShuffledMixture, SpreadMixture, period, source_mixture


def test_the_mixture_of_the_docstring():
    mixture = ShuffledMixture((2, 1), seed=0, stream=0)
    mixture._shuffled = lambda number: np.array([[[0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 1]]][number])
    assert [mixture[i] for i in range(6)] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (0, 3)]


def test_the_spread_mixture_of_the_docstring():
    mixture = SpreadMixture((3, 1), seed=0, stream=0)
    mixture._phases = [mixture._UNIT * 2 // 5, mixture._UNIT // 2]
    mixture._seek(0)
    assert [mixture[i][0] for i in range(8)] == [0, 0, 1, 0, 0, 0, 1, 0]


def test_the_order_of_small_whole_weights_is_that_of_earlier_versions():
    mixture = source_mixture((3, 1), seed=0, stream=1)
    assert [mixture[i][0] for i in range(16)] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ((3, 1), (3, 1)),
        ((6, 2), (6, 2)),  # whole weights stay as they are, whatever they have in common
        ((0.7, 0.3), (7, 3)),
        ((2, 0.5), (4, 1)),
        ((1.0, 2), (1, 2)),
        ((1e-9, 1), (1, 10**9)),
        ((10**18, 3), (10**18, 3)),
    ],
)
def test_periods(weights, counts):
    assert period(weights) == counts


def mixtures():
    return [kind(w, seed=1, stream=2) for kind in (ShuffledMixture, SpreadMixture) for w in WEIGHTS]


WEIGHTS = [(1, 1), (3, 1), (5, 3, 2), (997, 1, 64), (1,) * 9]


@pytest.mark.parametrize("mixture", mixtures(), ids=lambda m: f"{type(m).__name__}-{m._period}")
def test_every_period_has_the_weights_exactly_and_no_example_twice(mixture):
    weights, size = mixture._period, sum(mixture._period)
    draws = [mixture[i] for i in range(size * 5)]
    for number in range(5):
        sources = [source for source, _ in draws[number * size : (number + 1) * size]]
        assert np.bincount(sources, minlength=len(weights)).tolist() == list(weights)
    for source, weight in enumerate(weights):
        assert [n for s, n in draws if s == source] == list(range(5 * weight))


@pytest.mark.parametrize("mixture", mixtures(), ids=lambda m: f"{type(m).__name__}-{m._period}")
def test_draws_and_counts_follow_from_their_number_alone(mixture):
    draws = [mixture[i] for i in range(300)]
    for i in [299, 7, 0, 150, 149, 151]:
        assert mixture[i] == draws[i]
        assert mixture.counts(i) == [sum(s == source for s, _ in draws[:i]) for source in range(len(mixture._period))]


@pytest.mark.parametrize(
    "weights", [(10_000_000, 5_000_001), (0.123456789, 1.0, 2e-7), (36_000_000, 1, 400, 7_500_000)]
)
def test_large_and_fractional_weights_are_exact_over_a_period_and_even_within(weights):
    mixture = source_mixture(weights, seed=0, stream=3)
    counts, total = period(weights), sum(period(weights))
    assert total > BLOCK_DRAWS
    for periods in (1, 3, 10**12):
        assert mixture.counts(periods * total) == [periods * count for count in counts]
    for draws in (1, 100, 12_345, total // 7, 5 * total + 3):
        for drawn, count in zip(mixture.counts(draws), counts, strict=True):
            assert abs(drawn - draws * count / total) < 1 + len(counts) * count / total
    # the order goes on exactly where the counts say, far from the start too
    start = 10**9 * total + total // 3
    before, (source, earlier) = mixture.counts(start), mixture[start]
    assert earlier == before[source]
    after = mixture.counts(start + 1)
    assert [a - b for a, b in zip(after, before, strict=True)] == [int(s == source) for s in range(len(counts))]


def test_memory_is_that_of_the_sources_whatever_the_weights():
    tracemalloc.start()
    mixture = source_mixture((10_000_000_000, 5_000_000_001, 3), seed=0, stream=0)
    for draw in itertools.chain(range(1000), range(10**15, 10**15 + 1000)):
        mixture[draw]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_streams_and_seeds_have_orders_of_their_own():
    for weights in ((3, 3), (10**6, 10**6 + 1)):
        orders = [
            tuple(source_mixture(weights, seed=seed, stream=stream)[i][0] for i in range(60))
            for seed, stream in ((0, 0), (0, 0), (0, 1), (1, 0))
        ]
        assert orders[0] == orders[1]
        # two sources of about equal weights alternate, and which one begins is drawn
        assert len(set(orders)) >= (3 if weights == (3, 3) else 2)
