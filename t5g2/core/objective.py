"""The interface of training objectives."""

import abc
from collections.abc import Sequence
from typing import Self

import numpy as np
from typing_extensions import override

from t5g2.core.batch import Example
from t5g2.core.errors import unknown
from t5g2.core.special_tokens import SpecialTokens


class Objective(abc.ABC):
    """A training objective: a frozen dataclass and a pure function (tokens, rng, special tokens) -> Example."""

    @property
    @abc.abstractmethod
    def denoisers(self) -> tuple[str, ...]:
        """Names of the denoisers; an example's `denoiser` is an index into them."""

    @property
    @abc.abstractmethod
    def weights(self) -> tuple[float, ...]:
        """Share of each denoiser in the examples, or in their targets (UL2.mixing); the shares sum to 1."""

    @property
    def identity(self) -> str:
        """Text that is equal only for objectives that make the same examples; stored on disk, so it must not change."""
        return repr(self)

    @property
    def uses_blocks(self) -> bool:
        """True if examples have `blocks`: bidirectional attention among tokens of a decoder-only model."""
        return False

    @property
    def is_stochastic(self) -> bool:
        """True if an example depends on the rng, so that a chunk becomes a different example in every epoch."""
        return True

    @property
    def takes_pairs(self) -> bool:
        """True if a chunk is a pair of inputs and targets (core/pairs.py) and not a text."""
        return False

    @property
    def takes_labels(self) -> bool:
        """True if the pair is a text and its label (data/sources/labelled_text.py), which a probe predicts."""
        return False

    @property
    def appends_eos(self) -> bool:
        """True if it appends EOS to the targets of a pair, of which the source has not done so."""
        return False

    @property
    def takes_images(self) -> bool:
        """True if a chunk may have images: their tokens are inputs, and targets only without a loss."""
        return False

    def text(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the text that `origins` are positions in: the tokens themselves, unless they are a pair."""
        return tokens

    @abc.abstractmethod
    def lengths(self, tokens: int) -> tuple[int, int]:
        """Returns the maximum encoder and decoder lengths of a chunk of up to `tokens` tokens."""

    @abc.abstractmethod
    def sentinels_needed(self, tokens: int) -> int:
        """Returns the maximum number of different sentinels for a chunk of up to `tokens` tokens."""

    def check_tokenizer(self, special_tokens: SpecialTokens, vocab_size: int) -> None:  # noqa: B027
        """Checks that the tokenizer has the special tokens that this objective uses, except sentinels.

        Raises:
          UserError: a special token is missing or unusable.
        """

    def infilling(
        self, tokens: np.ndarray, starts: Sequence[int], span: int, *, special_tokens: SpecialTokens
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns a fill-in prompt and its targets without EOS, as this objective has them; None if it has no spans.

        Args:
          starts: first token of each span that is removed.
          span: length of each span in tokens.
        """
        del tokens, starts, span, special_tokens
        return None

    @abc.abstractmethod
    def only(self, denoiser: str) -> "Objective":
        """Returns this objective restricted to one of its denoisers.

        Raises:
          UserError: it has no denoiser of that name.
        """

    @abc.abstractmethod
    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> Example:
        """Returns the example that is made of int32[L] tokens, L >= 2."""


class OneDenoiser(Objective):
    """An objective with a single denoiser, without sentinels."""

    @property
    @override
    def weights(self) -> tuple[float, ...]:
        return (1.0,)

    @override
    def sentinels_needed(self, tokens: int) -> int:
        return 0

    @override
    def only(self, denoiser: str) -> Self:
        if denoiser not in self.denoisers:
            raise unknown("denoiser", denoiser, self.denoisers)
        return self
