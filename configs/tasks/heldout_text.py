"""Completion and span filling on text that no training here reads: documentation of the installed Python, in prose.

    t5g2 evaluate --model=DIR --tasks=heldout_text --out=DIR         100 passages
    t5g2 evaluate --model=DIR --tasks=heldout_text:20 --out=DIR      20

Passages of 32 words of the language reference and of docstrings, of PythonText's split "heldout" (documents are held
out whole, by their names); they differ a little between versions of Python. `completion/chrf` and `rouge1`, … compare
the next words with those of the text, and `completion_loss/bits_per_byte` is of all that follows. `filling` writes the
words of a gap after two solved passages, which any model can be asked; `filling_choice/accuracy` takes one of four, and
0.25 is chance. A model that was trained with sentinels has its loss on them by the kind heldout_loss.
"""

import random

from t5g2.data.sources.python_text import PythonText
from t5g2.eval.tasks import ChooseByLikelihood, GenerateAndCompare, TextLoss

WORDS, GAP = 32, 4  # of a passage, and of what is left out of it
CODE = ('"""', "'''", " = ", "#", "::", ">>>", "def ", "class ", "return ")  # passages are prose


def passages():
    """Returns passages of prose: a beginning and what follows; and the same with a gap, and what fills it."""
    records = []
    documents = PythonText(split="heldout").open()
    for number in range(len(documents)):
        for paragraph in documents[number].split("\n\n"):
            words = paragraph.split()
            are_prose = sum(word.strip("\"',.;:()*").isalpha() for word in words) > 0.8 * len(words)
            if not are_prose or any(mark in paragraph for mark in CODE):
                continue
            for first in range(0, len(words) - WORDS + 1, WORDS):
                records.append(passage(words[first : first + WORDS]))
    return records


def passage(words):
    """Returns the record of a passage."""
    place = WORDS // 2
    return {
        "beginning": " ".join(words[:place]),
        "next": " ".join(words[place : place + 8]),
        "rest": " ".join(words[place:]),
        "with_gap": " ".join([*words[:place], "____", *words[place + GAP :]]),
        "gap": " ".join(words[place : place + GAP]),
    }


def get_tasks(examples: str = "100"):
    draw, records = random.Random(0), passages()
    gaps = list(dict.fromkeys(record["gap"] for record in records))
    for record in records:
        others = draw.sample([gap for gap in gaps if gap != record["gap"]], 3)
        record["choices"] = draw.sample([record["gap"], *others], 4)
    shared = {"data": records, "examples": int(examples)}
    gap = {"template": "{with_gap}\nThe words that belong into the gap:", "shots": 2}
    return [
        GenerateAndCompare(
            **shared,
            name="completion",
            template="{beginning}",
            reference="{next}",
            metrics=("chrf", "rouge", "token_f1"),
            max_new_tokens=24,
        ),
        TextLoss(**shared, name="completion_loss", template="{beginning}", target="{rest}"),
        GenerateAndCompare(
            **shared,
            **gap,
            name="filling",
            reference="{gap}",
            metrics=("chrf", "exact_match", "token_f1"),
            max_new_tokens=16,
            stop=("\n",),
        ),
        ChooseByLikelihood(**shared, **gap, name="filling_choice", choices="{choices}", answer="{gap}"),
    ]
