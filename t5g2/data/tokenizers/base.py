"""The interface of every tokenizer: text to ids and back, special tokens by name."""

import abc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from t5g2.core.errors import unknown
from t5g2.core.special_tokens import SpecialTokens


class Tokenizer(abc.ABC):
    """Text to ids and back. A tokenizer is a frozen dataclass that data workers can unpickle."""

    @property
    @abc.abstractmethod
    def special_tokens(self) -> SpecialTokens:
        """The ids of the special tokens."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id that `encode` returns."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that are copied into a model folder, in addition to `to_dict`."""
        return ()

    @abc.abstractmethod
    def named(self) -> dict[str, int]:
        """Returns the ids of the tokenizer's special tokens by name; sentinels are left out."""

    def id(self, name: str) -> int:
        """Returns the id of a special token: "eos", "image", "sentinel_3", …

        Raises:
          UserError: there is no such token.
        """
        first, count = self.special_tokens.first_sentinel, self.special_tokens.sentinels
        names = self.named() | {f"sentinel_{k}": first + k for k in range(count)}
        if name not in names:
            raise unknown("special token", name, names)
        return names[name]

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Returns int32[tokens]: the text alone, without BOS or EOS."""

    def encode_plain(self, text: str) -> np.ndarray:
        """Returns int32[tokens] without special tokens: spellings of special tokens are tokenised like other text."""
        return self.encode(text)

    def count(self, text: str) -> int:
        """Returns the number of tokens that `encode` returns."""
        return len(self.encode(text))

    def decode(self, tokens: Any, *, show_special_tokens: bool = True) -> str:
        """Returns the text of a sequence of ids, with special tokens as <eos>, <sentinel_3>, …, or without them.

        Bytes that are not UTF-8 become U+FFFD. Ids past the vocabulary become <unused_ID>; a padded embedding has such.
        """
        names = {token: name for name, token in self.named().items()}
        special_tokens = self.special_tokens
        text: list[str] = []
        # Consecutive ids of text, decoded together: a character may take several tokens.
        run: list[int] = []
        for token in np.asarray(tokens).tolist():
            sentinel = token - special_tokens.first_sentinel
            if token in names:
                name = f"<{names[token]}>"
            elif 0 <= sentinel < special_tokens.sentinels:
                name = f"<sentinel_{sentinel}>"
            elif not 0 <= token < self.vocab_size:
                name = f"<unused_{token}>"
            else:
                run.append(token)
                continue
            text += [self.text(run), name if show_special_tokens else ""]
            run = []
        return "".join([*text, self.text(run)])

    @abc.abstractmethod
    def text(self, tokens: Iterable[int]) -> str:
        """Returns the text of ids, none of which is a special token."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Returns 16 hex digits, different for tokenizers that encode a text differently."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for a model folder, from which registry.from_dict makes the tokenizer."""
