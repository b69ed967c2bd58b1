"""Ids of a tokenizer's special tokens."""

from dataclasses import dataclass

import numpy as np

from t5g2.core.errors import UserError


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of special tokens. The `sentinels` sentinels have consecutive ids, and an example uses each at most once.

    Attributes:
      pad, eos, bos, unk, mask: 0 to 4 in Gemma's tokenizers (google-deepmind/gemma @ 7691fd4, gm/text/_tokenizer.py).
      first_sentinel, sentinels: the id of <sentinel_0>, and the number of sentinels.
      others: all other special tokens, such as those of images and of turns.
      image, end_of_image: the image token, and the token that ends an image; -1 = none. Both are also in others.
      first_byte: the id of byte 0, if the 256 bytes have consecutive ids; None = no token is a single byte.
    """

    pad: int
    eos: int
    bos: int
    unk: int
    mask: int
    first_sentinel: int
    sentinels: int
    others: tuple[int, ...] = ()
    first_byte: int | None = None
    image: int = -1
    end_of_image: int = -1

    def sentinel_ids(self, count: int) -> np.ndarray:
        """Returns int32[count], the ids of <sentinel_0>, <sentinel_1>, …

        Raises:
          UserError: the tokenizer has fewer.
        """
        if count > self.sentinels:
            raise UserError(
                f"an example needs {count} sentinels and the tokenizer has {self.sentinels}; give the tokenizer more "
                f"sentinels, or the objective shorter chunks, longer spans, a lower rate, or one of sentinels = "
                f'"cyclic" and "mask"'
            )
        return np.arange(self.first_sentinel, self.first_sentinel + count, dtype=np.int32)

    def cyclic_sentinel_ids(self, count: int) -> np.ndarray:
        """Returns int32[count], the ids of <sentinel_0>, <sentinel_1>, …, starting again after the last.

        With first_sentinel = 90, sentinels = 2, count = 5: [90 91 90 91 90].

        Raises:
          UserError: the tokenizer has none.
        """
        if count and not self.sentinels:
            raise UserError(f"an example needs sentinels for {count} spans and the tokenizer has none; give it some")
        return np.arange(count, dtype=np.int32) % np.int32(max(self.sentinels, 1)) + np.int32(self.first_sentinel)

    def is_sentinel(self, tokens: np.ndarray) -> np.ndarray:
        """Returns bool of the shape of `tokens`: True where a token replaces a span (a sentinel or the mask token)."""
        sentinel = (tokens >= self.first_sentinel) & (tokens < self.first_sentinel + self.sentinels)
        return sentinel | (tokens == self.mask) if self.mask >= 0 else sentinel

    def is_special(self, tokens: np.ndarray) -> np.ndarray:
        """Returns bool of the shape of `tokens`: True where a token is not text."""
        named = (self.pad, self.eos, self.bos, self.unk, self.mask, *self.others)
        return np.isin(tokens, named) | self.is_sentinel(tokens)

    def is_continuation(self, tokens: np.ndarray) -> np.ndarray:
        """Returns bool of the shape of `tokens`: True where a token is a later byte of a UTF-8 character."""
        if self.first_byte is None:
            return np.zeros(np.shape(tokens), bool)
        byte = tokens - self.first_byte  # continuation bytes are 10xxxxxx
        return (byte >= 0x80) & (byte < 0xC0)
