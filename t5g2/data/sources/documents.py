"""Documents: what every source of text gives."""

import abc
from typing import Literal

import numpy as np

from t5g2.data.tokenizers.base import Tokenizer

OnBadRecord = Literal["stop", "skip"]

# Documents and chunks of fewer tokens are not worth a place: a document this short is left out, and a text that would
# end in a chunk this short ends in two equal ones instead.
SHORTEST_TOKENS = 8


class Documents(abc.ABC):
    """Texts in a fixed order. A pickle of them says where they are, 24 bytes each, and reads the files again."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits of the texts and their order."""

    @property
    @abc.abstractmethod
    def characters(self) -> int:
        """Of all texts."""

    @property
    @abc.abstractmethod
    def skipped(self) -> int:
        """Records that could not be read and were left out."""

    @property
    def problems(self) -> tuple[str, ...]:
        """The first of the records that were left out, and what is wrong with each."""
        return ()

    @property
    def has_pairs(self) -> bool:
        """Whether each is a pair of inputs and targets (core/pairs.py), not a text."""
        return False

    @property
    def is_indivisible(self) -> bool:
        """Whether each is kept whole: not cut, and not left out because it is short."""
        return self.has_pairs

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> str: ...

    def token_lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        """int64[documents]: how many tokens each has; reads all of them."""
        return np.array([tokenizer.count(self[i]) for i in range(len(self))], np.int64)

    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        """int32[tokens] of a document."""
        return tokenizer.encode(self[index])
