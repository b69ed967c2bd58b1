"""The interface of metrics of outputs: each example contributes a row of numbers, of which scores are made.

N examples, K numbers of an example, M scores, R resamples. Resampling needs the rows alone, so that no text is compared
twice.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from typing_extensions import override

from t5g2.core.errors import UserError

ExampleCounts = Int[np.ndarray, " N"]
Contributions = Float[np.ndarray, "N K"]


class Metric(abc.ABC):
    """A metric of outputs against their references: a frozen dataclass, whose fields are its settings."""

    @property
    @abc.abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the M scores."""

    @abc.abstractmethod
    def rows(self, outputs: Sequence[Any], references: Sequence[Sequence[Any]]) -> Contributions:
        """Returns float64[N, K], the contribution of each example.

        Args:
          outputs: N texts, or numbers where the metric says so.
          references: for each output the references, at least one; the best match counts unless the metric says
            otherwise.

        Raises:
          UserError: the library that computes the metric is not installed; references that it cannot read.
        """

    @abc.abstractmethod
    def scores(self, rows_NK: Contributions, counts_N: ExampleCounts) -> Float[np.ndarray, " M"]:
        """Returns the scores of a corpus that has example n counts_N[n] times; nan where a score is not defined."""

    def resampled(self, rows_NK: Contributions, counts_RN: Int[np.ndarray, "R N"]) -> Float[np.ndarray, "R M"]:
        """Returns the scores of R corpora, each as in `scores`."""
        return np.stack([self.scores(rows_NK, counts_N) for counts_N in counts_RN])

    def of_examples(self, rows_NK: Contributions) -> Float[np.ndarray, "N M"] | None:
        """Returns the scores of each example by itself; None if the metric has none for a single example."""
        return None

    def signature(self, references: Sequence[Sequence[Any]]) -> str:
        """Returns settings and version of the library, within which scores can be compared; "" = nothing to add."""
        return ""


class MeanMetric(Metric):
    """A metric that is the mean of scores of single examples: rows are these scores, K = M.

    Attributes:
      shares: the scores are from 0 to 1.
    """

    shares: bool = True

    @override
    def scores(self, rows_NK: Contributions, counts_N: ExampleCounts) -> Float[np.ndarray, " M"]:
        return self.resampled(rows_NK, counts_N[None])[0]

    @override
    def resampled(self, rows_NK: Contributions, counts_RN: Int[np.ndarray, "R N"]) -> Float[np.ndarray, "R M"]:
        return counts_RN @ rows_NK / counts_RN.sum(axis=1, keepdims=True)

    @override
    def of_examples(self, rows_NK: Contributions) -> Float[np.ndarray, "N M"]:
        return rows_NK


@dataclass(frozen=True)
class NamedMeans(MeanMetric):
    """Means of numbers that a task has computed; the outputs are the rows.

    Attributes:
      columns: names of the M scores.
      shares: the numbers are from 0 to 1.
    """

    columns: tuple[str, ...]
    shares: bool = True

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return self.columns

    @override
    def rows(self, outputs: Sequence[Any], references: Sequence[Sequence[Any]]) -> Contributions:
        return np.array(outputs, np.float64).reshape(-1, len(self.columns))


def check_references(references: Sequence[Sequence[Any]]) -> None:
    """Raises UserError if an example has no reference."""
    for number, several in enumerate(references, start=1):
        if not len(several):
            raise UserError(f"example {number} has no reference; give at least one for each, or leave the example out")
