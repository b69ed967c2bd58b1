"""Texts in which long-context tasks hide what they ask for, and the size at which a text has a given length."""

import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from t5g2.core.errors import UserError
from t5g2.core.seeds import derive_seed
from t5g2.data.sources.documents import Documents

# RULER's (arXiv 2404.06654): lines of this are the haystack "noise"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# a needle goes to the end of a sentence that is so many words away at most, or else between two words
NEAR = 50
# strings of an example that are told apart; there are some thousands of words
MOST_STRINGS = 1000
ADJECTIVES = (
    "able amber ancient blue bold brave brief bright broad calm clear clever cold cosmic crisp curly daring deep eager "
    "early easy fair fancy fast fine firm fresh gentle glad golden grand green happy heavy honest humble icy jolly "
    "keen kind large late light lively loud lucky mellow mild modest narrow neat noble odd patient plain polite proud "
    "quick quiet rapid rare ripe rough royal rural sharp shiny silent silver simple slim smooth soft solid spicy "
    "steady still strong sunny sweet swift tall tame tender thick tidy tiny vast vivid warm wide wild wise young"
).split()
NOUNS = (
    "anchor apple arrow autumn badge basin beacon bell bottle branch bridge bronze bucket button cabin candle canoe "
    "canyon carpet castle cedar cherry circle cliff clock cloud comet copper coral cotton cradle crystal daisy desert "
    "diamond dolphin dragon eagle engine falcon feather fiddle forest fossil fountain garden glacier hammer harbor "
    "hazel helmet island ivory jacket jungle kettle kitten ladder lantern lemon letter lizard magnet maple marble "
    "meadow mirror monsoon mountain needle oasis ocean orchid otter oyster palace parrot pebble pepper pigeon pillow "
    "planet pocket prairie puzzle rabbit raven ribbon river rocket saddle salmon shadow spider spoon stable temple "
    "thunder ticket timber tunnel turtle valley velvet violin walnut window winter zebra"
).split()

StringKind = Literal["words", "numbers", "uuids"]


class Hidden(NamedTuple):
    """A text to hide.

    Attributes:
      text: the text.
      depth: its place, in percent of the haystack.
    """

    text: str
    depth: float


def running_words(documents: Documents, number: int, *, seed: int) -> list[str]:
    """Returns so many words (texts between spaces) of documents in their order, from one that the seed draws.

    After the last document comes the first one again.

    Raises:
      UserError: there are no words.
    """
    words: list[str] = []
    first = derive_seed(seed, "first document") % max(1, len(documents))
    for place in range(len(documents)):
        words += documents[(first + place) % len(documents)].split()
        if len(words) >= number:
            return words[:number]
    if not words:
        raise UserError("the text has no words; give a text source that has some")
    return [words[place % len(words)] for place in range(number)]


def vocabulary(words: Sequence[str], number: int, *, draw: np.random.Generator) -> list[str]:
    """Returns so many different words of a text in an order of the draw: its words of three letters or more in lower
    case, and then pairs of them, "red-river".

    Raises:
      UserError: the text has too few different words.
    """
    distinct = sorted({word.lower() for word in words if word.isalpha() and len(word) >= 3})
    if len(distinct) ** 2 < number:
        raise UserError(
            f"the text has {len(distinct)} different words of three letters or more, and {number} are needed, pairs of "
            f"them included; give a text source that has more, or a shorter length"
        )
    order = [distinct[place] for place in draw.permutation(len(distinct)).tolist()]
    more = number - len(order)
    shifted = (f"{order[n % len(order)]}-{order[(n + n // len(order)) % len(order)]}" for n in range(max(0, more)))
    return [*order, *shifted][:number]


def distinct_strings(number: int, kind: StringKind, *, draw: np.random.Generator, absent: str = "") -> list[str]:
    """Returns so many strings of a kind, none of which is in another one or in the text `absent`.

    Numbers have seven digits, words are an adjective and a noun ("calm-river"), UUIDs are of version 4.

    Raises:
      UserError: there are more than 1000.
    """
    if number > MOST_STRINGS:
        raise UserError(f"an example has {number} keys or values; at most {MOST_STRINGS} are told apart: give fewer")
    chosen: list[str] = []
    while len(chosen) < number:
        string = _string(kind, draw)
        if string not in absent and not any(string in other or other in string for other in chosen):
            chosen.append(string)
    return chosen


def other_strings(kind: StringKind, *, draw: np.random.Generator, absent: Sequence[str]) -> Iterator[str]:
    """Yields strings of a kind without end, which may repeat and have none of `absent` in them."""
    while True:
        string = _string(kind, draw)
        if not any(other in string for other in absent):
            yield string


def _string(kind: StringKind, draw: np.random.Generator) -> str:
    if kind == "numbers":
        return str(draw.integers(10**6, 10**7))
    if kind == "uuids":
        return str(uuid.UUID(bytes=draw.bytes(16), version=4))
    return f"{ADJECTIVES[draw.integers(len(ADJECTIVES))]}-{NOUNS[draw.integers(len(NOUNS))]}"


def hide_in_words(words: Sequence[str], hidden: Sequence[Hidden]) -> str:
    """Returns the words as a text with sentences hidden at their depths, between two sentences where there are any."""
    return " ".join(_insert(words, hidden, lambda depth: _sentence_border(words, depth)))


def hide_in_lines(lines: Sequence[str], hidden: Sequence[Hidden]) -> str:
    """Returns the lines as a text with lines hidden at their depths."""
    return "\n".join(_insert(lines, hidden, lambda depth: round(len(lines) * depth / 100)))


def _insert(units: Sequence[str], hidden: Sequence[Hidden], place: Callable[[float], int]) -> list[str]:
    parts, start = [], 0
    # stable: of one place, the first to be hidden comes first
    for border, text in sorted(((place(depth), text) for text, depth in hidden), key=lambda pair: pair[0]):
        parts += [*units[start:border], text]
        start = border
    return [*parts, *units[start:]]


def _sentence_border(words: Sequence[str], depth: float) -> int:
    """Returns the number of words before the sentence border that is nearest to a depth."""
    place = round(len(words) * depth / 100)
    borders = range(max(0, place - NEAR), min(len(words), place + NEAR) + 1)
    ends = [b for b in borders if b in (0, len(words)) or words[b - 1].endswith((".", "!", "?"))]
    return min(ends, key=lambda border: (abs(border - place), border), default=place)


def largest_size(tokens: Callable[[int], int], budget: int, *, least: int, most: int) -> int | None:
    """Returns the largest size of a text that has `budget` tokens or fewer; None if that of size `least` has more.

    The number of tokens should grow with the size; where it does not always, the size fits and the next one does not.

    Args:
      tokens: the number of tokens of a size, which costs time.
      least, most: bounds of the size.
    """
    low, at_low = least, tokens(least)
    if at_low > budget:
        return None
    high, other, at_other, attempts = most + 1, least, at_low, 0
    while high - low > 1:
        # lengths are almost straight lines: a guess is off by a few, and halving is for those that are not
        slope = (at_other - at_low) / (other - low) if other != low else 0.0
        if slope <= 0 or attempts >= 12:
            guess = (low + high) // 2 if attempts >= 12 else 2 * low + 16
        else:
            guess = low + int((budget - at_low) / slope)
        guess = min(max(guess, low + 1), high - 1)
        count, attempts = tokens(guess), attempts + 1
        if count <= budget:
            low, at_low, other, at_other = (guess, count, *((low, at_low) if high > most else (other, at_other)))
        else:
            high, other, at_other = guess, guess, count
    return low
