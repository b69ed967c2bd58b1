"""Where text comes from: documents in a fixed order, read when asked for, and cut into chunks of tokens."""

import threading
from typing import Literal

import numpy as np

from t5g2.core.errors import UserError
from t5g2.data.shards.token_cache import CachedText
from t5g2.data.sources.dialogues import FilteredChat
from t5g2.data.sources.documents import SHORTEST_TOKENS, Documents, OnBadRecord
from t5g2.data.sources.image_documents import FilteredImageText, Fitted
from t5g2.data.sources.text_source import TextSource
from t5g2.data.tokenizers.base import Tokenizer

LongDocuments = Literal["split", "truncate"]

# A share of bad records above this is no accident.
MAX_SKIPPED = 0.01
# 32 MiB a source in every process that reads.
RECENT_TOKENS = 1 << 23


class Chunks:
    """Documents as chunks of at most `chunk_tokens` tokens; every token of every document is in just one of them.

    A document of n tokens gives full chunks and the rest; a rest under SHORTEST_TOKENS is not left alone: the last two
    chunks then share their tokens evenly. With chunk_tokens = 16, documents of 40, 34 and 7 tokens:

        [16 16 8]   [16 9 9]   [] (too short: left out, and counted in `dropped`)

    With long_documents = "truncate" a document is its first chunk and no more: [16] [16] [].

    Attributes:
      documents: what is cut.
      tokens: of all chunks.
      dropped: documents that are too short.
      truncated: documents whose rest is left out.
    """

    def __init__(
        self, documents: Documents, tokenizer: Tokenizer, chunk_tokens: int, *, long_documents: LongDocuments = "split"
    ):
        self.documents = documents
        self._tokenizer = tokenizer
        self._lengths = lengths = documents.token_lengths(tokenizer)
        if documents.is_indivisible and lengths.max() > chunk_tokens:
            what = "pair of inputs and targets" if documents.has_pairs else "document that is not to be cut"
            raise UserError(
                f"a {what} has {lengths.max()} tokens{' with the number in front' * documents.has_pairs}, and chunk_tokens "
                f"is {chunk_tokens}; raise it to at least that"
            )
        shortest = 1 if documents.is_indivisible else SHORTEST_TOKENS
        self.dropped = int(np.sum(lengths < shortest))
        lengths = np.where(lengths < shortest, 0, lengths)
        self.truncated = int(np.sum(lengths > chunk_tokens)) if long_documents == "truncate" else 0
        lengths = np.minimum(lengths, chunk_tokens) if long_documents == "truncate" else lengths
        self.tokens = int(lengths.sum())
        self._document, self._start, self._end = _cut(lengths, chunk_tokens)
        self._kept = RecentTokens()

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, index: int) -> np.ndarray:
        """int32[tokens] of a chunk."""
        document, start, end = int(self._document[index]), int(self._start[index]), int(self._end[index])
        tokens = self._kept.get(document)
        if tokens is None:
            tokens = self.documents.tokens(document, self._tokenizer)
            if len(tokens) != self._lengths[document]:
                raise UserError(
                    f"document {document} has {len(tokens)} tokens, and had {self._lengths[document]} when its source "
                    f"was opened; the files have changed: restore them, or start again with the text as it is"
                )
            if end - start < len(tokens):
                self._kept.put(document, tokens)
        return tokens[start:end]

    def image(self, index: int, nth: int) -> np.ndarray:
        """uint8[size, size, 3], an image of a chunk of a text with images."""
        assert isinstance(self.documents, Fitted), "only texts with images have pictures"
        return self.documents.image(int(self._document[index]), nth)

    def __repr__(self) -> str:
        return f"Pieces({len(self)})"


