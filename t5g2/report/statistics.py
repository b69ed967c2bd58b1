"""Means over seeds with their intervals, and the point at which a falling curve first reaches a value.

Every interval is that of a mean over n seeds at 95 %, from Student's t with n - 1 degrees of freedom:

    mean ± t * s / sqrt(n)      s = sqrt(sum((x - mean)^2) / (n - 1))

t is 12.706 for two seeds, 4.303 for three, 3.182 for four. It assumes that the seeds' results are about normal, and
covers what a seed changes: the order of the data and the new weights. One seed has no interval.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

# two runs that compute the same with other shapes differ in a held-out loss by up to 1e-7 of it
ROUNDING = 1e-6


class Estimate(NamedTuple):
    """A mean over n seeds and half the width of its 95 % interval, None for n = 1."""

    mean: float
    half: float | None
    n: int

    def text(self, format_number: Callable[[float], str]) -> str:
        """Returns text, such as "2.224 ± 0.012", with each number formatted by `format_number`."""
        return format_number(self.mean) + ("" if self.half is None else f" ± {format_number(self.half)}")


def estimate(values: Sequence[float]) -> Estimate | None:
    """Returns mean and interval of one value per seed; None if there are no values.

    >>> estimate([1.0, 2.0, 3.0])
    Estimate(mean=2.0, half=2.484165..., n=3)
    """
    n = len(values)
    if n < 2:
        return Estimate(values[0], None, 1) if values else None
    return Estimate(statistics.fmean(values), t_point(n - 1) * statistics.stdev(values) / math.sqrt(n), n)


def paired(values: Mapping[int | None, float], others: Mapping[int | None, float]) -> Estimate | None:
    """Returns mean and interval of `values` - `others` over the seeds that both have; None if they share none.

    Two runs of one seed have read the same batches and the same held-out chunks. What these change in both runs by the
    same amount cancels in the difference, so the interval does not contain it.
    """
    return estimate([values[seed] - others[seed] for seed in values if seed in others])


def t_point(degrees_of_freedom: int) -> float:
    """Returns the 97.5 % point of Student's t."""
    from scipy.special import stdtrit  # scipy comes with jax; imported here because it is slow to import

    return float(stdtrit(degrees_of_freedom, 0.975))


def reached(xs: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """Returns the x at which a curve is first at or below `target`, linear between its points; None = nowhere.

    A value that is above it by no more than float32 computes a mean to counts as at it.

    >>> reached([0, 100, 200], [5.0, 3.0, 2.0], 2.5)
    150.0
    """
    for i, value in enumerate(values):
        if value <= target + ROUNDING * abs(target):
            if i == 0:
                return float(xs[0])
            share = min((values[i - 1] - target) / (values[i - 1] - value), 1.0)
            return xs[i - 1] + share * (xs[i] - xs[i - 1])
    return None


def totals_at(steps: Sequence[int], logged: Mapping[int, float], *, start: int = 0) -> list[float] | None:
    """Returns what a count of each step, such as its tokens, adds up to after `steps` updates; None = none was logged.

    Args:
      logged: {step: count of that step}, for the steps that were logged. The steps between two of them are taken to
        have the count of the later one, so the sum is exact if every step was logged, or the counts are means.
      start: updates that were done before, by another run; they count nothing.

    >>> totals_at([0, 4, 5, 6], {2: 10, 5: 40})
    [0, 100.0, 140.0, 180.0]
    """
    if not logged:
        return None
    marks = sorted(logged)
    totals = []
    for step in steps:
        total, before = 0.0, start
        for mark in marks:
            total += logged[mark] * max(min(step, mark) - before, 0)
            before = max(mark, before)
        # steps after the last mark have as many tokens as it
        totals.append(total + logged[marks[-1]] * max(step - before, 0))
    return totals
