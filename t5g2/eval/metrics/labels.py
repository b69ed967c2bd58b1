"""Outputs against labels: accuracy, F1, Matthews correlation, Pearson and Spearman correlation, area under the curve.

N examples, K numbers of an example, M scores. Labels are compared as text, without the space around it. Correlations
are of numbers that are written as text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float
from typing_extensions import override

from t5g2.core.bounds import Bounds, checked
from t5g2.core.errors import UserError
from t5g2.core.optional import require
from t5g2.eval.metrics.metric import Contributions, ExampleCounts, MeanMetric, Metric, check_references

EXTRA = "eval"
NO_LABEL = -1  # of an output that is no label of any example


@dataclass(frozen=True)
class Accuracy(MeanMetric):
    """Share of the outputs that are a reference; 0 to 1."""

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return ("accuracy",)

    @override
    def rows(self, outputs: Sequence[Any], references: Sequence[Sequence[Any]]) -> Contributions:
        check_references(references)
        pairs = zip(outputs, references, strict=True)
        return np.array([[_label(output) in map(_label, several)] for output, several in pairs], np.float64)


@dataclass(frozen=True)
class F1(Metric):
    """F1 of a label, or the mean over all labels of the references (macro), by scikit-learn; 0 to 1.

    An output that is no label is wrong, and no label of its own.

    Attributes:
      positive: the label; "" = the mean over all.
    """

    positive: str = ""

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return ("f1",) if self.positive else ("f1_macro",)

    @override
    def rows(self, outputs: Sequence[Any], references: Sequence[Sequence[Any]]) -> Contributions:
        return _label_rows(outputs, references, positive=self.positive)

    @override
    def scores(self, rows_NK: Contributions, counts_N: ExampleCounts) -> Float[np.ndarray, " M"]:
        f1_score = require("sklearn.metrics", EXTRA).f1_score
        output_N, reference_N, weight_N = _counted(rows_NK, counts_N)
        if self.positive:
            average: dict[str, Any] = {"average": "binary", "pos_label": 1}
        else:
            average = {"average": "macro", "labels": np.unique(rows_NK[:, 1].astype(int))}
        # labels that a resample does not have are not in the mean
        score = f1_score(reference_N, output_N, sample_weight=weight_N, zero_division=np.nan, **average)
        return np.array([score], np.float64)


@dataclass(frozen=True)
class Matthews(Metric):
    """Matthews correlation coefficient of two or more labels, by scikit-learn; -1 to 1, and 0 if all labels are one."""

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return ("mcc",)

    @override
    def rows(self, outputs: Sequence[Any], references: Sequence[Sequence[Any]]) -> Contributions:
        return _label_rows(outputs, references)

    @override
    def scores(self, rows_NK: Contributions, counts_N: ExampleCounts) -> Float[np.ndarray, " M"]:
        output_N, reference_N, weight_N = _counted(rows_NK, counts_N)
        if len({*output_N, *reference_N}) < 2:
            return np.zeros(1)
        matthews_corrcoef = require("sklearn.metrics", EXTRA).matthews_corrcoef
        return np.array([matthews_corrcoef(reference_N, output_N, sample_weight=weight_N)], np.float64)


@dataclass(frozen=True)
@checked
class _Correlation(Metric):
    """A correlation of the outputs with the references; nan if either are all alike.

    Attributes:
      not_a_number: value of an output that is no number; T5 takes -1 for STS-B, whose labels are 0 to 5
        (arXiv 1910.10683; t5/data/postprocessors.py, string_to_float).
    """

    not_a_number: Annotated[float, Bounds(least=-1e6, most=1e6)] = -1.0

    @override
    def rows(self, outputs: Sequence[Any], references: Sequence[Sequence[Any]]) -> Contributions:
        texts = _only(references)
        numbers = [_number(text) for text in texts]
        wrong = [place for place, number in enumerate(numbers) if number is None]
        if wrong:
            raise UserError(
                f"the reference of example {wrong[0] + 1} is {str(texts[wrong[0]])[:40]!r}, and {self.names[0]} is of "
                f"numbers; give numbers, or another metric"
            )
        pairs = zip((_number(output) for output in outputs), numbers, strict=True)
        return np.array([[self.not_a_number if output is None else output, number] for output, number in pairs], float)

    def _of(
        self, correlation: Callable[..., Any], rows_NK: Contributions, counts_N: ExampleCounts
    ) -> Float[np.ndarray, " M"]:
        output_N, reference_N = np.repeat(rows_NK, counts_N, axis=0).T
        is_defined = len(output_N) > 1 and np.ptp(output_N) > 0 and np.ptp(reference_N) > 0
        return np.array([correlation(output_N, reference_N).statistic if is_defined else np.nan], np.float64)


@dataclass(frozen=True)
class Pearson(_Correlation):
    """Pearson's correlation of numbers, by scipy; -1 to 1."""

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return ("pearson",)

    @override
    def scores(self, rows_NK: Contributions, counts_N: ExampleCounts) -> Float[np.ndarray, " M"]:
        from scipy import stats

        return self._of(stats.pearsonr, rows_NK, counts_N)


