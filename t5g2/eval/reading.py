"""Settings with which a model reads and ends texts: the tokenizer, and the ids around what it encodes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from t5g2.core.bounds import TokenId, checked
from t5g2.core.logs import log
from t5g2.data.tokenizers.base import Tokenizer
from t5g2.models.config import LanguageModelConfig


class ImagePrompt(NamedTuple):
    """A prompt with images.

    Attributes:
      tokens: int32[T], without BOS.
      images: float32 as the image tower reads them, in the order of their tokens.
    """

    tokens: np.ndarray
    images: Float[np.ndarray, "I H W 3"]


@dataclass(frozen=True)
@checked
class Reading:
    """Settings with which a model reads texts.

    Attributes:
      tokenizer: turns text into ids.
      bos: first token that a decoder-only model reads.
      decoder_start: first token of the decoder of an encoder-decoder model.
      encoder_bos: the input of the encoder begins with `bos`.
      stop_ids: tokens that end a text.
      suppressed_ids: tokens that are never generated.
      read_images: reads a prompt with its images; None = the model takes text only.
    """

    tokenizer: Tokenizer
    bos: TokenId
    decoder_start: TokenId
    encoder_bos: bool = False
    stop_ids: tuple[TokenId, ...] = ()
    suppressed_ids: tuple[TokenId, ...] = ()
    read_images: Callable[[str, Sequence[Any]], ImagePrompt] | None = None

    @classmethod
    def trained(cls, tokenizer: Tokenizer, stop_ids: Sequence[int] = ()) -> "Reading":
        """Returns the settings that the objectives train: BOS before the decoder's tokens alone, EOS at the end."""
        special_tokens = tokenizer.special_tokens
        ends = tuple(dict.fromkeys((special_tokens.eos, *stop_ids)))
        return cls(tokenizer, special_tokens.bos, special_tokens.bos, stop_ids=ends)

    def inputs(self, tokens: np.ndarray, *, is_encoder_decoder: bool) -> np.ndarray:
        """Returns int32[T]: the tokens of a prompt after BOS where the model reads one, and at least one token."""
        has_bos = len(tokens) > 0 and tokens[0] == self.bos  # the text spells it
        if not has_bos and (self.encoder_bos or not is_encoder_decoder or not len(tokens)):
            return np.append(np.int32(self.bos), tokens).astype(np.int32)
        return tokens


def warn_beyond_context(task: str, lengths: Sequence[int], config: LanguageModelConfig) -> None:
    """Logs how many inputs, of so many tokens each, are longer than the model's context; they are read whole."""
    context = (config.encoder_stack or config.decoder_stack).context
    beyond = [length for length in lengths if length > context]
    if beyond:
        log.warning(
            "evaluation task %r: %s of %s inputs are longer than the model's context of %s tokens (longest: %s), "
            "which are read whole; scores may be lower for it",
            task,
            *(f"{number:,}" for number in (len(beyond), len(lengths), context, max(beyond))),
        )
