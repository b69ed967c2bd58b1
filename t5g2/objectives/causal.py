"""Language modelling from left to right."""

from dataclasses import dataclass

import numpy as np

from t5g2.core.batch import Example
from t5g2.core.errors import UserError, unknown
from t5g2.core.objective import Objective
from t5g2.core.special_tokens import SpecialTokens
from t5g2.objectives.teacher_forcing import teacher_forced


@dataclass(frozen=True)
class Causal(Objective):
    """Every token from those before it; the encoder reads nothing.

    With bos = 2, eos = 1, tokens [11 12 13 14]:

        encoder_tokens  []
        decoder_tokens  [ 2 11 12 13 14]
        targets         [11 12 13 14  1]
        weights         [ 1  1  1  1  1]

    With context=0.5 the first half is read and not counted, as if a prefix language model had read it:

        weights         [ 0  0  1  1  1]

    Attributes:
      eos: the targets end in EOS, also where a chunk is not the end of its document.
      context: share of the tokens at the start that do not count, at least 0 and below 1. With 1 - rate of a UL2
        suffix it counts the very targets that the suffix has.
    """

    eos: bool = True
    context: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.context < 1.0:
            raise UserError(f"context = {self.context}; it is a share of the tokens, at least 0 and below 1")

    @property
    def is_stochastic(self) -> bool:
        """No."""
        return False

    @property
    def denoisers(self) -> tuple[str, ...]:
        """One: "causal"."""
        return ("causal",)

    @property
    def weights(self) -> tuple[float, ...]:
        """All of the examples."""
        return (1.0,)

    def lengths(self, tokens: int) -> tuple[int, int]:
        """0 for the encoder, the tokens and EOS for the decoder."""
        return 0, tokens + self.eos

    def sentinels_needed(self, tokens: int) -> int:
        """None."""
        return 0

    def only(self, denoiser: str) -> "Causal":
        """Itself."""
        if denoiser not in self.denoisers:
            raise unknown("denoiser", denoiser, self.denoisers)
        return self

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> Example:
        """The example of int32[L] tokens; nothing is drawn."""
        example = teacher_forced(
            np.empty(0, np.int32), tokens, np.arange(len(tokens)), special_tokens=special_tokens, eos=self.eos
        )
        if self.context > 0.0:
            # rounded as UL2's suffix is, so that both count the same tokens
            counted = min(max(round(len(tokens) * (1.0 - self.context)), 1), len(tokens) - 1)
            example.weights[: len(tokens) - counted] = 0.0
        return example
