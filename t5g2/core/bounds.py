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

import contextlib
import functools
import math
import numbers
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from t5g2.core.errors import UserError, shortened, unknown

INT32_MAX = 2**31 - 1
# for lengths and sizes of arrays: a longer axis is a slip of the keyboard, and would be allocated before it is noticed
LONGEST = 2**24

UNIONS = (typing.Union, types.UnionType)
# what messages call values of a class
NOUNS = {int: "a whole number", float: "a number", str: "text", bool: "True or False", NoneType: "None"}


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

    Checked are the fields whose annotation has bounds or a Literal: a value must fit the whole of it, item by item. A
    list is taken where a tuple is, and stored as one, so that the value can be hashed and is equal to one of a config.
    Subclasses inherit the check, and it covers their fields too.

    Raises:
      TypeError: such an annotation has a part that no value can be checked by.
      UserError: when a value is made with a number out of the bounds that its field declares or of another type, or
        with a word that its Literal does not have.
    """
    # what names a class that is defined further down is looked at when the first value is made
    with contextlib.suppress(NameError):
        _annotations(cls)
    own = getattr(cls, "__post_init__", None)

    def __post_init__(self: Any) -> None:
        for name, annotation in _annotations(type(self)).items():
            value = getattr(self, name)
            misfit = _misfit(value, annotation)
            if misfit is not None:
                raise _error(type(self), name, *misfit)
            stored = _with_tuples(value, annotation)
            if stored is not value:
                object.__setattr__(self, name, stored)  # the class may be frozen
        if own is not None:
            own(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return cls


@functools.cache
def of(cls: type) -> dict[str, Bounds]:
    """Returns {field: its bounds} for the fields that declare bounds."""
    found = {name: _bounds(_parts(annotation)) for name, annotation in _annotations(cls).items()}
    return {name: bounds[0] for name, bounds in found.items() if bounds}


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    """Returns {field: its annotation} for the fields that declare bounds or words.

    Raises:
      TypeError: as `checked`.
    """
    # a class may name itself before it has a name
    hints = typing.get_type_hints(cls, localns={cls.__name__: cls}, include_extras=True)
    fields = {}
    for name, annotation in hints.items():
        parts = [*_parts(annotation)]
        if get_origin(annotation) is not ClassVar and (_bounds(parts) or any(get_origin(p) is Literal for p in parts)):
            _refuse_unchecked(annotation, f"{cls.__name__}.{name}")
            fields[name] = annotation
    return fields


def _refuse_unchecked(annotation: Any, where: str) -> None:
    """Raises TypeError if the annotation, or a part of it, is none that `_misfit` compares values with."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        is_checked = not _bounds(arguments) or {*_members(arguments[0])} <= {int, float}
    elif origin is None:
        # of a protocol there are no instances that Python could tell
        is_checked = isinstance(annotation, type) and annotation is not Any
        is_checked = is_checked and not getattr(annotation, "_is_protocol", False)
    else:
        is_checked = origin in (*UNIONS, tuple, Literal)
    if not is_checked:
        raise TypeError(
            f"{where} has bounds or words, and its values cannot be checked by {annotation}; compose it of classes, "
            f"numbers with bounds, Literal, None, unions and tuples of these"
        )
    inner = arguments[:1] if origin is Annotated else () if origin is Literal else arguments
    for part in inner:
        if part is not ...:
            _refuse_unchecked(part, where)


