"""Causal language modelling."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from typing_extensions import override

from t5g2.core.batch import Example
from t5g2.core.bounds import Bounds, checked
from t5g2.core.objective import OneDenoiser
from t5g2.core.special_tokens import SpecialTokens
from t5g2.objectives.teacher_forcing import teacher_forced


@dataclass(frozen=True)
@checked
class Causal(OneDenoiser):
    """Every token is predicted from those before it; there is no encoder input.

    With bos = 2, eos = 1, tokens [11 12 13 14]:

        encoder_tokens  []
        decoder_tokens  [ 2 11 12 13 14]
        targets         [11 12 13 14  1]
        weights         [ 1  1  1  1  1]

    With context=0.5 the first half is input only and has no loss, like the prefix of a prefix language model:

        weights         [ 0  0  1  1  1]

    Attributes:
      eos: the targets end in EOS, even if a chunk is not the end of its document.
      context: share of the tokens at the start that have no loss, at least 0 and below 1. With context = 1 - rate, the
        targets with a loss are exactly those of a UL2 suffix denoiser of that rate.
    """

    eos: bool = True
    context: Annotated[float, Bounds(least=0, below=1)] = 0.0

    @property
    @override
    def is_stochastic(self) -> bool:
        return False

    @property
    @override
    def denoisers(self) -> tuple[str, ...]:
        return ("causal",)

    @override
    def lengths(self, tokens: int) -> tuple[int, int]:
        return 0, tokens + self.eos

    @override
    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> Example:
        example = teacher_forced(
            np.empty(0, np.int32), tokens, np.arange(len(tokens)), special_tokens=special_tokens, eos=self.eos
        )
        if self.context > 0.0:
            # rounded like the suffix of UL2, so that both have a loss on the same tokens
            trained = min(max(round(len(tokens) * (1.0 - self.context)), 1), len(tokens) - 1)
            example.weights[: len(tokens) - trained] = 0.0
        return example
