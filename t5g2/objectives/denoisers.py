"""Denoisers, and the mixtures of denoisers of the papers."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from t5g2.core.bounds import LONGEST, Bounds, Size, checked
from t5g2.core.errors import UserError


@dataclass(frozen=True)
@checked
class Denoiser:
    """One way to corrupt a text.

    Of L tokens, round(L * rate) are noise (at least 1, never all): they move from the input to the targets. Which
    tokens are noise depends on the field that is set:

      mean_span  round(noise / mean_span) spans at random positions, each replaced by a sentinel
      count      this many spans at random positions, each replaced by a sentinel; a single span is the end of the text
      neither    the end of the text, without a sentinel: a prefix language model (UL2's S-denoiser)

    Attributes:
      name: unique in its mixture; the label of its losses.
      rate: share of noise tokens, between 0 and 1. "uniform", for a prefix language model only: every split is equally
        likely, as in T5's random_prefix_noise_mask.
      mean_span: mean length of a span in tokens, at least 1.
      weight: probability of this denoiser, relative to the others.
      mode: name of the mode token that its inputs begin with; "" = none.
      count: number of spans, at least 1; a text that is too short for them has fewer.
    """

    name: str
    rate: Annotated[float, Bounds(above=0, below=1)] | Literal["uniform"]
    mean_span: Annotated[float, Bounds(least=1, most=LONGEST)] | None = None
    weight: Annotated[float, Bounds(above=0, hint="to leave the denoiser out, remove it")] = 1.0
    mode: str = ""
    count: Size | None = None

    def __post_init__(self):
        named = f"denoiser {self.name!r} has"
        if self.mean_span is not None and self.count is not None:
            raise UserError(
                f"{named} mean_span {self.mean_span} and count {self.count}; one follows from the other; set only one"
            )
        if self.rate == "uniform" and not self.is_prefix:
            raise UserError(
                f'{named} rate "uniform" and spans; give a number, or leave mean_span and count out: only the split '
                f"of a prefix language model can be random"
            )

    @property
    def is_prefix(self) -> bool:
        """True if the noise is the end of the text, without a sentinel."""
        return self.mean_span is None and self.count is None

    def noise_tokens(self, tokens: int) -> int:
        """Returns the maximum number of noise tokens among `tokens` tokens."""
        if self.rate == "uniform":
            return tokens - 1
        return min(max(round(tokens * self.rate), 1), tokens - 1)

    def mean_noise_tokens(self, tokens: int) -> float:
        """Returns the expected number of noise tokens."""
        return tokens / 2 if self.rate == "uniform" else self.noise_tokens(tokens)

    def draw_noise_tokens(self, tokens: int, rng: np.random.Generator) -> int:
        """Returns the number of noise tokens of one example; random only if the rate is "uniform"."""
        return int(rng.integers(1, tokens)) if self.rate == "uniform" else self.noise_tokens(tokens)

    def spans(self, tokens: int) -> int:
        """Returns the number of noise spans."""
        if self.is_prefix:
            return 1
        noise = self.noise_tokens(tokens)
        count = self.count if self.mean_span is None else round(noise / self.mean_span)
        # a noise span has at least one token, and so has the kept span before it
        return min(max(count or 0, 1), noise, tokens - noise)

    def sentinels(self, tokens: int) -> int:
        """Returns the number of sentinels: one for each span."""
        return 0 if self.is_prefix else self.spans(tokens)

    def lengths(self, tokens: int) -> tuple[int, int]:
        """Returns the maximum lengths of the input and of the targets, with sentinels, without EOS."""
        if self.rate == "uniform":
            return tokens - 1, tokens - 1
        noise, sentinels = self.noise_tokens(tokens), self.sentinels(tokens)
        return tokens - noise + sentinels, noise + sentinels


# T5, arXiv 1910.10683, section 3.3.4: 15 % of the tokens in spans of 3 on average
T5 = (Denoiser("span_corruption", rate=0.15, mean_span=3.0),)

# T5Gemma 2, arXiv 2512.14856, section 3.1: five tasks (mean span, rate), sampled 1:1:1:1:4. The fifth, one span of 3/4
# of the text, is taken to be the end of the text, like UL2's S-denoiser (arXiv 2205.05131). The paper leaves this open,
# and also the unit of the ratio: examples (as here) or tokens.
T5GEMMA2 = (
    Denoiser("mu3_r15", rate=0.15, mean_span=3.0),
    Denoiser("mu12_r50", rate=0.5, mean_span=12.0),
    Denoiser("mu32_r15", rate=0.15, mean_span=32.0),
    Denoiser("mu32_r50", rate=0.5, mean_span=32.0),
    Denoiser("suffix_r75", rate=0.75, weight=4.0),
)

# UL2, arXiv 2205.05131, table 1, as two public implementations restate it (theblackcat102/unify-learning-paradigms,
# Finnish-NLP): R- and X-denoisers (mean span, rate), and the S-denoiser, one span of 1/4 of the text, whose sentinel
# the model card's prompts end with (google/ul2). Known deviation: the weights are not published; here they are equal.
UL2_ORIGINAL = (
    Denoiser("mu3_r15", rate=0.15, mean_span=3.0, mode="NLU"),
    Denoiser("mu8_r15", rate=0.15, mean_span=8.0, mode="NLU"),
    Denoiser("suffix_r25", rate=0.25, count=1, mode="S2S"),
    Denoiser("mu3_r50", rate=0.5, mean_span=3.0, mode="NLG"),
    Denoiser("mu8_r50", rate=0.5, mean_span=8.0, mode="NLG"),
    Denoiser("mu64_r15", rate=0.15, mean_span=64.0, mode="NLG"),
    Denoiser("mu64_r50", rate=0.5, mean_span=64.0, mode="NLG"),
)
