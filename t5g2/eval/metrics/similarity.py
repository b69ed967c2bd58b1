"""Outputs against reference texts: exact match and token F1 as for SQuAD, ROUGE, BLEU, chrF.

N examples, K numbers of an example, M scores, R resamples. Exact match, F1 and ROUGE are shares from 0 to 1; BLEU and
chrF are from 0 to 100, as sacrebleu gives them.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Int
from typing_extensions import override

from t5g2.core.bounds import Bounds, checked
from t5g2.core.errors import unknown
from t5g2.core.optional import require
from t5g2.eval.metrics.metric import Contributions, ExampleCounts, MeanMetric, Metric, check_references

EXTRA = "eval"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(answer: str) -> str:
    """Returns an answer in lower case, without punctuation, articles and superfluous space: "The  cat." -> "cat".

    As SQuAD compares answers (arXiv 1606.05250; evaluate-v1.1.py of the data set).
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def token_f1(output: str, reference: str) -> float:
    """Returns the harmonic mean of precision and recall over the words of two normalized answers, as for SQuAD.

    "the cat sat" and "a black cat": of [cat sat] and [black cat] one word agrees, so 1/2 and 1/2 make 0.5. Of answers
    without any word, two that are both empty agree (evaluate-v2.0.py).
    """
    words, others = normalized(output).split(), normalized(reference).split()
    if not words or not others:
        return float(words == others)
    shared = sum((Counter(words) & Counter(others)).values())
    return 2 * shared / (len(words) + len(others))


def _best(
    compare: Callable[[str, str], float], outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> Float[np.ndarray, "N 1"]:
    """Returns the best score of each output over its references."""
    check_references(references)
    pairs = zip(outputs, references, strict=True)
    return np.array([[max(compare(output, text) for text in several)] for output, several in pairs], np.float64)


@dataclass(frozen=True)
class ExactMatch(MeanMetric):
    """Share of the outputs that equal a reference, both normalized as for SQuAD; 0 to 1."""

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return ("exact_match",)

    @override
    def rows(self, outputs: Sequence[Any], references: Sequence[Sequence[Any]]) -> Contributions:
        return _best(lambda output, text: float(normalized(output) == normalized(text)), outputs, references)


@dataclass(frozen=True)
class TokenF1(MeanMetric):
    """Mean over the examples of the best token F1 of a reference, as for SQuAD; 0 to 1."""

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return ("token_f1",)

    @override
    def rows(self, outputs: Sequence[Any], references: Sequence[Sequence[Any]]) -> Contributions:
        return _best(token_f1, outputs, references)


@dataclass(frozen=True)
class Rouge(MeanMetric):
    """ROUGE-1, -2, -L and -Lsum by rouge-score: mean over the examples of the F-measure, 0 to 1.

    Of several references that with the highest F-measure counts, for each score by itself. ROUGE-Lsum takes every line
    for a sentence. Words are runs of the letters a to z and digits: text in another script has none, and scores 0.

    Attributes:
      stemmer: compare stems of words (Porter's stemmer).
    """

    stemmer: bool = False

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return ("rouge1", "rouge2", "rougeL", "rougeLsum")

    @override
    def signature(self, references: Sequence[Sequence[Any]]) -> str:
        return f"rouge-score {metadata.version('rouge-score')}, stemmer {'yes' if self.stemmer else 'no'}"

    @override
    def rows(self, outputs: Sequence[Any], references: Sequence[Sequence[Any]]) -> Contributions:
        check_references(references)
        scorer = require("rouge_score.rouge_scorer", EXTRA).RougeScorer(self.names, use_stemmer=self.stemmer)
        scores = (scorer.score_multi(several, output) for output, several in zip(outputs, references, strict=True))
        return np.array([[score[name].fmeasure for name in self.names] for score in scores], np.float64)


class _SacrebleuMetric(Metric):
    """A corpus score of sacrebleu, from sums over the examples.

    All examples have as many references as the first, because sacrebleu compares with whole streams of references; of
    examples with fewer, the last one is repeated, which changes no count.
    """

    def _scorer(self) -> Any:
        """Returns sacrebleu's metric."""
        raise NotImplementedError

    @override
    def rows(self, outputs: Sequence[Any], references: Sequence[Sequence[Any]]) -> Contributions:
        check_references(references)
        most = max(map(len, references))
        streams = [[several[min(place, len(several) - 1)] for several in references] for place in range(most)]
        # what sacrebleu sums over a corpus itself, and bootstraps with
        return np.array(self._scorer()._extract_corpus_statistics(list(outputs), streams), np.float64)

    @override
    def scores(self, rows_NK: Contributions, counts_N: ExampleCounts) -> Float[np.ndarray, " M"]:
        return self.resampled(rows_NK, counts_N[None])[0]

    @override
    def resampled(self, rows_NK: Contributions, counts_RN: Int[np.ndarray, "R N"]) -> Float[np.ndarray, "R M"]:
        return self._scores_of(counts_RN @ rows_NK)

    @override
    def of_examples(self, rows_NK: Contributions) -> Float[np.ndarray, "N M"]:
        return self._scores_of(rows_NK)

    def _scores_of(self, sums_RK: Float[np.ndarray, "R K"]) -> Float[np.ndarray, "R M"]:
        scorer = self._scorer()
        sums = (np.rint(row).astype(int).tolist() for row in sums_RK)
        return np.array([[scorer._compute_score_from_stats(row).score] for row in sums], np.float64)

    @override
    def signature(self, references: Sequence[Sequence[Any]]) -> str:
        scorer, numbers = self._scorer(), {len(several) for several in references}
        # as sacrebleu sets it when it has read references; -1 = not everywhere the same
        scorer.num_refs = numbers.pop() if len(numbers) == 1 else -1
        return str(scorer.get_signature())


@dataclass(frozen=True)
class Bleu(_SacrebleuMetric):
    """BLEU of the corpus by sacrebleu, 0 to 100; that of one example is smoothed in the same way.

    Attributes:
      tokenize: sacrebleu's tokenizer: "13a" (its default), "intl", "zh", "char", …
      lowercase: compare in lower case.
    """

    tokenize: str = "13a"
    lowercase: bool = False

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return ("bleu",)

    @override
    def _scorer(self) -> Any:
        return require("sacrebleu", EXTRA).BLEU(tokenize=self.tokenize, lowercase=self.lowercase)

    def check(self) -> None:
        """Raises UserError if sacrebleu has no such tokenizer (nearest name)."""
        names = require("sacrebleu", EXTRA).BLEU.TOKENIZERS
        if self.tokenize not in names:
            raise unknown("tokenizer", self.tokenize, names, where="of bleu")


@dataclass(frozen=True)
@checked
class Chrf(_SacrebleuMetric):
    """chrF of the corpus by sacrebleu, 0 to 100: F-score of character n-grams, which needs no tokenizer.

    Attributes:
      word_order: largest n of word n-grams; 0 = chrF, 2 = chrF++.
    """

    word_order: Annotated[int, Bounds(least=0, most=10)] = 0

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return ("chrf++" if self.word_order == 2 else "chrf",)

    @override
    def _scorer(self) -> Any:
        return require("sacrebleu", EXTRA).CHRF(word_order=self.word_order)
