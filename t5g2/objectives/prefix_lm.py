"""PrefixLM: the encoder reads the beginning of a text, the decoder writes the rest."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from t5g2.core.batch import Example
from t5g2.core.errors import UserError, unknown
from t5g2.core.objective import Objective
from t5g2.core.specials import Specials
from t5g2.objectives.shift import teacher_forced


@dataclass(frozen=True)
class PrefixLM(Objective):
    """The first part of the tokens is the encoder's input, the rest is the decoder's target.

    Two halves, with bos = 2, eos = 1, tokens [11 12 13 14 15]:

        encoder_tokens  [11 12]
        decoder_tokens  [ 2 13 14 15]
        targets         [13 14 15  1]
        weights         [ 1  1  1  1]

    Attributes:
      prefix: the share of the tokens that the encoder reads, rounded, but at least one token and never all of them; 0.5
        as in T5Gemma (arXiv 2504.06225, section 3.3: two equal halves). "uniform" = every split is equally likely.
      eos: the targets end in EOS, also where a piece is not the end of its document. The papers do not say.
    """

    prefix: float | Literal["uniform"] = 0.5
    eos: bool = True

    def __post_init__(self):
        if self.prefix != "uniform" and not 0.0 < self.prefix < 1.0:
            raise UserError(f'prefix = {self.prefix}; it is a share of the tokens between 0 and 1, or "uniform"')

    @property
    def denoisers(self) -> tuple[str, ...]:
        """One: "prefix_lm"."""
        return ("prefix_lm",)

    @property
    def weights(self) -> tuple[float, ...]:
        """All of the examples."""
        return (1.0,)

    def lengths(self, tokens: int) -> tuple[int, int]:
        """The longest prefix, and the longest rest with EOS."""
        if self.prefix == "uniform":
            return tokens - 1, tokens - 1 + self.eos
        split = _share(tokens, self.prefix)
        return split, tokens - split + self.eos

    def sentinels_needed(self, tokens: int) -> int:
        """None."""
        return 0

    def only(self, denoiser: str) -> "PrefixLM":
        """Itself."""
        if denoiser not in self.denoisers:
            raise unknown("denoiser", denoiser, self.denoisers)
        return self

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, specials: Specials) -> Example:
        """The example of int32[L] tokens, L >= 2; only "uniform" draws anything."""
        length = len(tokens)
        split = int(rng.integers(1, length)) if self.prefix == "uniform" else _share(length, self.prefix)
        return teacher_forced(tokens[:split], tokens[split:], specials=specials, eos=self.eos)


def _share(tokens: int, share: float) -> int:
    """`share` of the tokens, rounded half to even, at least 1 and at most all but one."""
    return min(max(round(tokens * share), 1), tokens - 1)
