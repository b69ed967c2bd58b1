"""Metrics of losses by token, as pure functions of host values."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from typing_extensions import override

from t5g2.core.errors import UserError
from t5g2.eval.metrics.metric import Contributions, ExampleCounts, Metric


@dataclass(frozen=True)
class TokenSums:
    """Weighted sums over tokens, in float64: added over any number of batches, and divided once.

    Attributes:
      loss: weighted loss, in nats.
      correct: weight of the targets to which the model gives the highest probability.
      weight: weight of all targets.
      text_bytes: bytes of the text that the targets stand for.
    """

    loss: float = 0.0
    correct: float = 0.0
    weight: float = 0.0
    text_bytes: float = 0.0

    def __add__(self, other: "TokenSums") -> "TokenSums":
        return TokenSums(
            self.loss + other.loss,
            self.correct + other.correct,
            self.weight + other.weight,
            self.text_bytes + other.text_bytes,
        )

    @property
    def mean_loss(self) -> float:
        """Mean loss in nats per token; nan if no token has weight."""
        return self.loss / self.weight if self.weight else math.nan

    @property
    def accuracy(self) -> float:
        """Share of the tokens that are predicted right; nan if no token has weight."""
        return self.correct / self.weight if self.weight else math.nan

    @property
    def mean_bytes(self) -> float:
        """Mean number of bytes of text that a token stands for; nan if no token has weight."""
        return self.text_bytes / self.weight if self.weight else math.nan


def perplexity(mean_loss: float) -> float:
    """Returns exp of a mean loss in nats; inf if that is too large for a float."""
    # math.exp overflows a float64 above 709
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


def bits_per_byte(loss: float, text_bytes: float) -> float:
    """Returns a loss in nats as bits for each byte of the text that was predicted; nan for no text.

    Unlike nats per token it does not depend on how a tokenizer cuts the text, so models with different tokenizers can
    be compared. A loss of 8 ln 2 nats on "ab", two bytes, is 4 bits per byte; a uniform guess of bytes has 8. Both
    arguments may be sums over a text, or means over its tokens.
    """
    return loss / math.log(2) / text_bytes if text_bytes else math.nan


@dataclass(frozen=True)
class TextLosses(Metric):
    """Loss of texts: nats per token, its perplexity, bits per byte. A row is the nats, tokens and bytes of a text."""

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return ("loss", "perplexity", "bits_per_byte")

    @override
    def rows(self, outputs: Sequence[Any], references: Sequence[Sequence[Any]]) -> Contributions:
        """Returns the outputs, which are rows already; there are no references."""
        return np.array(outputs, np.float64).reshape(-1, 3)

    @override
    def scores(self, rows_NK: Contributions, counts_N: ExampleCounts) -> Float[np.ndarray, " M"]:
        nats, tokens, text_bytes = (counts_N @ rows_NK).tolist()
        mean_loss = nats / tokens if tokens else math.nan
        return np.array([mean_loss, perplexity(mean_loss), bits_per_byte(nats, text_bytes)])

    @override
    def of_examples(self, rows_NK: Contributions) -> Float[np.ndarray, "N M"]:
        return self.resampled(rows_NK, np.eye(len(rows_NK), dtype=np.int64))


def mixture_mean(means: Mapping[str, float], shares: Mapping[str, float]) -> float:
    """Returns the mean of means, weighted by shares: {a: 2, b: 4} with {a: 1, b: 3} gives 3.5.

    The number of tokens that a part was measured on does not matter.
    """
    if means.keys() != shares.keys():
        raise UserError(f"means of {sorted(means)} cannot be mixed by shares of {sorted(shares)}; the names must agree")
    return sum(means[name] * share for name, share in shares.items()) / sum(shares.values())