@dataclass(frozen=True)
class Spearman(_Correlation):
    """Spearman's rank correlation of numbers, by scipy; -1 to 1."""

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return ("spearman",)

    @override
    def scores(self, rows_NK: Contributions, counts_N: ExampleCounts) -> Float[np.ndarray, " M"]:
        from scipy import stats

        return self._of(stats.spearmanr, rows_NK, counts_N)


@dataclass(frozen=True)
class RocAuc(Metric):
    """Area under the ROC curve, by scikit-learn: the share of pairs of a positive and a negative example in which the
    output of the positive one is higher, ties one half; 0 to 1, nan unless there are both. Outputs are numbers.

    Attributes:
      positive: the label of positive examples; all others are negative.
    """

    positive: str = "1"

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return ("auc",)

    @override
    def rows(self, outputs: Sequence[Any], references: Sequence[Sequence[Any]]) -> Contributions:
        numbers = [_number(output) for output in outputs]
        if None in numbers:
            place = numbers.index(None)
            raise UserError(
                f"the output of example {place + 1} is {str(outputs[place])[:40]!r}, and auc ranks numbers, such as a "
                f"task of choices gives; take another metric"
            )
        positive_N = [float(_label(text) == self.positive) for text in _only(references)]
        return np.array([*zip(numbers, positive_N, strict=True)], np.float64).reshape(-1, 2)

    @override
    def scores(self, rows_NK: Contributions, counts_N: ExampleCounts) -> Float[np.ndarray, " M"]:
        drawn = rows_NK[counts_N > 0]
        if len(np.unique(drawn[:, 1])) < 2:
            return np.array([np.nan])
        roc_auc_score = require("sklearn.metrics", EXTRA).roc_auc_score
        return np.array([roc_auc_score(drawn[:, 1], drawn[:, 0], sample_weight=counts_N[counts_N > 0])], np.float64)


OF_LABELS, OF_NUMBERS = (Accuracy, F1, Matthews, RocAuc), (Pearson, Spearman)


def _label(value: Any) -> str:
    return str(value).strip()


def _number(value: Any) -> float | None:
    """Returns the finite number that a text spells, None if it spells none."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def _only(references: Sequence[Sequence[Any]]) -> list[Any]:
    """Returns the one reference of each example; raises UserError if an example has none, or several."""
    check_references(references)
    for number, several in enumerate(references, start=1):
        if len({_label(value) for value in several}) > 1:
            raise UserError(
                f"example {number} has {len(several)} references, and this metric compares with one; give one label "
                f"for each example, or take accuracy"
            )
    return [several[0] for several in references]


def _label_rows(outputs: Sequence[Any], references: Sequence[Sequence[Any]], *, positive: str = "") -> Contributions:
    """Returns float64[N, 2]: the numbers of the output and of the reference; 1 and 0 if one label is positive.

    Outputs ["cat", "dog", "?"] and references ["cat", "cat", "dog"]: [[0 0] [1 0] [-1 1]], and with positive = "cat"
    [[1 1] [0 1] [0 0]].
    """
    texts, answers = [_label(value) for value in _only(references)], [_label(value) for value in outputs]
    if positive:
        pairs = [(answer == positive, text == positive) for answer, text in zip(answers, texts, strict=True)]
    else:
        numbers = {label: number for number, label in enumerate(sorted(set(texts)))}
        pairs = [(numbers.get(answer, NO_LABEL), numbers[text]) for answer, text in zip(answers, texts, strict=True)]
    return np.array(pairs, np.float64).reshape(-1, 2)


def _counted(rows_NK: Contributions, counts_N: ExampleCounts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the different pairs of output and reference, and how often each occurs: few, however many examples."""
    pairs, inverse_N = np.unique(rows_NK.astype(int), axis=0, return_inverse=True)
    weights = np.bincount(inverse_N.ravel(), counts_N, minlength=len(pairs))
    present = weights > 0
    return pairs[present, 0], pairs[present, 1], weights[present]
