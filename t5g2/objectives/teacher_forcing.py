"""Teacher forcing: the decoder's inputs are BOS and its targets, shifted by one."""

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
    """Returns the example whose decoder inputs are BOS and all targets but the last; every target has weight 1.

    With bos = 2, eos = 1, targets [14 15], origins [3 4]:

        decoder_tokens  [ 2 14 15]
        targets         [14 15  1]
        weights         [ 1  1  1]
        origins         [ 3  4 -1]
    """
    # inputs and targets are slices of one array, and copied: a change of one must not change the other
    tokens = np.empty(len(targets) + 1 + eos, np.int32)
    tokens[0] = special_tokens.bos
    tokens[1 : len(targets) + 1] = targets
    if eos:
        tokens[-1] = special_tokens.eos
    target_origins = np.empty(len(tokens) - 1, np.int32)
    target_origins[: len(targets)] = origins
    target_origins[len(targets) :] = -1  # EOS, if there is one
    weights = np.ones(len(tokens) - 1, np.float32)
    return Example(encoder_tokens, tokens[:-1].copy(), tokens[1:].copy(), weights, denoiser, origins=target_origins)
