"""What every objective is: a frozen dataclass that turns a chunk of text into an Example, and knows its bounds."""

import abc
from collections.abc import Sequence

import numpy as np

from t5g2.core.batch import Example
from t5g2.core.special_tokens import SpecialTokens


class Objective(abc.ABC):
    """What is asked of a model about a chunk of text. The example follows from tokens, rng and special tokens alone."""

    @property
    @abc.abstractmethod
    def denoisers(self) -> tuple[str, ...]:
        """The names that an example's `denoiser` counts in."""

    @property
    @abc.abstractmethod
    def weights(self) -> tuple[float, ...]:
        """The share of each denoiser, of the examples or of their targets; the shares sum to 1."""

    @property
    def uses_blocks(self) -> bool:
        """Whether examples have blocks: decoder tokens that see each other both ways, in a decoder-only model."""
        return False

    @property
    def is_stochastic(self) -> bool:
        """Whether an example depends on the rng, so that a chunk gives another one in every epoch."""
        return True

    @property
    def takes_pairs(self) -> bool:
        """Whether a chunk is a pair of inputs and targets (core/pairs.py), not a text."""
        return False

    @property
    def takes_images(self) -> bool:
        """Whether a chunk may have images: then their tokens are read, and none of them is a target that counts."""
        return False

    def text(self, tokens: np.ndarray) -> np.ndarray:
        """The text that an example's `origins` count in: the tokens themselves, unless they are a pair."""
        return tokens

    @abc.abstractmethod
    def lengths(self, tokens: int) -> tuple[int, int]:
        """The longest encoder and decoder sequences that a chunk of up to `tokens` tokens can become."""

    @abc.abstractmethod
    def sentinels_needed(self, tokens: int) -> int:
        """The most different sentinels that a chunk of up to `tokens` tokens can take."""

    def check_tokenizer(self, special_tokens: SpecialTokens, vocab_size: int) -> None:  # noqa: B027
        """Does nothing if the tokenizer has what this objective takes, sentinels apart.

        Raises:
          UserError: it lacks a token.
        """

    def infilling(
        self, tokens: np.ndarray, starts: Sequence[int], span: int, *, special_tokens: SpecialTokens
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """A prompt in which spans of `span` tokens from `starts` on are missing, as this objective's examples have it,
        and what is asked for, without EOS; None if it takes no spans away.
        """
        del tokens, starts, span, special_tokens
        return None

    @abc.abstractmethod
    def only(self, denoiser: str) -> "Objective":
        """This objective with one of its denoisers alone.

        Raises:
          UserError: it has no denoiser of that name.
        """

    @abc.abstractmethod
    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> Example:
        """The example made of int32[L] tokens, L >= 2."""