class RecentTokens:
    """The tokens of the documents that were read last, up to `KEPT_TOKENS` in all.

    Chunks of a document come far apart, and each would read and tokenise all of it. A copy or a pickle is empty.
    """

    def __init__(self):
        self._held: dict[int, np.ndarray] = {}
        self._tokens = 0
        self._lock = threading.Lock()

    def __reduce__(self):
        return RecentTokens, ()

    def get(self, document: int) -> np.ndarray | None:
        """int32[tokens] of a document, read-only, if they are kept."""
        return self._held.get(document)

    def put(self, document: int, tokens: np.ndarray) -> None:
        """Keeps a document's tokens, which nobody writes to any more, and forgets what was kept longest."""
        tokens.flags.writeable = False
        with self._lock:
            if len(tokens) > RECENT_TOKENS or document in self._held:
                return
            self._held[document] = tokens
            self._tokens += len(tokens)
            while self._tokens > RECENT_TOKENS:
                self._tokens -= len(self._held.pop(next(iter(self._held))))


def _cut(lengths: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each chunk its document and where it starts and ends there, in tokens."""
    counts = -(-lengths // chunk)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * chunk
    length, count = lengths[document], counts[document]
    rest = length - (count - 1) * chunk
    is_last = (number == count - 1) & (count > 1) & (rest < SHORTEST_TOKENS)
    start[is_last] -= (chunk - rest[is_last]) // 2
    end = np.append(start[1:], 0)
    end[number == count - 1] = length[number == count - 1]
    return document, start, end


def describe(name: str, chunks: Chunks) -> str:
    """One line for the log: how much text a source has."""
    documents = chunks.documents
    parts = [f"{len(documents):,} {'pairs' if documents.has_pairs else 'documents'}"]
    parts += [f"{documents.characters:,} characters"] if documents.characters else []
    parts += [f"{chunks.tokens:,} tokens"]
    parts += [f"{len(chunks):,} chunks"]
    parts += [f"{chunks.dropped:,} documents too short"] if chunks.dropped else []
    parts += [f"{chunks.truncated:,} documents cut off"] if chunks.truncated else []
    parts += [f"{documents.skipped:,} bad records left out"] if documents.skipped else []
    return f"{name}: {', '.join(parts)}"


def check_skipped(text: object, documents: Documents, max_skipped: float) -> None:
    """Raises UserError if more than a share of a text's records is left out."""
    records = len(documents) + documents.skipped
    if documents.skipped > max_skipped * records:
        first = ["The first:", *documents.problems] if documents.problems else []
        raise UserError(
            f"{text}: {documents.skipped} of {records} records cannot be read, and max_skipped = {max_skipped:g} of "
            f"them may be left out; mend them, or raise max_skipped. {f'{chr(10)}  '.join(first)}".rstrip()
        )


def open_chunks(
    text: TextSource | FilteredImageText | FilteredChat | CachedText,
    tokenizer: Tokenizer,
    *,
    chunk_tokens: int,
    on_bad_record: OnBadRecord,
    max_skipped: float = MAX_SKIPPED,
    pairs: bool = False,
    long_documents: LongDocuments = "split",
) -> Chunks:
    """The chunks of a source of text.

    Args:
      max_skipped: the largest share of the records that may be skipped.
      pairs: whether pairs of inputs and targets are wanted.
      long_documents: what becomes of a document of more than chunk_tokens.

    Raises:
      UserError: it is missing, empty or malformed, too much of it is, or no document is long enough.
    """
    documents = text.open(on_bad_record=on_bad_record)
    if documents.has_pairs != pairs:
        has, wants = ("pairs of inputs and targets", "text") if documents.has_pairs else ("text", "pairs")
        raise UserError(
            f"{text} has {has}, and {wants} is asked for; the objective seq2seq takes pairs, which seqio "
            f"tasks give, and all others take text"
        )
    check_skipped(text, documents, max_skipped)
    chunks = Chunks(documents, tokenizer, chunk_tokens, long_documents=long_documents)
    if not len(chunks):
        raise UserError(
            f"{text}: {chunks.dropped} documents, all of fewer than {SHORTEST_TOKENS} tokens; give longer ones"
        )
    return chunks
