"""Rows of one example, for counts of FLOPs."""

import numpy as np

from t5g2.core.batch import Sequences, image_blocks
from t5g2.models import flops
from t5g2.models.config import LanguageModelConfig
from t5g2.models.flops import Counts

TEXT = 5


def count_lengths(config: LanguageModelConfig, *, encoder: int = 0, decoder: int, images: int = 0) -> Counts:
    """Returns the counts of one example with so many encoder and decoder tokens, including those of its images."""
    encodes = config.is_encoder_decoder
    image_config = config.image_stack.images

    def row(length: int, number: int) -> Sequences:
        tokens = np.full((1, max(length, 1)), TEXT)  # a row of padding if there are none
        segments = np.full_like(tokens, length > 0)
        if not number:
            return Sequences(tokens, segments, np.zeros_like(tokens))
        for image in range(number):
            start = image * (image_config.tokens + 1)  # a token of text between two
            tokens[0, start : start + image_config.tokens] = image_config.token
        blocks = None if encodes else image_blocks(tokens, image_config.token)
        return Sequences(tokens, segments, np.zeros_like(tokens), blocks)

    return flops.count_rows(config, row(encoder, images) if encodes else None, row(decoder, 0 if encodes else images))
