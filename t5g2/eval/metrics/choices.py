"""Multiple choice by log-likelihood: which choice a model takes, by four rules.

C choices.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class ChoiceLikelihoods(NamedTuple):
    """Log-likelihoods of the choices of one example.

    Attributes:
      sums_C: log-probability of each choice after the context, in nats.
      unconditional_C: that after the unconditional context.
      tokens_C, bytes_C: length of each choice; at least 1.
    """

    sums_C: Float[np.ndarray, " C"]
    unconditional_C: Float[np.ndarray, " C"]
    tokens_C: Int[np.ndarray, " C"]
    bytes_C: Int[np.ndarray, " C"]


def rule_scores(choices: ChoiceLikelihoods) -> dict[str, Float[np.ndarray, " C"]]:
    """Returns {rule: score of each choice}; the highest is taken, of equal ones the first.

    Sums [-4 -6], 2 and 4 tokens, 4 and 12 bytes, and after an unconditional context [-3 -7]:

        accuracy             [-4   -6  ]    the log-likelihood itself
        accuracy_per_token   [-2   -1.5]    GPT-3, arXiv 2005.14165, section 2.4
        accuracy_per_byte    [-1   -0.5]    acc_norm of lm-evaluation-harness, which divides by characters
        accuracy_pmi         [-1    1  ]    how much likelier the context makes a choice (arXiv 2104.08315)
    """
    return {
        "accuracy": choices.sums_C,
        "accuracy_per_token": choices.sums_C / choices.tokens_C,
        "accuracy_per_byte": choices.sums_C / choices.bytes_C,
        "accuracy_pmi": choices.sums_C - choices.unconditional_C,
    }


def taken(choices: ChoiceLikelihoods) -> dict[str, int]:
    """Returns {rule: number of the choice that it takes}."""
    return {rule: int(np.argmax(scores_C)) for rule, scores_C in rule_scores(choices).items()}


def probabilities(choices: ChoiceLikelihoods) -> Float[np.ndarray, " C"]:
    """Returns the softmax of the log-likelihoods: what an area under the curve ranks."""
    exponents_C = np.exp(choices.sums_C - choices.sums_C.max())
    return exponents_C / exponents_C.sum()
