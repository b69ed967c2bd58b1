"""Counts of special tokens that are spelled in a corpus: text, unless the tokenizer is set to parse them."""

import collections
from typing import NamedTuple

import numpy as np

from t5g2.core.errors import UserError
from t5g2.data.sources.documents import Documents
from t5g2.data.tokenizers.base import Tokenizer

SAMPLE_CHARACTERS = 1_000_000


class Spellings(NamedTuple):
    """Spelled special tokens of a source.

    Attributes:
      counts: {spelling: number of times}, the most frequent first.
      documents: number of documents, from the first on, that were searched.
    """

    counts: dict[str, int]
    documents: int


def count(documents: Documents, tokenizer: Tokenizer, *, characters: int = SAMPLE_CHARACTERS) -> Spellings:
    """Returns the spelled special tokens of the first documents; of a source that is kept as tokens, of none.

    Args:
      characters: searching ends with the document in which so many have been read.
    """
    counts: collections.Counter[str] = collections.Counter()
    read = number = 0
    if not tokenizer.parses_spellings:
        return Spellings({}, 0)
    while number < len(documents) and read < characters:
        try:
            text = documents[number]
        except UserError:  # tokens without their text
            break
        tokens = tokenizer.encode(text)
        found, times = np.unique(tokens[tokenizer.special_tokens.is_special(tokens)], return_counts=True)
        for token, number_of_times in zip(found, times.tolist(), strict=True):
            spelling = tokenizer.decode(token[None])
            # what the vocabulary lacks is special too, and not spelled
            if spelled := min(number_of_times, text.count(spelling) if spelling else 0):
                counts[spelling] += spelled
        read, number = read + len(text), number + 1
    return Spellings(dict(counts.most_common()), number)
