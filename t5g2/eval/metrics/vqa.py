"""Accuracy of visual question answering: an answer is right if three people of ten gave it.

Source: Antol et al., arXiv 1505.00468, section 3, and GT-Vision-Lab/VQA, vqaEval.py @ 07aecec. Known deviation: the
apostrophes of that file's contractions are typographic in its last commit, which no answer has; here they are plain, as
in the commits before and in the evaluation of the challenge.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import override

from t5g2.eval.metrics.metric import Contributions, MeanMetric, check_references

ARTICLES = ("a", "an", "the")
NUMBERS = {"none": "0"} | {
    word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_CONTRACTED = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
""".split()
# punctuation is removed first, so the words that are looked up have no apostrophe
CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED}
PUNCTUATION = ";:/'[]\"()=+\\_><@`,?"
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def without_punctuation(answer: str) -> str:
    """Returns an answer without punctuation: a mark next to a space is removed, any other becomes a space.

    "salt, pepper." becomes "salt pepper", "blue/green" becomes "blue green". In an answer with a number such as 1,000
    every mark is removed. A period before a digit stays.
    """
    has_number = _COMMA_IN_NUMBER.search(answer) is not None
    result = answer
    for mark in PUNCTUATION:
        is_removed = has_number or f"{mark} " in answer or f" {mark}" in answer
        result = result.replace(mark, "" if is_removed else " ")
    return _PERIOD.sub("", result)


def normalized_answer(answer: str) -> str:
    """Returns a model's answer as it is compared: "Two dogs, dont run." -> "2 dogs don't run"."""
    answer = without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    words = (NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(output: str, references: Sequence[str]) -> float:
    """Returns the mean over the people, each left out in turn, of min(1, others that gave this answer / 3).

    Of ten people n who gave it make 0, 0.3, 0.6, 0.9, 1, …: 3 of 10 are 0.9, because for 3 of the 10 subsets only two
    are left. With fewer than four references 1 is out of reach.
    """
    # the references are normalized only if they differ, as in the official code
    texts = [without_punctuation(text) for text in references] if len(set(references)) > 1 else references
    answer = normalized_answer(output)
    matches = [text == answer for text in texts]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


@dataclass(frozen=True)
class VqaAccuracy(MeanMetric):
    """Accuracy of visual question answering against the answers of several people, of VQA ten; 0 to 1."""

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return ("vqa_accuracy",)

    @override
    def rows(self, outputs: Sequence[Any], references: Sequence[Sequence[Any]]) -> Contributions:
        check_references(references)
        return np.array([[vqa_accuracy(o, several)] for o, several in zip(outputs, references, strict=True)])
