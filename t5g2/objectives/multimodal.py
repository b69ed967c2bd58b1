"""Multimodal PrefixLM: a model reads a text up to the end of its last image, and writes the rest.

T5Gemma 2's objective for vision data (arXiv 2512.14856, section 3.1), for encoder-decoder (MultimodalPrefixLM) and
decoder-only models (MultimodalPrefixLMDecoder).
"""

from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from t5g2.core.errors import UserError
from t5g2.core.objective import Objective
from t5g2.core.special_tokens import SpecialTokens
from t5g2.objectives.prefix_lm import PrefixLM, PrefixLMDecoder


class _SplitAfterLastImage(Objective):
    """A prefix language model whose prefix ends with the last image of a chunk."""

    @property
    @override
    def takes_images(self) -> bool:
        return True

    @property
    @override
    def denoisers(self) -> tuple[str, ...]:
        return ("multimodal",)

    @override
    def check_tokenizer(self, special_tokens: SpecialTokens, vocab_size: int) -> None:
        super().check_tokenizer(special_tokens, vocab_size)
        if special_tokens.image < 0:
            raise UserError(
                "the tokenizer has no image token; set the id that the model uses for it: tokenizer.ids = "
                '[["image", 256001], …]'
            )

    def split(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> int:
        """Returns the number of tokens in the prefix.

        Raises:
          UserError: nothing follows the last image.
        """
        images = np.flatnonzero(tokens == special_tokens.image)
        if not len(images):
            return super().split(tokens, rng, special_tokens=special_tokens)  # pyright: ignore[reportAttributeAccessIssue]
        split = int(images[-1]) + 1
        # an image ends with a token of its own, if the tokenizer has one
        split += bool(tokens[split : split + 1] == special_tokens.end_of_image)
        if split == len(tokens):
            raise UserError(
                f"a chunk of {len(tokens)} tokens ends with an image, so there is no target; give texts in which "
                f"something follows the last image"
            )
        return split


@dataclass(frozen=True)
class MultimodalPrefixLM(_SplitAfterLastImage, PrefixLM):
    """Everything up to the end of the last image is the encoder's input, the rest is the decoder's target.

    With bos = 2, eos = 1, images between 5 and 6, image token 7, tokens [10 5 7 7 6 11 5 7 7 6 12 13]:

        encoder_tokens  [10  5  7  7  6 11  5  7  7  6]
        decoder_tokens  [ 2 12 13]
        targets         [12 13  1]
        weights         [ 1  1  1]

    So an image is never a target. A chunk without an image is split like PrefixLM's; a chunk that ends with its last
    image is an error (sources of texts with images refuse such records).

    Attributes:
      prefix, split_at: as in PrefixLM, for chunks without an image.
      eos: the targets end in EOS.
    """

    @override
    def lengths(self, tokens: int) -> tuple[int, int]:
        # the last image may be anywhere, so either side may have all tokens but one
        return tokens - 1, tokens - 1 + self.eos


@dataclass(frozen=True)
class MultimodalPrefixLMDecoder(_SplitAfterLastImage, PrefixLMDecoder):
    """MultimodalPrefixLM for a decoder-only model: attention within the prefix, images included, is bidirectional.

    With bos = 2, eos = 1, an image between 5 and 6, image token 7, tokens [10 5 7 7 6 11 12]:

        encoder_tokens  []
        decoder_tokens  [ 2 10  5  7  7  6 11 12]
        blocks          [ 1  1  1  1  1  1  0  0]
        targets         [10  5  7  7  6 11 12  1]
        weights         [ 0  0  0  0  0  1  1  1]

    The targets with a loss are MultimodalPrefixLM's. Known deviation from Gemma 3, where attention is bidirectional
    only within one image, and the text before an image has a loss.
    """
