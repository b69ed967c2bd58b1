"""The interface of every source's documents."""

import abc
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from t5g2.data.tokenizers.base import Tokenizer

OnBadRecord = Literal["stop", "skip"]

# fewer tokens do not become a chunk: such a document is left out, and if the last chunk of a document would be that
# short, the last two are equally long instead
SHORTEST_TOKENS = 8


class Documents(abc.ABC):
    """Texts in a fixed order.

    Of texts in files, a pickle holds only file, offset and size, 24 bytes per document; the files are read again.
    """

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits, a hash of the texts in their order."""

    @property
    @abc.abstractmethod
    def characters(self) -> int:
        """Number of characters of all texts."""

    @property
    @abc.abstractmethod
    def skipped(self) -> int:
        """Number of records that were left out."""

    @property
    def problems(self) -> tuple[str, ...]:
        """The first few records that were left out, each with the reason."""
        return ()

    @property
    def has_pairs(self) -> bool:
        """True if each document is a pair of inputs and targets (core/pairs.py), not a text."""
        return False

    @property
    def is_indivisible(self) -> bool:
        """True if a document is never cut, and never left out because it is short."""
        return self.has_pairs

    @property
    def has_token_ranges(self) -> bool:
        """True if `token_range` reads little more than the range; otherwise it reads the whole document."""
        return False

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> str: ...

    def token_lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        """Returns int64[documents], the number of tokens of each; reads all of them."""
        return np.array([tokenizer.count(self[i]) for i in range(len(self))], np.int64)

    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        """Returns int32[tokens] of a document."""
        return tokenizer.encode_document(self[index])

    def token_range(self, index: int, start: int, end: int, tokenizer: Tokenizer) -> np.ndarray:
        """Returns int32[end - start], tokens start to end - 1 of a document."""
        return self.tokens(index, tokenizer)[start:end]


@runtime_checkable
class Openable(Protocol):
    """Any source of text: those of text_source.py, the wrappers that a run puts around them, and a user's own."""

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """Returns the source's documents."""
        ...
