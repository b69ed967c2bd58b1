"""Teacher forcing: the decoder reads what it has just been asked for."""

import numpy as np

from t5g2.core.batch import Example
from t5g2.core.specials import Specials


def teacher_forced(
    encoder_tokens: np.ndarray, targets: np.ndarray, *, specials: Specials, eos: bool, denoiser: int = 0
) -> Example:
    """The example whose decoder inputs are BOS and the targets but the last; every target counts 1.

    With bos = 2, eos = 1, targets [14 15]:

        decoder_tokens  [ 2 14 15]
        targets         [14 15  1]
        weights         [ 1  1  1]
    """
    if eos:
        targets = np.append(targets, np.int32(specials.eos))
    decoder_tokens = np.empty_like(targets)
    decoder_tokens[0] = specials.bos
    decoder_tokens[1:] = targets[:-1]
    weights = np.ones(len(targets), np.float32)
    return Example(encoder_tokens, decoder_tokens, targets, weights, denoiser)
