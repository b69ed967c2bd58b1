"""Means, intervals and crossings of literal numbers."""

import math

import pytest

from t5g2.report.statistics import Estimate, estimate, paired, reached, t_point, totals_at


@pytest.mark.parametrize(
    ("freedom", "point"),
    # NIST/SEMATECH e-Handbook of Statistical Methods, table 1.3.6.7.2, column 0.975
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (6, 2.447), (9, 2.262), (29, 2.045), (100, 1.984)],
)
def test_points_of_students_t(freedom, point):
    assert t_point(freedom) == pytest.approx(point, abs=6e-4)


def test_a_mean_and_its_interval():
    """1, 2, 3: standard deviation 1, 4.303 / sqrt(3)."""
    made = estimate([1.0, 2.0, 3.0])
    assert (made.mean, made.n) == (2.0, 3)
    assert made.half == pytest.approx(4.302653 / math.sqrt(3))
    assert estimate([5.0, 5.0]) == Estimate(5.0, 0.0, 2)
    assert estimate([4.0]) == Estimate(4.0, None, 1)
    assert estimate([]) is None
    assert made.text(lambda x: f"{x:.2f}") == "2.00 ± 2.48"
    assert estimate([4.0]).text(str) == "4.0"


def test_differences_by_seed():
    """A change that a seed makes in both is not in the interval; seeds that one of them lacks are left out."""
    made = paired({0: 3.0, 1: 13.0, 2: 23.5, 7: 1.0}, {0: 2.0, 1: 12.0, 2: 22.0, 8: 1.0})
    assert made.mean == pytest.approx(7 / 6)
    assert made.half == pytest.approx(4.3027 * math.sqrt(1 / 12) / math.sqrt(3), rel=1e-4)
    assert paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("target", "x"),
    [
        (5.0, 0.0),  # at once
        (6.0, 0.0),
        (4.0, 50.0),
        (3.0, 100.0),
        (2.5, 150.0),
        (2.0, 200.0),
        (1.9, 333.3333),
        (1.0, None),
    ],
)
def test_where_a_curve_first_reaches_a_value(target, x):
    """It rises between 200 and 300, and comes back."""
    found = reached([0, 100, 200, 300, 400], [5.0, 3.0, 2.0, 2.2, 1.3], target)
    assert found == (None if x is None else pytest.approx(x))


def test_tokens_of_the_steps_that_were_not_logged():
    """A logged step stands for those since the one before, the last also for what follows."""
    assert totals_at([0, 1, 2, 3, 5, 7], {2: 10, 5: 40}) == [0, 10, 20, 60, 140, 220]
    assert totals_at([3], {1: 1, 2: 2, 3: 3}) == [6]
    assert totals_at([0, 1], {}) is None


def test_a_difference_of_rounding_is_none():
    """Two encoders that compute the same at first differ by a float32's last digit, and one is there at once."""
    assert reached([0, 100], [2.6950002, 1.9], 2.6950001) == 0.0
    assert reached([0, 100, 200], [3.0, 2.0000001, 1.0], 2.0) == 100.0
    assert reached([0, 100], [2.7, 1.7], 2.6) == pytest.approx(10.0)


def test_totals_begin_where_another_run_ended():
    """Steps up to `start` count nothing, also where the run has logged one of them."""
    assert totals_at([0, 3, 4, 6, 8], {5: 10, 6: 40}, start=3) == [0, 0, 10, 60, 140]
    assert totals_at([5], {2: 10, 5: 40}, start=3) == [80]
