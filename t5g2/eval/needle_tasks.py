"""RULER's needles in a haystack and variable tracking (arXiv 2404.06654, appendix B; prompts as in its repository)."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from typing_extensions import override

from t5g2.core.bounds import Count, Size, checked
from t5g2.core.errors import UserError
from t5g2.eval.haystack import (
    NOISE,
    Hidden,
    StringKind,
    distinct_strings,
    hide_in_lines,
    hide_in_words,
    other_strings,
)
from t5g2.eval.long_context import Cell, LongContextTask, LongExample

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
# depths of needles that no cell asks for, in percent
DEPTHS = np.linspace(0, 100, 40).round().astype(int)
SOLVED_LINES = 5  # of noise, in the solved example


@dataclass(frozen=True, kw_only=True)
@checked
class Needle(LongContextTask):
    """Hides sentences that each give a key a value, and asks for all values of some keys.

    RULER's are: `single` by default; `multi-key` with keys=4, or haystack="needles"; `multi-value` with values=4;
    `multi-query` with queries=4. Of several values that are asked for, each is at a depth of its own, the first at that
    of the cell and the others at the ones after it, so that every depth has the same number. Other needles are
    anywhere. No value or key that is asked for is in the haystack a second time.

    Attributes:
      haystack: "text"; "noise", the same line again and again; "needles", lines of other keys.
      keys: number of keys that are hidden in the haystack, at least `queries`.
      values: number of values of each key.
      queries: number of keys that are asked for.
      key_kind, value_kind: an adjective and a noun, a number of seven digits, or a UUID.
    """

    name: str = "needle"
    haystack: Literal["text", "noise", "needles"] = "text"
    keys: Count = 1
    values: Count = 1
    queries: Count = 1
    key_kind: StringKind = "words"
    value_kind: StringKind = "numbers"

    @property
    @override
    def needs_text(self) -> bool:
        return self.haystack == "text"

    @override
    def compose(self, size: int, cell: Cell, words: Sequence[str]) -> LongExample:
        draw = cell.draw()
        absent = " ".join(words)
        keys = distinct_strings(max(self.keys, self.queries), self.key_kind, draw=draw, absent=absent)
        values = distinct_strings(len(keys) * self.values, self.value_kind, draw=draw, absent=absent)
        asked = self.queries * self.values
        depths = [self.depths[(cell.depth + n) % len(self.depths)] for n in range(asked)]
        elsewhere = DEPTHS[draw.integers(len(DEPTHS), size=len(values) - asked)].tolist()
        hidden = [
            Hidden(self._sentence(keys[n // self.values], value), depth)
            for n, (value, depth) in enumerate(zip(values, [*depths, *elsewhere], strict=True))
        ]
        if self.haystack == "text":
            context = hide_in_words(words[:size], hidden)
        elif self.haystack == "noise":
            context = hide_in_lines([NOISE] * size, hidden)
        else:
            other_keys = other_strings(self.key_kind, draw=draw, absent=keys)
            other_values = other_strings(self.value_kind, draw=draw, absent=values)
            lines = [self._sentence(next(other_keys), next(other_values)) for _ in range(size)]
            context = hide_in_lines(lines, hidden)
        return LongExample(self._prompt(context, keys[: self.queries]), tuple(values[:asked]), tuple(depths))

    def _sentence(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value_kind, key=key, value=value)

    def _prompt(self, context: str, keys: Sequence[str]) -> str:
        query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        if self.queries * self.values == 1:
            begin, verb, which, kind = "A", "is", "is", self.value_kind[:-1]
        else:
            begin, verb, which, kind = "Some", "are", "are all", self.value_kind
        return (
            f"{begin} special magic {kind} {verb} hidden within the following text. Make sure to memorize it. I will "
            f"quiz you about the {kind} afterwards.\n{context}\nWhat {which} the special magic {kind} for {query} "
            f"mentioned in the provided text? The special magic {kind} for {query} mentioned in the provided text "
            f"{verb}"
        )


@dataclass(frozen=True, kw_only=True)
@checked
class VariableTracking(LongContextTask):
    """Hides chains of assignments, `VAR B = VAR A`, and asks for every variable that has the first chain's value.

    A solved example with other names stands before it. Statements of a chain keep their order and are anywhere, so
    there is one cell for each length.

    Attributes:
      haystack: "noise", the same line again and again, as RULER has it; or "text".
      chains: number of chains, each with a value of its own.
      hops: number of assignments after the first of a chain; hops + 1 variables are asked for.
    """

    name: str = "variable_tracking"
    haystack: Literal["noise", "text"] = "noise"
    chains: Count = 1
    hops: Count = 4
    max_new_tokens: Size = 30

    @property
    @override
    def needs_text(self) -> bool:
        return self.haystack == "text"

    @property
    @override
    def has_depths(self) -> bool:
        return False

    @override
    def compose(self, size: int, cell: Cell, words: Sequence[str]) -> LongExample:
        draw = cell.draw()
        solved, solved_names = self._problem([NOISE] * SOLVED_LINES, draw, letters=3, absent="")
        absent = " ".join([*words, solved])
        units = words[:size] if self.haystack == "text" else [NOISE] * size
        problem, names = self._problem(units, draw, letters=5, absent=absent)
        return LongExample(f"{solved} {' '.join(solved_names)}\n\n{problem}", tuple(names))

    def _problem(
        self, units: Sequence[str], draw: np.random.Generator, *, letters: int, absent: str
    ) -> tuple[str, list[str]]:
        """Returns a question, and the variables that answer it."""
        names = _names(self.chains * (self.hops + 1), letters, draw, absent)
        starts = [names[n : n + self.hops + 1] for n in range(0, len(names), self.hops + 1)]
        # values are distinct: another chain's variables would be right as well
        values = (10000 + draw.choice(90000, self.chains, replace=False)).tolist()
        hidden = []
        for chain, value in zip(starts, values, strict=True):
            depths = sorted(draw.uniform(0, 100, len(chain)).tolist())
            right = [str(value), *(f"VAR {name}" for name in chain[:-1])]
            hidden += [Hidden(f"VAR {n} = {r}", d) for n, r, d in zip(chain, right, depths, strict=True)]
        if letters == 5 and self.haystack == "text":
            context = hide_in_words(units, [Hidden(f"{text}.", depth) for text, depth in hidden])
        else:
            context = hide_in_lines(units, hidden)
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            f"{context}\nQuestion: Find all variables that are assigned the value {values[0]} in the text above. "
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"{self.hops + 1} variables are assigned the value {values[0]}, they are:"
        ), starts[0]


def _names(number: int, letters: int, draw: np.random.Generator, absent: str) -> list[str]:
    """Returns different names of so many capital letters that are not in a text."""
    if number > 26**letters // 2:
        raise UserError(f"{number} variables are more than names of {letters} letters; lower chains or hops")
    names: list[str] = []
    while len(names) < number:
        name = "".join(string.ascii_uppercase[n] for n in draw.integers(26, size=letters).tolist())
        if name not in names and name not in absent:
            names.append(name)
    return names
