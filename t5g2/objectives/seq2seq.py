"""Pairs of inputs and targets that a source gives ready-made, such as seqio's tasks."""

from dataclasses import dataclass

import numpy as np

from t5g2.core import pairs
from t5g2.core.batch import Example
from t5g2.core.errors import UserError, unknown
from t5g2.core.objective import Objective
from t5g2.core.special_tokens import SpecialTokens
from t5g2.objectives.teacher_forcing import teacher_forced


@dataclass(frozen=True)
class Seq2Seq(Objective):
    """The encoder reads the inputs, the decoder is asked for the targets; every target counts.

    With bos = 2, inputs [11 12 13], targets [21 22 1] (core/pairs.py says how a pair is one array):

        encoder_tokens  [11 12 13]
        decoder_tokens  [ 2 21 22]
        targets         [21 22  1]
        weights         [ 1  1  1]

    Attributes:
      inputs_tokens, targets_tokens: the most tokens of either; the source's own bounds.
      eos: EOS follows the targets. Not by default, because seqio's tasks append it themselves.
    """

    inputs_tokens: int
    targets_tokens: int
    eos: bool = False

    def __post_init__(self):
        for name in ("inputs_tokens", "targets_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}; it must be at least 1")

    @property
    def takes_pairs(self) -> bool:
        """True."""
        return True

    @property
    def is_stochastic(self) -> bool:
        """No."""
        return False

    @property
    def denoisers(self) -> tuple[str, ...]:
        """One: "seq2seq"."""
        return ("seq2seq",)

    @property
    def weights(self) -> tuple[float, ...]:
        """All of the examples."""
        return (1.0,)

    def text(self, tokens: np.ndarray) -> np.ndarray:
        """The inputs and the targets."""
        return tokens[1:]

    def lengths(self, tokens: int) -> tuple[int, int]:
        """The bounds of the inputs, and of the targets with EOS; a pair has a number in front."""
        return min(self.inputs_tokens, tokens - 1), min(self.targets_tokens, tokens - 1) + self.eos

    def sentinels_needed(self, tokens: int) -> int:
        """None."""
        return 0

    def only(self, denoiser: str) -> "Seq2Seq":
        """Itself."""
        if denoiser not in self.denoisers:
            raise unknown("denoiser", denoiser, self.denoisers)
        return self

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> Example:
        """The example of a pair; nothing is drawn.

        Raises:
          UserError: the inputs or the targets are longer than the bounds.
        """
        inputs, targets = pairs.split(tokens)
        if len(inputs) > self.inputs_tokens or len(targets) > self.targets_tokens:
            raise UserError(
                f"a pair has {len(inputs)} inputs and {len(targets)} targets, and the objective's inputs_tokens = "
                f"{self.inputs_tokens} and targets_tokens = {self.targets_tokens}; raise these to the source's"
            )
        places = np.arange(len(inputs), len(inputs) + len(targets))
        return teacher_forced(inputs.copy(), targets, places, special_tokens=special_tokens, eos=self.eos)
