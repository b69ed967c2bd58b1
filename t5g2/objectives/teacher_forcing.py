"""Teacher forcing: the decoder reads what it has just been asked for."""

import numpy as np

from t5g2.core.batch import Example
from t5g2.core.special_tokens import SpecialTokens


def teacher_forced(
    encoder_tokens: np.ndarray,
    targets: np.ndarray,
    origins: np.ndarray,
    *,
    special_tokens: SpecialTokens,
    eos: bool,
    denoiser: int = 0,
) -> Example:
    """The example whose decoder inputs are BOS and the targets but the last; every target counts 1.

    With bos = 2, eos = 1, targets [14 15], which are tokens 3 and 4 of the text:

        decoder_tokens  [ 2 14 15]
        targets         [14 15  1]
        weights         [ 1  1  1]
        origins         [ 3  4 -1]
    """
    # both at once, and then apart: whoever changes one must not change the other
    tokens = np.empty(len(targets) + 1 + eos, np.int32)
    tokens[0] = special_tokens.bos
    tokens[1 : len(targets) + 1] = targets
    if eos:
        tokens[-1] = special_tokens.eos
    places = np.empty(len(tokens) - 1, np.int32)
    places[: len(targets)] = origins
    places[len(targets) :] = -1  # EOS, if there is one
    weights = np.ones(len(tokens) - 1, np.float32)
    return Example(encoder_tokens, tokens[:-1].copy(), tokens[1:].copy(), weights, denoiser, origins=places)
