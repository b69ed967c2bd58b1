"""Classes of a user's own, as a config names them by their dotted path; and some that cannot be kinds.

Without jax, because data workers import this module.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from t5g2.core.bounds import Bounds, checked
from t5g2.core.errors import UserError
from t5g2.data.sources.documents import Documents, OnBadRecord
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.objectives import PrefixLM

if TYPE_CHECKING:
    from fractions import Fraction


@dataclass(frozen=True)
class Stories(Documents):
    """Documents that are made up."""

    count: int
    seed: int = 0
    fingerprint: str = "0123456789abcdef"
    characters: int = 1
    skipped: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> str:
        return f"Story {index} of {self.seed}: " + "and then " * (3 + index % 5)


@dataclass(frozen=True)
@checked
class StorySource:
    """A source; its numbers have bounds like those of t5g2's own classes."""

    count: Annotated[int, Bounds(least=1, most=100)]
    seed: int = 0

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        if self.seed == 13:
            raise UserError("seed 13 brings bad luck; take another one")
        return Stories(self.count, self.seed)


@dataclass(frozen=True)
class Upper(PrefixLM):
    """A prefix language model whose loss counts double."""

    factor: float = 2.0

    def __call__(self, tokens, rng, *, special_tokens):
        example = super().__call__(tokens, rng, special_tokens=special_tokens)
        return replace(example, weights=example.weights * np.float32(self.factor))


@dataclass(frozen=True)
class Stairs:
    """A schedule: half after every `every` steps."""

    peak: float
    every: int = 10

    def make(self, steps: int) -> Callable[[Any], Any]:
        return lambda step: self.peak * 0.5 ** (step // self.every)


@dataclass(frozen=True)
class LowerBytes(Bytes):
    """Bytes of the text in small letters."""

    def encode(self, text: str) -> np.ndarray:
        return super().encode(text.lower())

    def fingerprint(self) -> str:
        return f"{super().fingerprint()[:15]}~"

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"kind": "tests.own_classes.LowerBytes"}


@dataclass
class Changeable:
    """Not frozen."""


class Plain:
    """No dataclass."""


class Derived(Upper):
    """Derives from a dataclass, and is none."""


@dataclass(frozen=True)
class Unrelated:
    """A frozen dataclass of nothing."""


@dataclass(frozen=True)
class Untyped:
    """A schedule whose annotation cannot be read."""

    peak: "Fraction"

    def make(self, steps: int) -> Any:
        return None


def local():
    """Returns a class that pickle cannot find."""

    @dataclass(frozen=True)
    class Local:
        def make(self, steps: int) -> Any:
            return None

    return Local


Local = local()
