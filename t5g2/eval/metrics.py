"""Numbers made of what a model gets right: of losses by token, and of texts. Each is a pure function of host values."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from t5g2.core.errors import UserError


@dataclass(frozen=True)
class TokenSums:
    """Sums over tokens that count, in float64: they can be added over any number of batches, and divided once.

    Attributes:
      loss: weighted, in nats.
      correct: weight of the targets that the model thought likeliest.
      weight: of all targets.
    """

    loss: float = 0.0
    correct: float = 0.0
    weight: float = 0.0

    def __add__(self, other: "TokenSums") -> "TokenSums":
        return TokenSums(self.loss + other.loss, self.correct + other.correct, self.weight + other.weight)

    @property
    def mean_loss(self) -> float:
        """Nats per token; nan where no token counts."""
        return self.loss / self.weight if self.weight else math.nan

    @property
    def accuracy(self) -> float:
        """Share of the tokens that are predicted right; nan where no token counts."""
        return self.correct / self.weight if self.weight else math.nan


def perplexity(mean_loss: float) -> float:
    """exp of a mean loss in nats; inf where that is too large for a float."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


def mixture_mean(means: Mapping[str, float], shares: Mapping[str, float]) -> float:
    """The mean of means that a mixture with these shares has: {a: 2, b: 4} with {a: 1, b: 3} gives 3.5.

    Every part counts as its share says, however many tokens it was measured on.
    """
    if means.keys() != shares.keys():
        raise UserError(f"means of {sorted(means)} cannot be mixed by shares of {sorted(shares)}; the names must agree")
    return sum(means[name] * share for name, share in shares.items()) / sum(shares.values())


def exact_match(outputs: Sequence[str], references: Sequence[str]) -> float:
    """Share of the outputs that are their reference, spaces around and between words aside; case counts."""
    pairs = _pairs(outputs, references)
    return sum(" ".join(output.split()) == " ".join(reference.split()) for output, reference in pairs) / len(pairs)


def token_accuracy(outputs: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> float:
    """Share of the references' tokens that stand at their place in the output; what is missing there is wrong."""
    right = sum(int(np.sum(o[: len(r)] == r[: len(o)])) for o, r in _pairs(outputs, references))
    return right / max(sum(map(len, references)), 1)


def _pairs(outputs: Sequence, references: Sequence) -> list[tuple]:
    if len(outputs) != len(references) or not len(outputs):
        raise UserError(f"{len(outputs)} outputs and {len(references)} references; give one of each, and at least one")
    return list(zip(outputs, references, strict=True))
