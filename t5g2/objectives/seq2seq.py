"""Ready-made pairs of inputs and targets: two texts of a record, or the examples of seqio's tasks."""

from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from t5g2.core import pairs
from t5g2.core.batch import Example
from t5g2.core.bounds import Size, checked
from t5g2.core.errors import UserError
from t5g2.core.objective import OneDenoiser
from t5g2.core.special_tokens import SpecialTokens
from t5g2.objectives.teacher_forcing import teacher_forced


@dataclass(frozen=True)
@checked
class Seq2Seq(OneDenoiser):
    """The encoder reads the inputs, the decoder predicts the targets; all targets have a loss.

    With bos = 2, inputs [11 12 13], targets [21 22 1] (core/pairs.py has the format of a pair):

        encoder_tokens  [11 12 13]
        decoder_tokens  [ 2 21 22]
        targets         [21 22  1]
        weights         [ 1  1  1]

    Attributes:
      inputs_tokens, targets_tokens: the maximum number of tokens of inputs and of targets, as set for the source.
      eos: append EOS to the targets. Off by default, because the source pairs and seqio's tasks append it themselves.
    """

    inputs_tokens: Size
    targets_tokens: Size
    eos: bool = False

    @property
    @override
    def takes_pairs(self) -> bool:
        return True

    @property
    @override
    def appends_eos(self) -> bool:
        return self.eos

    @property
    @override
    def is_stochastic(self) -> bool:
        return False

    @property
    @override
    def denoisers(self) -> tuple[str, ...]:
        return ("seq2seq",)

    @override
    def text(self, tokens: np.ndarray) -> np.ndarray:
        return tokens[1:]  # without the number of inputs

    @override
    def lengths(self, tokens: int) -> tuple[int, int]:
        # the first token of a pair is the number of inputs
        return min(self.inputs_tokens, tokens - 1), min(self.targets_tokens, tokens - 1) + self.eos

    @override
    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> Example:
        """Returns the example of a pair.

        Raises:
          UserError: the inputs or the targets are longer than the maximum.
        """
        inputs, targets = pairs.split(tokens)
        if len(inputs) > self.inputs_tokens or len(targets) > self.targets_tokens:
            raise UserError(
                f"a pair has {len(inputs)} inputs and {len(targets)} targets, and the objective's inputs_tokens = "
                f"{self.inputs_tokens} and targets_tokens = {self.targets_tokens}; raise these to the source's"
            )
        origins = np.arange(len(inputs), len(inputs) + len(targets))
        return teacher_forced(inputs.copy(), targets, origins, special_tokens=special_tokens, eos=self.eos)
