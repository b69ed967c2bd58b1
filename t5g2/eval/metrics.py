"""Metrics of losses by token, as pure functions of host values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from t5g2.core.errors import UserError


@dataclass(frozen=True)
class TokenSums:
    """Weighted sums over tokens, in float64: added over any number of batches, and divided once.

    Attributes:
      loss: weighted loss, in nats.
      correct: weight of the targets to which the model gives the highest probability.
      weight: weight of all targets.
    """

    loss: float = 0.0
    correct: float = 0.0
    weight: float = 0.0

    def __add__(self, other: "TokenSums") -> "TokenSums":
        return TokenSums(self.loss + other.loss, self.correct + other.correct, self.weight + other.weight)

    @property
    def mean_loss(self) -> float:
        """Mean loss in nats per token; nan if no token has weight."""
        return self.loss / self.weight if self.weight else math.nan

    @property
    def accuracy(self) -> float:
        """Share of the tokens that are predicted right; nan if no token has weight."""
        return self.correct / self.weight if self.weight else math.nan


def perplexity(mean_loss: float) -> float:
    """Returns exp of a mean loss in nats; inf if that is too large for a float."""
    # math.exp overflows a float64 above 709
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


def mixture_mean(means: Mapping[str, float], shares: Mapping[str, float]) -> float:
    """Returns the mean of means, weighted by shares: {a: 2, b: 4} with {a: 1, b: 3} gives 3.5.

    The number of tokens that a part was measured on does not matter.
    """
    if means.keys() != shares.keys():
        raise UserError(f"means of {sorted(means)} cannot be mixed by shares of {sorted(shares)}; the names must agree")
    return sum(means[name] * share for name, share in shares.items()) / sum(shares.values())
