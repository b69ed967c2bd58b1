"""PrefixLM: a model reads the beginning of a text with bidirectional attention, and writes the rest.

In an encoder-decoder the encoder reads the prefix (PrefixLM); in a decoder-only model the decoder does, with
bidirectional attention within the prefix (PrefixLMDecoder). Both have the same targets for the same text.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from typing_extensions import override

from t5g2.core.batch import Example
from t5g2.core.bounds import Bounds, checked
from t5g2.core.errors import UserError
from t5g2.core.objective import OneDenoiser
from t5g2.core.special_tokens import SpecialTokens
from t5g2.objectives.teacher_forcing import teacher_forced

# A UTF-8 character has at most 4 bytes, so a split inside one is at most 3 bytes from either of its ends. The nearer
# end does not always serve: it may be the end of the chunk, where no split is possible.
MAX_SHIFT = 3


@dataclass(frozen=True)
@checked
class PrefixLM(OneDenoiser):
    """The first part of the tokens is the encoder's input, the rest is the decoder's target.

    Two halves, with bos = 2, eos = 1, tokens [11 12 13 14 15]:

        encoder_tokens  [11 12]
        decoder_tokens  [ 2 13 14 15]
        targets         [13 14 15  1]
        weights         [ 1  1  1  1]

    With split_at="character", where byte b is id 100 + b, "aéb", whose é is two bytes, tokens [197 295 269 198]:

        encoder_tokens  [197]
        targets         [295 269 198  1]

    Attributes:
      prefix: the share of the tokens that the encoder reads, rounded, but at least one token and never all of them; 0.5
        as in T5Gemma (arXiv 2504.06225, section 3.3: two equal halves). "uniform" = every split is equally likely.
      eos: the targets end in EOS, even if a chunk is not the end of its document. The papers leave this open.
      split_at: allowed positions of the split. "token" = all; "character" = not inside a character of several tokens;
        "text" = also not between two special tokens, such as those of one image. With a fixed share the split moves to
        the nearest allowed position (the left one of two); it stays where it is if the chunk has none, or, with
        "character", none within three tokens.
    """

    prefix: Annotated[float, Bounds(above=0, below=1)] | Literal["uniform"] = 0.5
    eos: bool = True
    split_at: Literal["token", "character", "text"] = "token"

    @property
    @override
    def is_stochastic(self) -> bool:
        return self.prefix == "uniform"

    @property
    @override
    def denoisers(self) -> tuple[str, ...]:
        return ("prefix_lm",)

    @override
    def lengths(self, tokens: int) -> tuple[int, int]:
        if self.prefix == "uniform" or self.split_at == "text":
            return tokens - 1, tokens - 1 + self.eos
        split, shift = _share(tokens, self.prefix), MAX_SHIFT if self.split_at == "character" else 0
        return min(split + shift, tokens - 1), min(tokens - split + shift, tokens - 1) + self.eos

    @override
    def check_tokenizer(self, special_tokens: SpecialTokens, vocab_size: int) -> None:
        if self.split_at != "token" and special_tokens.first_byte is None:
            raise UserError(
                f"split_at = {self.split_at!r}, and the tokenizer has no tokens for the 256 bytes, which are needed to "
                f'recognise parts of a character; take split_at = "token"'
            )

    @override
    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> Example:
        split = self.split(tokens, rng, special_tokens=special_tokens)
        origins = np.arange(split, len(tokens))
        return teacher_forced(tokens[:split], tokens[split:], origins, special_tokens=special_tokens, eos=self.eos)

    def split(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> int:
        """Returns the number of tokens in the prefix."""
        length = len(tokens)
        splits = None if self.split_at == "token" else self._allowed_splits(tokens, special_tokens)
        if self.prefix == "uniform":
            # the number of an allowed split, from 1, so that each is equally likely
            nth = int(rng.integers(1, length if splits is None else len(splits) + 1))
            return nth if splits is None else int(splits[nth - 1])
        split = _share(length, self.prefix)
        if splits is None:
            return split
        nearest = int(splits[np.argmin(np.abs(splits - split))])
        # a longer run of continuation bytes is not a character
        return split if self.split_at == "character" and abs(nearest - split) > MAX_SHIFT else nearest

    def _allowed_splits(self, tokens: np.ndarray, special_tokens: SpecialTokens) -> np.ndarray:
        """Returns int64[N], the splits that keep characters and runs of special tokens whole; all if there are none."""
        # joined[i]: tokens i and i + 1 belong together
        joined = special_tokens.is_continuation(tokens)[1:]
        if self.split_at == "text":
            special = special_tokens.is_special(tokens)
            joined |= special[1:] & special[:-1]
        return np.flatnonzero(~joined if not joined.all() else joined) + 1


@dataclass(frozen=True)
class PrefixLMDecoder(PrefixLM):
    """PrefixLM for a decoder-only model (arXiv 1910.10683, section 3.2: prefix LM), the baseline of encoder-decoders.

    Two halves, with bos = 2, eos = 1, tokens [11 12 13 14 15]; attention within block 1 is bidirectional:

        encoder_tokens  []
        decoder_tokens  [ 2 11 12 13 14 15]
        blocks          [ 1  1  1  0  0  0]
        targets         [11 12 13 14 15  1]
        weights         [ 0  0  1  1  1  1]

    The targets with a loss are PrefixLM's. The others would be trivial: their inputs attend to the targets themselves.
    """

    @property
    @override
    def uses_blocks(self) -> bool:
        return True

    @override
    def lengths(self, tokens: int) -> tuple[int, int]:
        return 0, tokens + self.eos

    @override
    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> Example:
        split = self.split(tokens, rng, special_tokens=special_tokens)
        example = teacher_forced(
            np.empty(0, np.int32), tokens, np.arange(len(tokens)), special_tokens=special_tokens, eos=self.eos
        )
        example.weights[:split] = 0.0
        blocks = np.zeros(len(example.targets), np.int32)
        blocks[: split + 1] = 1  # BOS too
        return replace(example, blocks=blocks)


def _share(tokens: int, share: float) -> int:
    """Returns `share` of the tokens, rounded half to even, at least 1 and at most all but one."""
    return min(max(round(tokens * share), 1), tokens - 1)
