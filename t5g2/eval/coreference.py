"""Multi-round co-reference (MRCR of Michelangelo, arXiv 2409.12640; question and score as OpenAI-MRCR has them)."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from typing_extensions import override

from t5g2.core.bounds import Bounds, Size, checked
from t5g2.core.errors import UserError
from t5g2.eval.haystack import NOUNS
from t5g2.eval.long_context import Cell, LongContextTask, LongExample
from t5g2.eval.metrics.string_match import AnswerMetric, PrefixedSimilarity

FORMATS = ("poem", "blog post", "short story", "riddle", "news article", "letter", "speech", "recipe", "song", "review")
PREFIX_CHARACTERS = 10


@dataclass(frozen=True, kw_only=True)
@checked
class Coreference(LongContextTask):
    """Asks for one of several answers to the same request in a long conversation.

    A user asks an assistant for pieces of writing ("Write a poem about a river"), `needles` times for the same; the
    last turn asks for the n-th of these, after a prefix of ten characters that is drawn. The answer that is asked for
    is at the cell's depth, the other equal requests are anywhere. Answers are successive passages of the text, none of
    them twice unless the text is repeated, so that nothing but the order of requests tells which is which.

    Attributes:
      needles: number of equal requests; OpenAI-MRCR has 2, 4 and 8.
      passage_words: number of words of an answer.
    """

    name: str = "coreference"
    needles: Annotated[int, Bounds(least=1, most=100)] = 2
    passage_words: Size = 60
    max_new_tokens: Size = 512

    @property
    @override
    def metric(self) -> AnswerMetric:
        return PrefixedSimilarity(PREFIX_CHARACTERS)

    @override
    def compose(self, size: int, cell: Cell, words: Sequence[str]) -> LongExample:
        draw = cell.draw()
        letters = string.ascii_letters + string.digits
        prefix = "".join(letters[n] for n in draw.integers(len(letters), size=PREFIX_CHARACTERS).tolist())
        needle_words = self.needles * self.passage_words
        # one distractor has the words that are left
        passages = _passages(words[:needle_words], self.passage_words)
        distractors = _passages(words[needle_words : needle_words + size], self.passage_words)
        if len(words) < needle_words:
            raise UserError(
                f"length {cell.length} is too short for {self.needles} passages of {self.passage_words} words"
            )
        number = len(distractors) + self.needles
        asked = round((number - 1) * self.depths[cell.depth] / 100)
        kinds = len(FORMATS) * len(NOUNS)
        needle = int(draw.integers(kinds))
        # a rank for each turn, the same whatever the number of turns, so that lengths grow evenly
        others = draw.permutation([place for place in range(number) if place != asked])[: self.needles - 1].tolist()
        places = sorted([asked, *others])
        answers, rest = iter(passages), iter(distractors)
        requests = (needle + 1 + draw.integers(kinds - 1, size=number)) % kinds
        turns, answer = [], ""
        for place in range(number):
            passage = next(answers if place in places else rest)
            answer = passage if place == asked else answer
            request = _request(needle if place in places else int(requests[place]))
            turns.append(f"User: Write {_article(request)} {request}\nAssistant: {passage}\n\n")
        prompt = (
            f"{''.join(turns)}User: Prepend {prefix} to the {_ordinal(places.index(asked) + 1)} (1 indexed) "
            f"{_request(needle)}. Do not include any other text in your response.\nAssistant:"
        )
        return LongExample(prompt, (prefix + answer,), (self.depths[cell.depth],))


def _passages(words: Sequence[str], number: int) -> list[str]:
    return [" ".join(words[start : start + number]) for start in range(0, len(words), number)]


def _request(kind: int) -> str:
    form, topic = divmod(kind, len(NOUNS))
    return f"{FORMATS[form]} about {_article(NOUNS[topic])} {NOUNS[topic]}"


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _ordinal(number: int) -> str:
    """Returns "1st", "2nd", "11th", …"""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
