"""Strings that end an output, found while it is generated, wherever the borders of tokens fall.

The bytes of a text go through an automaton of all the strings (Aho and Corasick, 1975), whose states say how much of
each string has just been read. A table has the state after every token, so that decoding looks up one number a row:

    stop strings "\\n\\n" and "END"; states 0 = nothing, 1 = "\\n", 2 = "E", 3 = "EN", 4 = found
    tokens   "a"  "\\n"  "x\\n"  "ND"
    after 0    0    1     1     0
    after 1    0    4     1     0
    after 2    0    1     1     4
    after 3    0    1     1     0
    after 4    4    4     4     4

S states, V ids.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int

from t5g2.core.errors import UserError
from t5g2.data.tokenizers.base import Tokenizer

# entries of a table, of 4 bytes each
LARGEST_TABLE = 2**28


class StopTable(NamedTuple):
    """The automaton of some stop strings; state 0 has read nothing of any, the last state has found one.

    Attributes:
      next_SV: int32[S, V], the state after a token.
    """

    next_SV: Int[Array | np.ndarray, "S V"]

    def after(self, state_R: Array, token_R: Array) -> Array:
        """Returns the states of rows after one more token."""
        return self.next_SV[state_R, token_R]

    def found(self, state_R: Array) -> Array:
        """Returns True for rows that have one of the strings."""
        return state_R == self.next_SV.shape[0] - 1


def stop_table(strings: Sequence[str], token_bytes: Sequence[bytes]) -> StopTable:
    """Returns the table of stop strings.

    Args:
      strings: the strings, none of them empty.
      token_bytes: the bytes that each id adds to a text.

    Raises:
      UserError: a string is empty; the strings together are too long.
    """
    if not all(strings):
        raise UserError("a stop string is empty, and every text has it; leave it out")
    patterns = [string.encode() for string in strings]
    most = LARGEST_TABLE // max(len(token_bytes), 1)
    if (length := sum(map(len, patterns))) > most:
        raise UserError(
            f"stop has {length:,} bytes of text; with the {len(token_bytes):,} ids of this model it may have at most "
            f"{most:,}; give shorter strings"
        )
    next_S256 = _automaton(patterns)
    lengths_V = np.array([len(text) for text in token_bytes])
    # the longest first, so that the ids that have a j-th byte are the first ones
    order_V = np.argsort(-lengths_V, kind="stable")
    longest = int(lengths_V.max(initial=0))
    bytes_VL = np.zeros((len(token_bytes), longest), np.uint8)
    for row, token in enumerate(order_V.tolist()):
        bytes_VL[row, : lengths_V[token]] = np.frombuffer(token_bytes[token], np.uint8)
    reached_SV = np.repeat(np.arange(len(next_S256), dtype=np.int32)[:, None], len(token_bytes), axis=1)
    for j in range(longest):
        ids = int((lengths_V > j).sum())
        reached_SV[:, :ids] = next_S256[reached_SV[:, :ids], bytes_VL[None, :ids, j]]
    next_SV = np.empty_like(reached_SV)
    next_SV[:, order_V] = reached_SV
    return StopTable(next_SV)


# the table of a large vocabulary takes seconds, and runs ask with the same strings again and again
@functools.lru_cache(maxsize=4)
def table_of(strings: tuple[str, ...], tokenizer: Tokenizer, vocab_size: int) -> StopTable:
    """Returns the table of stop strings for a model of so many ids, of which the tokenizer may have fewer."""
    token_bytes = tokenizer.token_bytes()[:vocab_size]
    return stop_table(strings, token_bytes + [b""] * (vocab_size - len(token_bytes)))


def first_stop(text: str, strings: Sequence[str]) -> int | None:
    """Returns the place of the first of the strings in a text; None if it has none."""
    return min((place for string in strings if (place := text.find(string)) >= 0), default=None)


def without_begun_stop(text: str, strings: Sequence[str]) -> str:
    """Returns the text without an end with which one of the strings may begin: what may be shown of it already."""
    begun = [n for string in strings for n in range(1, len(string)) if text.endswith(string[:n])]
    return text[: len(text) - max(begun, default=0)]


def _automaton(patterns: Sequence[bytes]) -> np.ndarray:
    """Returns int32[S, 256], the state after each byte; the last state has found a pattern, and stays."""
    # states are what has been read of a pattern, shorter ones first
    prefixes = sorted({pattern[:n] for pattern in patterns for n in range(len(pattern))}, key=lambda p: (len(p), p))
    numbers, found = {prefix: number for number, prefix in enumerate(prefixes)}, len(prefixes)
    numbers |= dict.fromkeys(patterns, found)
    next_S256 = np.zeros((found + 1, 256), np.int32)
    next_S256[found] = found
    # the state of the longest proper end of each prefix with which a pattern begins: where its other bytes lead
    ends = [0] * (found + 1)
    for number, prefix in enumerate(prefixes):
        if number:
            ends[number] = int(next_S256[ends[numbers[prefix[:-1]]], prefix[-1]]) if len(prefix) > 1 else 0
            next_S256[number] = next_S256[ends[number]]
        for byte in {pattern[len(prefix)] for pattern in patterns if pattern.startswith(prefix) and pattern != prefix}:
            if next_S256[number, byte] != found:
                next_S256[number, byte] = numbers[prefix + bytes([byte])]
    return next_S256
