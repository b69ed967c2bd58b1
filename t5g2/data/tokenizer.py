"""Tokenizers: text to ids and back, special tokens by name."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from t5g2.core.errors import UserError, unknown
from t5g2.core.specials import Specials

# The first five ids are those of Gemma's tokenizers; image tokens and sentinels, which Gemma has at the far end of its
# 262144 pieces, follow at once.
NAMED = ("pad", "eos", "bos", "unk", "mask", "start_of_image", "end_of_image", "image")


@dataclass(frozen=True)
class Bytes:
    """UTF-8 bytes after the special tokens; nothing to download, nothing unknown.

    With sentinels = 2: ids 0 to 7 are pad, eos, bos, unk, mask, start_of_image, end_of_image, image; 8 and 9 are the
    sentinels; byte b is id 10 + b, so that encode("Hi") = [10 + 72, 10 + 105].

    Attributes:
      sentinels: how many sentinels there are; an example uses each at most once.
    """

    sentinels: int = 100

    def __post_init__(self):
        if self.sentinels < 0:
            raise UserError(f"sentinels = {self.sentinels}; it must be at least 0")

    @property
    def specials(self) -> Specials:
        """The ids of the special tokens."""
        ids = {name: NAMED.index(name) for name in ("pad", "eos", "bos", "unk", "mask")}
        return Specials(**ids, first_sentinel=len(NAMED), sentinels=self.sentinels)

    @property
    def first_byte(self) -> int:
        """The id of byte 0."""
        return len(NAMED) + self.sentinels

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return self.first_byte + 256

    def id(self, name: str) -> int:
        """The id of a special token: "eos", "image", "sentinel_3", …

        Raises:
          UserError: there is no such token.
        """
        names = [*NAMED, *(f"sentinel_{k}" for k in range(self.sentinels))]
        if name not in names:
            raise unknown("special token", name, names)
        return names.index(name)

    def count(self, text: str) -> int:
        """How many tokens `encode` gives."""
        return len(text.encode())

    def encode(self, text: str) -> np.ndarray:
        """int32[tokens]: the text alone, without BOS or EOS."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + np.int32(self.first_byte)

    def decode(self, tokens: Any, *, show_specials: bool = True) -> str:
        """The text of a sequence of ids; special tokens as <eos>, <sentinel_3>, …, or left out.

        Bytes that are not UTF-8 become U+FFFD; ids past the vocabulary, which a padded embedding has, <unused_ID>.
        """
        text, run = [], bytearray()
        for token in np.asarray(tokens).tolist():
            if self.first_byte <= token < self.vocab_size:
                run.append(token - self.first_byte)
                continue
            text.append(run.decode(errors="replace"))
            run.clear()
            if show_specials:
                text.append(f"<{self._name(token)}>")
        return "".join(text) + run.decode(errors="replace")

    def fingerprint(self) -> str:
        """16 hex digits that differ between tokenizers that give different ids."""
        return hashlib.sha256(json.dumps([NAMED, self.to_dict()], sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that a model folder keeps; `from_dict` turns it back."""
        return {"kind": "bytes", "sentinels": self.sentinels}

    def _name(self, token: int) -> str:
        if 0 <= token < len(NAMED):
            return NAMED[token]
        if 0 <= token < self.first_byte:
            return f"sentinel_{token - len(NAMED)}"
        return f"unused_{token}"


Tokenizer = Bytes
BY_NAME = {"bytes": Bytes}


def from_dict(node: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` described.

    Raises:
      UserError: an unknown kind, or a damaged description.
    """
    fields = dict(node)
    kind = str(fields.pop("kind", None))
    if kind not in BY_NAME:
        raise unknown("tokenizer", kind, BY_NAME)
    try:
        return BY_NAME[kind](**fields)
    except TypeError:
        raise UserError(
            f"a {kind} tokenizer is not described by {sorted(fields)}; write the folder again with this version"
        ) from None
