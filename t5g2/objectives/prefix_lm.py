"""PrefixLM: a model reads the beginning of a text, seeing both ways, and writes the rest.

Of an encoder-decoder the encoder reads it (PrefixLM); of a decoder-only model the decoder does, whose tokens see each
other both ways there (PrefixLMDecoder). Both ask for the same targets of the same examples.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from t5g2.core.batch import Example
from t5g2.core.errors import UserError, unknown
from t5g2.core.objective import Objective
from t5g2.core.special_tokens import SpecialTokens
from t5g2.objectives.teacher_forcing import teacher_forced

# of the places in and about a UTF-8 character, which has at most 4 bytes, the furthest from one beside it, where the
# other side is the end of the chunk
MAX_SHIFT = 3


@dataclass(frozen=True)
class PrefixLM(Objective):
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
      eos: the targets end in EOS, also where a chunk is not the end of its document. The papers do not say.
      split_at: "token" = anywhere; "character" = never inside a character that is several tokens; "text" = nor between
        two special tokens, such as those of one image. A fixed share moves to the nearest such place, the left one of
        two; a chunk that has none, or none within three tokens ("character"), is split where it would have been.
    """

    prefix: float | Literal["uniform"] = 0.5
    eos: bool = True
    split_at: Literal["token", "character", "text"] = "token"

    def __post_init__(self):
        if self.prefix != "uniform" and not 0.0 < self.prefix < 1.0:
            raise UserError(f'prefix = {self.prefix}; it is a share of the tokens between 0 and 1, or "uniform"')

    @property
    def is_stochastic(self) -> bool:
        """If every split is equally likely."""
        return self.prefix == "uniform"

    @property
    def denoisers(self) -> tuple[str, ...]:
        """One: "prefix_lm"."""
        return ("prefix_lm",)

    @property
    def weights(self) -> tuple[float, ...]:
        """All of the examples."""
        return (1.0,)

    def lengths(self, tokens: int) -> tuple[int, int]:
        """The longest prefix, and the longest rest with EOS."""
        if self.prefix == "uniform" or self.split_at == "text":
            return tokens - 1, tokens - 1 + self.eos
        split, moved = _share(tokens, self.prefix), MAX_SHIFT if self.split_at == "character" else 0
        return min(split + moved, tokens - 1), min(tokens - split + moved, tokens - 1) + self.eos

    def sentinels_needed(self, tokens: int) -> int:
        """None."""
        return 0

    def check_tokenizer(self, special_tokens: SpecialTokens, vocab_size: int) -> None:
        """Raises UserError if characters are to be kept whole and no token is known to be a byte."""
        if self.split_at != "token" and special_tokens.first_byte is None:
            raise UserError(
                f"split_at = {self.split_at!r}, and the tokenizer has no tokens for the 256 bytes by which a part of a "
                f'character is known; take split_at = "token"'
            )

    def only(self, denoiser: str) -> "PrefixLM":
        """Itself."""
        if denoiser not in self.denoisers:
            raise unknown("denoiser", denoiser, self.denoisers)
        return self

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> Example:
        """The example of int32[L] tokens, L >= 2; only "uniform" draws anything."""
        split = self.split(tokens, rng, special_tokens=special_tokens)
        places = np.arange(split, len(tokens))
        return teacher_forced(tokens[:split], tokens[split:], places, special_tokens=special_tokens, eos=self.eos)

    def split(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> int:
        """How many of the tokens are the prefix."""
        length = len(tokens)
        places = None if self.split_at == "token" else self._places(tokens, special_tokens)
        if self.prefix == "uniform":
            nth = int(rng.integers(1, length if places is None else len(places) + 1))
            return nth if places is None else int(places[nth - 1])
        split = _share(length, self.prefix)
        if places is None:
            return split
        nearest = int(places[np.argmin(np.abs(places - split))])
        return split if self.split_at == "character" and abs(nearest - split) > MAX_SHIFT else nearest

    def _places(self, tokens: np.ndarray, special_tokens: SpecialTokens) -> np.ndarray:
        """int64[places]: the splits that part nothing that belongs together; if there are none, all."""
        joined = special_tokens.is_continuation(tokens)[1:]
        if self.split_at == "text":
            special = special_tokens.is_special(tokens)
            joined |= special[1:] & special[:-1]
        return np.flatnonzero(~joined if not joined.all() else joined) + 1


@dataclass(frozen=True)
class PrefixLMDecoder(PrefixLM):
    """PrefixLM for a decoder-only model (arXiv 1910.10683, section 3.2: prefix LM): the baseline that encoder-decoders
    are compared with. Nothing has to be adapted.

    Two halves, with bos = 2, eos = 1, tokens [11 12 13 14 15]; inputs of block 1 see each other both ways:

        encoder_tokens  []
        decoder_tokens  [ 2 11 12 13 14 15]
        blocks          [ 1  1  1  0  0  0]
        targets         [11 12 13 14 15  1]
        weights         [ 0  0  1  1  1  1]

    The targets that count are PrefixLM's. The others would be no question: their inputs see the answer.
    """

    @property
    def uses_blocks(self) -> bool:
        """True."""
        return True

    def lengths(self, tokens: int) -> tuple[int, int]:
        """0 for the encoder, the tokens and EOS for the decoder."""
        return 0, tokens + self.eos

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> Example:
        """The example of int32[L] tokens, L >= 2."""
        split = self.split(tokens, rng, special_tokens=special_tokens)
        example = teacher_forced(
            np.empty(0, np.int32), tokens, np.arange(len(tokens)), special_tokens=special_tokens, eos=self.eos
        )
        example.weights[:split] = 0.0
        blocks = np.zeros(len(example.targets), np.int32)
        blocks[: split + 1] = 1  # BOS too
        return replace(example, blocks=blocks)


def _share(tokens: int, share: float) -> int:
    """`share` of the tokens, rounded half to even, at least 1 and at most all but one."""
    return min(max(round(tokens * share), 1), tokens - 1)
