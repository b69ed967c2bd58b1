"""Ranges of numbers and sets of words: declared in the annotation of a field, checked where a value is made.

    @dataclass(frozen=True)
    @checked
    class AdamW:
        eps: Annotated[float, Bounds(above=0)] = 1e-8
        moment_dtype: Literal["float32", "bfloat16"] = "float32"

    AdamW(eps=0)  # UserError: eps = 0; it must be above 0
    AdamW(moment_dtype="float16")  # UserError: unknown moment_dtype 'float16' of AdamW; did you mean …

The one declaration is what the constructor checks, what the message says and what docs/settings.md prints.
"""

import functools
import math
import numbers
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from t5g2.core.errors import UserError, unknown

INT32_MAX = 2**31 - 1
# for lengths and sizes of arrays: a longer axis is a slip of the keyboard, and would be allocated before it is noticed
LONGEST = 2**24


@dataclass(frozen=True)
class Bounds:
    """The finite numbers that a setting may have; None = no bound on that side.

    Attributes:
      least, most: bounds that are allowed themselves.
      above, below: bounds that are not.
      also: a number outside the bounds that is allowed, such as -1 for "what is left".
      hint: what to do instead of a number out of range.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    also: float | None = None
    hint: str = ""

    def __contains__(self, number: float) -> bool:
        # written so that NaN, for which every comparison is False, is outside
        return number == self.also or (
            # a whole number beyond the largest float has no counterpart that could be looked at
            (isinstance(number, int) or math.isfinite(number))
            and (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        sides = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        bounds = " and ".join(f"{words} {_format(number)}" for words, number in sides.items() if number is not None)
        return (bounds or "a finite number") + ("" if self.also is None else f", or {_format(self.also)}")


Count = Annotated[int, Bounds(least=1, most=INT32_MAX)]
CountOrZero = Annotated[int, Bounds(least=0, most=INT32_MAX)]
Size = Annotated[int, Bounds(least=1, most=LONGEST)]
TokenId = Annotated[int, Bounds(least=0, most=INT32_MAX)]
Seed = Annotated[int, Bounds(least=0, below=2**63)]
Positive = Annotated[float, Bounds(above=0)]
NotNegative = Annotated[float, Bounds(least=0)]
Share = Annotated[float, Bounds(least=0, most=1)]

Class = TypeVar("Class", bound=type)


def checked(cls: Class) -> Class:
    """Decorates a class, below `@dataclass`, so that its values are checked before its own __post_init__ runs.

    Subclasses inherit the check, and it covers their fields too.

    Raises:
      UserError: when a value is made with a number out of the bounds that its field declares, or with a word that its
        Literal does not have.
    """
    own = getattr(cls, "__post_init__", None)

    def __post_init__(self: Any) -> None:
        for name, (bounds, others) in of(type(self)).items():
            for number in _numbers(getattr(self, name)):
                if number not in bounds:
                    allowed = ", or ".join([str(bounds), *("None for none" if x is None else repr(x) for x in others)])
                    hint = f"; {bounds.hint}" if bounds.hint else ""
                    raise UserError(f"{name} = {number}; it must be {allowed}{hint}")
        for name, (words, classes) in _words_of(type(self)).items():
            for item in _items(getattr(self, name)):
                if not any(_is(item, word) for word in words) and not _is_of(item, classes):
                    raise unknown(name, str(item), map(str, words), where=f"of {type(self).__name__}")
        if own is not None:
            own(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return cls


@functools.cache
def of(cls: type) -> dict[str, tuple[Bounds, tuple[str | None, ...]]]:
    """Returns {field: (its bounds, the words and None that it may be instead)} for the fields that declare bounds."""
    fields = {}
    for name, annotation in typing.get_type_hints(cls, include_extras=True).items():
        parts = list(_parts(annotation))
        bounds = [part for part in parts if isinstance(part, Bounds)]
        if bounds:
            fields[name] = bounds[0], _words(parts)
    return fields


@functools.cache
def _words_of(cls: type) -> dict[str, tuple[tuple[str | bool | None, ...], frozenset[type]]]:
    """Returns {field: (the words that it may have, None among them where it may be; the classes that it may be of)}.

    Of the fields that declare a Literal.
    """
    fields = {}
    for name, annotation in typing.get_type_hints(cls, include_extras=True).items():
        parts = list(_parts(annotation))
        if any(typing.get_origin(part) is Literal for part in parts):
            classes = {typing.get_origin(part) or part for part in parts} - {Annotated, types.UnionType, tuple}
            fields[name] = _words(parts), frozenset(c for c in classes if isinstance(c, type) and c is not type(None))
    return fields


def _words(parts: list[Any]) -> tuple[Any, ...]:
    """Returns the words of the Literals among the parts of an annotation, and None where it may be."""
    words = [word for part in parts if typing.get_origin(part) is Literal for word in typing.get_args(part)]
    return (*words, *([None] if type(None) in parts else []))


def _is(item: Any, word: str | bool | None) -> bool:
    # 1 is equal to True, and no word
    return item == word if isinstance(item, str) else item is word


def _is_of(item: Any, classes: frozenset[type]) -> bool:
    """True if an item is of one of the classes; a number of NumPy is of int and float, and True of bool alone."""
    if isinstance(item, bool):
        return bool in classes
    if isinstance(item, numbers.Real):
        return int in classes or float in classes
    return isinstance(item, tuple(classes))


def _parts(annotation: Any) -> Iterator[Any]:
    """Yields the annotation and all that it is composed of: the metadata of Annotated, members of unions and tuples."""
    yield annotation
    for part in (*getattr(annotation, "__metadata__", ()), *typing.get_args(annotation)):
        yield from _parts(part)


def _numbers(value: Any) -> Iterator[float]:
    """Yields the numbers of a field's value; a word or None has none."""
    for item in _items(value):
        # numpy's scalars too
        if isinstance(item, numbers.Real) and not isinstance(item, bool):
            yield item  # pyright: ignore[reportReturnType]


def _items(value: Any) -> Iterator[Any]:
    """Yields a field's value, or those of the tuple that it is."""
    if isinstance(value, tuple):
        for item in value:
            yield from _items(item)
    else:
        yield value


def _format(number: float) -> str:
    """Returns a number as short as it can be read back: 2147483647 and 1e-08, not 2.147484e+09."""
    return str(number) if isinstance(number, int) else repr(number).removesuffix(".0")