def _misfit(value: Any, annotation: Any) -> tuple[Any, Any] | None:
    """Returns the first item of a value that does not fit its part of the annotation, and that part; None = all fit.

    Of (("a", "zzz"),) and tuple[tuple[str, Literal["x", "y"]], ...] that is ("zzz", Literal["x", "y"]).
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in UNIONS:
        misfits = [_misfit(value, member) for member in arguments]
        if None in misfits:
            return None
        # of a tuple that is allowed, the item that is not
        return next((misfit for misfit in misfits if misfit and misfit[0] is not value), (value, annotation))
    if origin is tuple and isinstance(value, tuple | list):
        parts = arguments[:1] * len(value) if arguments[-1:] == (...,) else arguments
        if len(parts) == len(value):
            return next(filter(None, map(_misfit, value, parts)), None)
    elif origin is Annotated:
        misfit = _misfit(value, arguments[0])
        if not _bounds(arguments):
            return misfit
        if misfit is None and all(value in bounds for bounds in _bounds(arguments)):
            return None
    elif origin is Literal:
        if any(_is(value, word) for word in arguments):
            return None
    elif origin is None and _is_of(value, annotation):
        return None
    return value, annotation


def _with_tuples(value: Any, annotation: Any) -> Any:
    """Returns a value that fits an annotation, each list that stands for a tuple made one; itself, if there is none."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in UNIONS:
        return _with_tuples(value, next(member for member in arguments if _misfit(value, member) is None))
    if origin is Annotated:
        return _with_tuples(value, arguments[0])
    if origin is not tuple:
        return value
    parts = arguments[:1] * len(value) if arguments[-1:] == (...,) else arguments
    items = tuple(map(_with_tuples, value, parts))
    same = isinstance(value, tuple) and all(item is old for item, old in zip(items, value, strict=True))
    return value if same else items


def _error(cls: type, name: str, item: Any, annotation: Any) -> UserError:
    """Returns the error for an item of a field, and the part of the field's annotation that it does not fit."""
    members = _members(annotation)
    bounds = _bounds(part for member in members for part in get_args(member))
    words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    numbers_and_classes = [_described(m, item) for m in members if m is not NoneType and get_origin(m) is not Literal]
    others = ["None for none"] if NoneType in members else []
    names = [str(word) for word in [*words, *([None] if others else [])]]
    # the text "1" is not the word 1, and would be asked whether it means "1"
    if words and (isinstance(item, str) or not bounds) and str(item) not in names:
        error = unknown(name, shortened(str(item)), names, where=f"of {cls.__name__}")
        return UserError(", or ".join([str(error), *numbers_and_classes]))
    given = shortened(str(item) if isinstance(item, numbers.Number) else repr(item))
    hint = f"; {bounds[0].hint}" if bounds and bounds[0].hint else ""
    allowed = ", or ".join([*numbers_and_classes, *map(repr, words), *others])
    return UserError(f"{name} = {given}; it must be {allowed}{hint}")


def _described(annotation: Any, item: Any) -> str:
    """Returns what a part of an annotation allows; the type of a number only if the item has another."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is tuple:
        kinds = dict.fromkeys(_described(part, None) for part in arguments if part is not ...)
        count = "" if arguments[-1:] == (...,) else f" of {len(arguments)}"
        return f"a tuple{count}, in it {' and '.join(kinds)}"
    if origin is Annotated:
        bounds = [*map(str, _bounds(arguments))]
        if not bounds or _misfit(item, arguments[0]) is not None:
            kind = [_described(arguments[0], item)]
        else:
            kind = ["a finite number"] if item != item or item in (math.inf, -math.inf) else []
        return " that is ".join([*kind, *([" and ".join(bounds)] if bounds else [])])
    if origin in UNIONS or origin is Literal:
        return " or ".join(_described(p, item) if origin in UNIONS else repr(p) for p in arguments)
    return NOUNS.get(annotation) or f"of type {annotation.__name__}"


def _is(item: Any, word: Any) -> bool:
    # 1 is equal to True, and another word; text of NumPy is text
    same_type = isinstance(item, str) if type(word) is str else type(item) is type(word)
    return same_type and item == word


def _is_of(item: Any, cls: type) -> bool:
    """True if an item is of a class; a number of NumPy is of int or float, a whole one of both, and True of bool."""
    if cls is int or cls is float:
        return isinstance(item, numbers.Integral if cls is int else numbers.Real) and not isinstance(item, bool)
    return isinstance(item, cls)


def _bounds(parts: Iterable[Any]) -> list[Bounds]:
    return [part for part in parts if isinstance(part, Bounds)]


def _members(annotation: Any) -> tuple[Any, ...]:
    """Returns the members of a union; of any other annotation itself."""
    return get_args(annotation) if get_origin(annotation) in UNIONS else (annotation,)


def _parts(annotation: Any) -> Iterator[Any]:
    """Yields the annotation and all that it is composed of: the metadata of Annotated, members of unions and tuples."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _format(number: float) -> str:
    """Returns a number as short as it can be read back: 2147483647 and 1e-08, not 2.147484e+09."""
    return str(number) if isinstance(number, int) else repr(number).removesuffix(".0")
