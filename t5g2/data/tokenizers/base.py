"""The interface of every tokenizer: text to ids and back, special tokens by name."""

import abc
from collections.abc import Iterable, Sequence
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

    def encode_document(self, text: str) -> np.ndarray:
        """Returns int32[tokens] of a text of a corpus: plain, unless the tokenizer is set to parse special tokens."""
        return self.encode_plain(text)

    @property
    def parses_spellings(self) -> bool:
        """True if `encode` turns the spelling of a special token in a text into that token."""
        return False

    def count(self, text: str) -> int:
        """Returns the number of tokens that `encode_document` returns."""
        return len(self.encode_document(text))

    def byte_counts(self, tokens: Any) -> np.ndarray:
        """Returns int32 of the shape of `tokens`: the bytes of text, in UTF-8, that each stands for; special ones 0.

        Their sum over a text's tokens is the size of the text, whatever characters its tokens cut.
        """
        tokens = np.asarray(tokens)
        ids, inverse = np.unique(tokens, return_inverse=True)
        is_text = ~self.special_tokens.is_special(ids) & (ids >= 0) & (ids < self.vocab_size)
        counts = np.zeros(len(ids), np.int32)
        counts[is_text] = [len(part) for part in self.token_bytes(ids[is_text].tolist())]
        return counts[inverse].reshape(tokens.shape)

    def show(self, tokens: Any) -> str:
        """Returns the text of a sequence of ids for people, with special tokens by name: <eos>, <sentinel_3>, …

        Bytes that are not UTF-8 become U+FFFD. Ids past the vocabulary become <unused_ID>; a padded embedding has such.
        """
        names = {token: name for name, token in self.named().items()}
        special_tokens = self.special_tokens
        text: list[str] = []
        # consecutive ids of text, decoded together: a character may take several tokens
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
            text += [self._text(run), name]
            run = []
        return "".join([*text, self._text(run)])

    @abc.abstractmethod
    def decode(self, tokens: Any, *, skip_special_tokens: bool = False) -> str:
        """Returns the text that ids stand for, as transformers does.

        Special is what the tokenizer itself calls so: not <unused…>, which Gemma models use as markers of their own.
        Bytes that are not UTF-8 become U+FFFD; ids that the tokenizer does not have are left out.
        """

    def settled(self, tokens: Sequence[int]) -> int:
        """Returns the number of tokens in front whose text, but for U+FFFD at its end, stays when more tokens come."""
        return len(tokens)

    def token_bytes(self, ids: Iterable[int] | None = None) -> list[bytes]:
        """Returns the bytes that each of the ids adds to a text that goes before it; None = all below `vocab_size`.

        A special token adds its spelling, an id that stands for nothing b"".
        """
        return [self.decode([token]).encode() for token in (range(self.vocab_size) if ids is None else ids)]

    @abc.abstractmethod
    def _text(self, tokens: Iterable[int]) -> str:
        """Returns the text of ids, none of which is a special token."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Returns 16 hex digits, different for tokenizers that encode a text differently."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for a model folder, from which registry.from_dict makes the tokenizer."""
