"""Labels of whole texts, predicted by a probe of the model (models/probe_head.py) from one state of each text.

T5Gemma's SuperGLUE protocol (arXiv 2504.06225, section 4): classification on the encoder's last state, or on the last
of a decoder-only model.
"""

from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from t5g2.core import pairs
from t5g2.core.batch import Example
from t5g2.core.objective import OneDenoiser
from t5g2.core.special_tokens import SpecialTokens


@dataclass(frozen=True)
class Probe(OneDenoiser):
    """The encoder reads the text, the decoder BOS alone; the one target, padding, stands for the label.

    With bos = 2, pad = 0, the text [11 12 13] and the label 1:

        encoder_tokens  [11 12 13]
        decoder_tokens  [ 2]
        targets         [ 0]
        weights         [ 1]
        label           1.0
    """

    @property
    @override
    def takes_pairs(self) -> bool:
        return True

    @property
    @override
    def takes_labels(self) -> bool:
        return True

    @property
    @override
    def is_stochastic(self) -> bool:
        return False

    @property
    @override
    def denoisers(self) -> tuple[str, ...]:
        return ("probe",)

    @override
    def text(self, tokens: np.ndarray) -> np.ndarray:
        return pairs.split(tokens)[0]

    @override
    def lengths(self, tokens: int) -> tuple[int, int]:
        # beside the text a pair has the number of its tokens, and the label
        return tokens - 2, 1

    @override
    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> Example:
        text, label = pairs.split(tokens)
        return self._example(text, np.array([special_tokens.bos], np.int32), label, special_tokens)

    def _example(
        self, encoder_tokens: np.ndarray, decoder_tokens: np.ndarray, label: np.ndarray, special_tokens: SpecialTokens
    ) -> Example:
        weights = np.zeros(len(decoder_tokens), np.float32)
        weights[-1] = 1.0
        return Example(
            encoder_tokens.copy(),
            decoder_tokens,
            np.full(len(decoder_tokens), special_tokens.pad, np.int32),
            weights,
            label=float(label.view(np.float32)[0]),
        )


@dataclass(frozen=True)
class ProbeDecoder(Probe):
    """Probe for a decoder-only model, which reads BOS and the text.

    With bos = 2, pad = 0, the text [11 12 13] and the label 1:

        encoder_tokens  []
        decoder_tokens  [ 2 11 12 13]
        targets         [ 0  0  0  0]
        weights         [ 0  0  0  1]
        label           1.0
    """

    @override
    def lengths(self, tokens: int) -> tuple[int, int]:
        return 0, tokens - 1

    @override
    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> Example:
        text, label = pairs.split(tokens)
        decoder_tokens = np.append(np.int32(special_tokens.bos), text).astype(np.int32)
        return self._example(np.empty(0, np.int32), decoder_tokens, label, special_tokens)
