"""An offset on the scores of the encoder's keys at the start of training: a soft start of merged attention."""

from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from t5g2.core.bounds import Bounds, Count, checked


@dataclass(frozen=True)
@checked
class EncoderOffset:
    """An offset that is added to the scores of the encoder's keys in merged attention, and rises in a line to 0.

    exp(offset) multiplies the weight of every encoder key before the softmax: -8 is a factor of 1/3000, with which the
    decoder computes nearly what it did without an encoder. Only updates have it: evaluations, samples and what is
    exported are the model without it.

    Attributes:
      start: the offset of the first update.
      steps: updates until it is 0, where it stays.
    """

    start: Annotated[float, Bounds(least=-100, below=0)] = -8.0
    steps: Count = 10

    def at(self, step: Any) -> jax.Array:
        """Returns float32[], the offset of the update after `step` completed ones; exactly 0 from `steps` on.

        EncoderOffset(-8.0, 4): -8, -6, -4, -2, 0, 0, ...
        """
        left = 1.0 - jnp.asarray(step).astype(jnp.float32) / self.steps
        return self.start * jnp.maximum(left, 0.0)
