"""A tokenizer without a file: the bytes of UTF-8."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from typing_extensions import override

from t5g2.core.bounds import LONGEST, Bounds, checked
from t5g2.core.special_tokens import SpecialTokens
from t5g2.data.tokenizers.base import Tokenizer

# the first five ids are those of Gemma's tokenizers; image tokens and sentinels follow directly; Gemma has them at
# the far end of its 262144 pieces
NAMES = ("pad", "eos", "bos", "unk", "mask", "start_of_image", "end_of_image", "image")


@dataclass(frozen=True)
@checked
class Bytes(Tokenizer):
    """UTF-8 bytes after the special tokens; nothing to download, nothing unknown.

    With sentinels = 2: ids 0 to 7 are pad, eos, bos, unk, mask, start_of_image, end_of_image, image; 8 and 9 are the
    sentinels; byte b is id 10 + b, so that encode("Hi") = [10 + 72, 10 + 105].

    Attributes:
      sentinels: number of sentinels; an example uses each at most once.
    """

    sentinels: Annotated[int, Bounds(least=0, most=LONGEST)] = 100

    @property
    @override
    def special_tokens(self) -> SpecialTokens:
        ids = {name: NAMES.index(name) for name in ("pad", "eos", "bos", "unk", "mask")}
        others = tuple(range(len(ids), len(NAMES)))
        ids |= {name: NAMES.index(name) for name in ("image", "end_of_image")}
        return SpecialTokens(
            **ids, first_sentinel=len(NAMES), sentinels=self.sentinels, others=others, first_byte=self.first_byte
        )

    @property
    def first_byte(self) -> int:
        """The id of byte 0."""
        return len(NAMES) + self.sentinels

    @property
    @override
    def vocab_size(self) -> int:
        return self.first_byte + 256

    @override
    def named(self) -> dict[str, int]:
        return {name: token for token, name in enumerate(NAMES)}

    @override
    def count(self, text: str) -> int:
        return len(text.encode())

    @override
    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + np.int32(self.first_byte)

    @override
    def decode(self, tokens: Any, *, skip_special_tokens: bool = False) -> str:
        if not skip_special_tokens:
            return self.show([token for token in np.asarray(tokens).tolist() if 0 <= token < self.vocab_size])
        # sentinels have no meaning to a reader, and bytes have no other tokens that a model could use as markers
        return self._text(token for token in np.asarray(tokens).tolist() if self.first_byte <= token < self.vocab_size)

    @override
    def token_bytes(self, ids: Iterable[int] | None = None) -> list[bytes]:
        first = self.first_byte
        return [
            self.show([token]).encode() if token < first else bytes([token - first])
            for token in (range(self.vocab_size) if ids is None else ids)
        ]

    @override
    def _text(self, tokens: Iterable[int]) -> str:
        return bytes(token - self.first_byte for token in tokens).decode(errors="replace")

    @override
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([NAMES, self.to_dict()], sort_keys=True).encode()).hexdigest()[:16]

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"kind": "bytes", "sentinels": self.sentinels}
