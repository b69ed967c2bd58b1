"""Tokenizer that needs no file: the bytes of UTF-8."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from t5g2.core.errors import UserError
from t5g2.core.special_tokens import SpecialTokens
from t5g2.data.tokenizers.base import Tokenizer

# The first five ids are those of Gemma's tokenizers; image tokens and sentinels, which Gemma has at the far end of its
# 262144 pieces, follow at once.
NAMED = ("pad", "eos", "bos", "unk", "mask", "start_of_image", "end_of_image", "image")


@dataclass(frozen=True)
class Bytes(Tokenizer):
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
    def special_tokens(self) -> SpecialTokens:
        """The ids of the special tokens."""
        ids = {name: NAMED.index(name) for name in ("pad", "eos", "bos", "unk", "mask")}
        others = tuple(range(len(ids), len(NAMED)))
        ids |= {name: NAMED.index(name) for name in ("image", "end_of_image")}
        return SpecialTokens(
            **ids, first_sentinel=len(NAMED), sentinels=self.sentinels, others=others, first_byte=self.first_byte
        )

    @property
    def first_byte(self) -> int:
        """The id of byte 0."""
        return len(NAMED) + self.sentinels

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return self.first_byte + 256

    def named(self) -> dict[str, int]:
        """The ids of the special tokens by name, the sentinels left out."""
        return {name: token for token, name in enumerate(NAMED)}

    def count(self, text: str) -> int:
        """How many tokens `encode` gives."""
        return len(text.encode())

    def encode(self, text: str) -> np.ndarray:
        """int32[tokens]: the text alone, without BOS or EOS."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + np.int32(self.first_byte)

    def text(self, tokens: Iterable[int]) -> str:
        """The text of ids that are no special tokens."""
        return bytes(token - self.first_byte for token in tokens).decode(errors="replace")

    def fingerprint(self) -> str:
        """16 hex digits that differ between tokenizers that give different ids."""
        return hashlib.sha256(json.dumps([NAMED, self.to_dict()], sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that a model folder keeps; `from_dict` turns it back."""
        return {"kind": "bytes", "sentinels": self.sentinels}
