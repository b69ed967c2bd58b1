"""Bootstrap intervals of scores (Efron 1979): how far a score would move with other examples of the same kind.

Where all examples have the score 0, or all 1, so has every resample; the interval is Clopper and Pearson's then (1934).

N examples, K numbers of an example, M scores, R resamples.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from t5g2.core.seeds import derive_seed
from t5g2.eval.metrics.metric import Contributions, MeanMetric, Metric

RESAMPLES = 1000
TAIL = 0.025  # probability on each side of an interval
# numbers of draws in memory at a time
BLOCK = 1 << 22


class Interval(NamedTuple):
    """A score with its uncertainty.

    Attributes:
      value: the score.
      examples: number of examples that it is of.
      low, high: the 2.5% and 97.5% quantiles of the score over resampled examples; nan if it is defined for none.
    """

    value: float
    examples: int
    low: float
    high: float


def intervals(
    metric: Metric, rows_NK: Contributions, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Interval]:
    """Returns the scores of a metric with 95% intervals, which depend on the rows and the seed alone.

    Examples are drawn with replacement, as many as there are; corpus scores are made anew of what they contribute.
    Resamples for which a score is not defined (an AUC of one class) are left out.

    Args:
      rows_NK: contributions of the examples, as the metric gives them; at least one example.
    """
    number = len(rows_NK)
    values_M = metric.scores(rows_NK, np.ones(number, np.int64))
    samples_RM = np.concatenate(
        [metric.resampled(rows_NK, counts) for counts in _draws(number, resamples, derive_seed(seed, "bootstrap"))]
    )
    result = {}
    for name, value, samples_R in zip(metric.names, values_M.tolist(), samples_RM.T, strict=True):
        defined = samples_R[np.isfinite(samples_R)]
        low, high = np.quantile(defined, [TAIL, 1 - TAIL]).tolist() if len(defined) else (np.nan, np.nan)
        if isinstance(metric, MeanMetric) and metric.shares and low == high == value and value in (0, 1):
            reach = 1 - TAIL ** (1 / number)
            low, high = (0.0, reach) if value == 0 else (1 - reach, 1.0)
        result[name] = Interval(value, number, low, high)
    return result


def _draws(number: int, resamples: int, seed: int) -> Iterator[Int[np.ndarray, "R N"]]:
    """Yields the number of times that each example is drawn, for some resamples at a time."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, max(1, BLOCK // number)):
        rows = min(resamples - start, max(1, BLOCK // number))
        drawn = generator.integers(number, size=(rows, number)) + number * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * number).reshape(rows, number)
