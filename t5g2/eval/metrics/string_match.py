"""Scores of long-context tasks: the share of expected strings (RULER), the similarity after a prefix (MRCR).

N examples, K numbers of an example.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
from typing_extensions import override

from t5g2.core.bounds import Count, checked
from t5g2.eval.metrics.metric import Contributions, MeanMetric, check_references


class AnswerMetric(MeanMetric):
    """A metric that scores each of an example's answers; their mean is the score of the example."""

    @abc.abstractmethod
    def of_answers(self, output: str, answers: Sequence[str]) -> list[float]:
        """Returns the score of each answer, 0 to 1."""

    @override
    def rows(self, outputs: Sequence[Any], references: Sequence[Sequence[Any]]) -> Contributions:
        check_references(references)
        pairs = zip(outputs, references, strict=True)
        return np.array([[np.mean(self.of_answers(output, answers))] for output, answers in pairs], np.float64)


@dataclass(frozen=True)
class StringMatch(AnswerMetric):
    """Share of the references that the output has in it, in upper or lower case; 0 to 1 (RULER, arXiv 2404.06654).

    All of the references are expected. Of "12" and "Ab" the output "it is 120" has one: 0.5.
    """

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return ("string_match",)

    @override
    def of_answers(self, output: str, answers: Sequence[str]) -> list[float]:
        return [float(answer.lower() in output.lower()) for answer in answers]


@dataclass(frozen=True)
@checked
class PrefixedSimilarity(AnswerMetric):
    """Similarity of output and reference after a prefix that both must begin with; 0 to 1 (OpenAI-MRCR).

    It is the ratio of Python's difflib.SequenceMatcher; an output without the prefix scores 0. With a prefix of two
    characters, "xyabcd" and the reference "xyabce" have 3 of 4 characters in common: 0.75.

    Attributes:
      prefix: number of characters of each reference that are its prefix.
    """

    prefix: Count = 10

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return ("prefixed_similarity",)

    @override
    def of_answers(self, output: str, answers: Sequence[str]) -> list[float]:
        return [self._similarity(output, answer) for answer in answers]

    def _similarity(self, output: str, answer: str) -> float:
        if not output.startswith(answer[: self.prefix]):
            return 0.0
        return SequenceMatcher(None, output[self.prefix :], answer[self.prefix :]).ratio()
