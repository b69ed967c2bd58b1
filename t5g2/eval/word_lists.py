"""RULER's common and frequent words (arXiv 2404.06654, appendix B; prompts and numbers as in its repository)."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from scipy.special import zeta
from typing_extensions import override

from t5g2.core.bounds import Bounds, Size, checked
from t5g2.eval.haystack import vocabulary
from t5g2.eval.long_context import Cell, LongContextTask, LongExample

CODED_LETTERS = 6
FREQUENT = 3
# a word of the vocabulary for so many tokens of the length
TOKENS_PER_WORD = 50


@dataclass(frozen=True, kw_only=True)
@checked
class CommonWords(LongContextTask):
    """Asks for the words of a numbered list that are in it more often than the others, after a solved example.

    The words are those of the text. From 4096 tokens on, common words are there 30 times and the others 3 times (10 and
    3 of 40 words in the solved example); below, 6 times and once (3 and 1 of 20 words). One cell for each length.

    Attributes:
      common: number of common words.
    """

    name: str = "common_words"
    common: Annotated[int, Bounds(least=1, most=20)] = 10
    max_new_tokens: Size = 120

    @property
    @override
    def has_depths(self) -> bool:
        return False

    @property
    @override
    def least(self) -> int:
        return self.common

    @override
    def compose(self, size: int, cell: Cell, words: Sequence[str]) -> LongExample:
        draw = cell.draw()
        is_long = cell.length >= 4096
        solved_size, *solved_repeats = (40, 10, 3) if is_long else (20, 3, 1)
        chosen = vocabulary(words, solved_size + size, draw=draw)
        solved, answers = self._list(chosen[:solved_size], solved_repeats, draw)
        own, expected = self._list(chosen[solved_size:], (30, 3) if is_long else (6, 1), draw)
        return LongExample(f"{solved} {_numbered(answers)}\n{own}", tuple(expected))

    def _list(
        self, words: Sequence[str], repeats: Sequence[int], draw: np.random.Generator
    ) -> tuple[str, Sequence[str]]:
        often, seldom = repeats
        common = words[: self.common]
        items = [*common] * often + [*words[self.common :]] * seldom
        context = _numbered([items[place] for place in draw.permutation(len(items)).tolist()])
        prompt = (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{context}\nQuestion: What are the {self.common} most common words in the above "
            f"list? Answer: The top {self.common} words that appear most often in the list are:"
        )
        return prompt, common


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


@dataclass(frozen=True, kw_only=True)
@checked
class FrequentWords(LongContextTask):
    """Asks for the three most frequent of coded words whose frequencies are Zipf's: rank k has k^-alpha / zeta(alpha).

    A word is six letters that are drawn, there is one for every 50 tokens of the length, and the first rank is "...",
    which does not count. One cell for each length; no text is needed.

    Attributes:
      alpha: exponent of the frequencies.
    """

    name: str = "frequent_words"
    alpha: Annotated[float, Bounds(least=1.1, most=4)] = 2.0
    max_new_tokens: Size = 50

    @property
    @override
    def needs_text(self) -> bool:
        return False

    @property
    @override
    def has_depths(self) -> bool:
        return False

    @property
    @override
    def least(self) -> int:
        # below, the last word that is asked for may be no more frequent than the next one
        last = FREQUENT + 1
        return int(np.ceil(zeta(self.alpha) / (last**-self.alpha - (last + 1) ** -self.alpha)))

    @override
    def compose(self, size: int, cell: Cell, words: Sequence[str]) -> LongExample:
        draw = cell.draw()
        coded: dict[str, None] = {}
        number = max((cell.length - self.max_new_tokens) // TOKENS_PER_WORD, FREQUENT + 2)
        while len(coded) < number:
            letters = draw.integers(26, size=CODED_LETTERS).tolist()
            coded["".join(string.ascii_lowercase[n] for n in letters)] = None
        ranked = ["...", *coded][:number]
        shares = np.arange(1, number + 1.0) ** -self.alpha / zeta(self.alpha)
        # rounded first, because the last bit of a power is not the same on every machine
        counts = np.round(size * shares, 6).astype(int).tolist()
        items = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        context = " ".join(items[place] for place in draw.permutation(len(items)).tolist())
        prompt = (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots "
            "'....'. What are the three most frequently appeared words in the above coded text? Answer: According to "
            "the coded text above, the three most frequently appeared words are:"
        )
        return LongExample(prompt, tuple(ranked[1 : FREQUENT + 1]))
