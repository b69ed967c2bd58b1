"""Means over seeds with their intervals, and where a falling curve first reaches a value.

Every interval is that of a mean over n seeds at 95 %, from Student's t with n - 1 degrees of freedom:

    mean ± t * s / sqrt(n)      s = sqrt(sum((x - mean)^2) / (n - 1))

t is 12.706 for two seeds, 4.303 for three, 3.182 for four. It assumes that the seeds' results are about normal, and
speaks of what the seeds change, which is the order of the data and the new weights. One seed has no interval.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

# the 97.5 % points of Student's t with 1 to 5 degrees of freedom (NIST/SEMATECH e-Handbook, table 1.3.6.7.2)
T_POINTS = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706)


class Estimate(NamedTuple):
    """A mean over n seeds and half the width of its 95 % interval, None for n = 1."""

    mean: float
    half: float | None
    n: int

    def text(self, spell: Callable[[float], str]) -> str:
        """ "2.224 ± 0.012", each number spelled by `spell`."""
        return spell(self.mean) + ("" if self.half is None else f" ± {spell(self.half)}")


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and interval of one value a seed; None of no values.

    >>> estimate([1.0, 2.0, 3.0])
    Estimate(mean=2.0, half=2.484165..., n=3)
    """
    n = len(values)
    if n < 2:
        return Estimate(values[0], None, 1) if values else None
    return Estimate(statistics.fmean(values), t_point(n - 1) * statistics.stdev(values) / math.sqrt(n), n)


def paired(values: Mapping[int | None, float], others: Mapping[int | None, float]) -> Estimate | None:
    """Mean and interval of `values` - `others` over the seeds that both have; None if they share none.

    Two runs of one seed have read the same batches and the same held-out chunks, so what those change in both alike is
    not in the interval.
    """
    return estimate([values[seed] - others[seed] for seed in values if seed in others])


def t_point(freedom: int) -> float:
    """The 97.5 % point of Student's t: from the table, beyond it from the series in 1 / freedom.

    The series is 26.7.5 of Abramowitz and Stegun, Handbook of Mathematical Functions; its error is below 2e-4 there.
    """
    if freedom <= len(T_POINTS):
        return T_POINTS[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def reached(xs: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """The x at which a curve is first at or below `target`, linear between its points; None = nowhere.

    >>> reached([0, 100, 200], [5.0, 3.0, 2.0], 2.5)
    150.0
    """
    for i, value in enumerate(values):
        if value <= target:
            if i == 0:
                return float(xs[0])
            share = (values[i - 1] - target) / (values[i - 1] - value)
            return xs[i - 1] + share * (xs[i] - xs[i - 1])
    return None


def tokens_at(steps: Sequence[int], logged: Mapping[int, float]) -> list[float] | None:
    """Tokens trained on after each of `steps` updates; None where none were logged.

    Args:
      logged: {step: tokens of that step's batch}, of the steps that were logged. Each stands for the steps since the
        one before, so that the sum is exact if every step is logged, and else as good as the batches are alike.

    >>> tokens_at([0, 4, 5, 6], {2: 10, 5: 40})
    [0, 100.0, 140.0, 180.0]
    """
    if not logged:
        return None
    marks = sorted(logged)
    totals = []
    for step in steps:
        total, before = 0.0, 0
        for mark in marks:
            total += logged[mark] * max(min(step, mark) - before, 0)
            before = mark
        totals.append(total + logged[marks[-1]] * max(step - before, 0))
    return totals
