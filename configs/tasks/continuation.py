"""Loss of the same ends of texts after more and more of what stands before them: what a longer input is worth.

    t5g2 evaluate --model=DIR --tasks=continuation --out=DIR              after 512 and 2048 characters
    t5g2 evaluate --model=DIR --tasks=continuation:1024+8192 --out=DIR    other lengths

Text of the standard library that no training here reads: 24 places in it, 256 characters from each on, which are
predicted, and so many before it. `continuation_2048/bits_per_byte` is of these 256 alone. The places are the same for
all lengths up to 8192, whatever others are asked for; a longer one leaves those that have so much before them. The loss
of a model that makes use of what it reads falls with the length; that of one which is confused by a length that it has
not met rises.
"""

from t5g2.core.errors import UserError
from t5g2.data.sources.python_text import PythonText
from t5g2.eval.tasks import TextLoss

END = 256  # characters that are predicted
APART = 8192  # characters before the first place of a document, and between the places
PLACES = 24


def get_tasks(lengths: str = "512+2048"):
    if not all(length.isdecimal() and int(length) > 0 for length in lengths.split("+")):
        raise UserError(f"lengths {lengths!r} of continuation; give numbers of characters, as 512+2048")
    characters = sorted({int(length) for length in lengths.split("+")})
    documents = PythonText(split="heldout").open()
    texts = [documents[number] for number in range(len(documents))]
    found = [(text, place) for text in texts for place in places(text) if place >= characters[-1]]
    if not found:
        most = max((place for text in texts for place in places(text)), default=0)
        raise UserError(f"no held-out document has {characters[-1]} characters before a place; give at most {most}")
    chosen = [found[number * len(found) // PLACES] for number in range(PLACES)] if len(found) > PLACES else found
    return [
        TextLoss(
            data=[{"before": text[place - length : place], "end": text[place : place + END]} for text, place in chosen],
            name=f"continuation_{length}",
            template="{before}",
            target="{end}",
            delimiter="",
        )
        for length in characters
    ]


def places(text):
    """Yields places in a text, each after a character that is no white space, which would be predicted too."""
    for place in range(APART, len(text) - END, APART + END):
        while place < len(text) and text[place - 1].isspace():
            place += 1
        if place + END <= len(text):
            yield place
