"""Documents cut into chunks of tokens, of which examples are made."""

import threading
from typing import Literal

import numpy as np

from t5g2.core.errors import UserError
from t5g2.core.logs import log
from t5g2.data.sources.documents import SHORTEST_TOKENS, Documents, OnBadRecord, Openable
from t5g2.data.sources.image_documents import FilteredImageDocuments
from t5g2.data.tokenizers.base import Tokenizer

LongDocuments = Literal["split", "truncate"]

# a larger share of bad records points to a wrong format, not to single accidents
MAX_SKIPPED = 0.01
# of int32, so 32 MiB per source in every process that reads
RECENT_TOKENS = 1 << 23


class Chunks:
    """Documents as chunks of at most `chunk_tokens` tokens; every token of a document is in exactly one chunk.

    A document becomes full chunks and a rest. If the rest has fewer than SHORTEST_TOKENS tokens, the last full chunk
    and the rest are divided evenly instead. A document of fewer than SHORTEST_TOKENS tokens is left out. With
    chunk_tokens = 16, documents of 40, 34 and 7 tokens:

        [16 16 8]   [16 9 9]   [] (counted in `dropped`)

    With long_documents = "truncate" a document is its first chunk alone: [16] [16] [].

    Attributes:
      documents: the documents that are cut.
      tokens: number of tokens of all chunks.
      dropped: number of documents that are too short.
      truncated: number of documents whose rest is left out.
    """

    def __init__(
        self, documents: Documents, tokenizer: Tokenizer, chunk_tokens: int, *, long_documents: LongDocuments = "split"
    ):
        self.documents = documents
        self._tokenizer, self._chunk_tokens = tokenizer, chunk_tokens
        self._lengths = lengths = documents.token_lengths(tokenizer)
        if documents.is_indivisible and lengths.max() > chunk_tokens:
            unit = "pair of inputs and targets" if documents.has_pairs else "document that is not to be cut"
            raise UserError(
                f"a {unit} has {lengths.max()} tokens{' (with the number of inputs)' * documents.has_pairs}, and "
                f"chunk_tokens is {chunk_tokens}; raise it to at least that"
            )
        # a short pair or dialogue is a complete example, unlike a short text
        shortest = 1 if documents.is_indivisible else SHORTEST_TOKENS
        self.dropped = int(np.sum(lengths < shortest))
        lengths = np.where(lengths < shortest, 0, lengths)
        self.truncated = int(np.sum(lengths > chunk_tokens)) if long_documents == "truncate" else 0
        lengths = np.minimum(lengths, chunk_tokens) if long_documents == "truncate" else lengths
        self.tokens = int(lengths.sum())
        self._document, self._start, self._end = _cut(lengths, chunk_tokens)
        self._recent = RecentTokens()

    @property
    def longest_read_often(self) -> int:
        """Tokens of the longest document that may be read whole for each of its chunks; 0 if none is."""
        cut = self._lengths[self._lengths > self._chunk_tokens]
        # up to RECENT_TOKENS are held
        return int(cut.max()) if cut.sum() > RECENT_TOKENS and not self.documents.has_token_ranges else 0

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns int32[tokens] of a chunk."""
        document, start, end = int(self._document[index]), int(self._start[index]), int(self._end[index])
        if self.documents.has_token_ranges:
            return self.documents.token_range(document, start, end, self._tokenizer)
        tokens = self._recent.get(document)
        if tokens is None:
            tokens = self.documents.tokens(document, self._tokenizer)
            # the chunks were cut by the lengths at opening, so other tokens would be cut in wrong places
            if len(tokens) != self._lengths[document]:
                raise UserError(
                    f"document {document} has {len(tokens)} tokens, and had {self._lengths[document]} when its source "
                    f"was opened; the files have changed: restore them, or start again with the text as it is"
                )
            # a document that is one chunk is not read again before the next epoch
            if end - start < len(tokens):
                self._recent.put(document, tokens)
        return tokens[start:end]

    def image(self, index: int, nth: int) -> np.ndarray:
        """Returns uint8[size, size, 3], an image of a chunk of a text with images."""
        assert isinstance(self.documents, FilteredImageDocuments), "only texts with images have images"
        return self.documents.image(int(self._document[index]), nth)

    def __repr__(self) -> str:
        return f"Chunks({len(self)})"


class RecentTokens:
    """The tokens of the documents that were read last, up to RECENT_TOKENS in all, for documents that are read whole.

    The chunks of a document are shuffled far apart, and each would read and tokenise the whole document. A copy or a
    pickle is empty.
    """

    def __init__(self):
        self._held: dict[int, np.ndarray] = {}
        self._tokens = 0
        self._lock = threading.Lock()

    def __reduce__(self):
        return RecentTokens, ()

    def get(self, document: int) -> np.ndarray | None:
        """Returns int32[tokens] of a document, read-only; None if they are not held."""
        return self._held.get(document)

    def put(self, document: int, tokens: np.ndarray) -> None:
        """Holds a document's tokens, which become read-only, and drops those that were put first."""
        tokens.flags.writeable = False
        with self._lock:
            if len(tokens) > RECENT_TOKENS or document in self._held:
                return
            self._held[document] = tokens
            self._tokens += len(tokens)
            # a dict keeps the order of insertion, so its first key is the oldest
            while self._tokens > RECENT_TOKENS:
                self._tokens -= len(self._held.pop(next(iter(self._held))))


def _cut(lengths: np.ndarray, chunk_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns for each chunk its document, and its start and end there, in tokens."""
    counts = -(-lengths // chunk_tokens)
    document = np.repeat(np.arange(len(lengths)), counts)
    # the number of each chunk in its document: its index, less that of the document's first chunk
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * chunk_tokens
    length, count = lengths[document], counts[document]
    rest = length - (count - 1) * chunk_tokens
    # a short rest begins earlier, by half of the difference to the chunk before it, so that both are equally long
    is_short_rest = (number == count - 1) & (count > 1) & (rest < SHORTEST_TOKENS)
    start[is_short_rest] -= (chunk_tokens - rest[is_short_rest]) // 2
    # a chunk ends where the next begins, and the last one with its document
    end = np.append(start[1:], 0)
    end[number == count - 1] = length[number == count - 1]
    return document, start, end


def describe(name: str, chunks: Chunks) -> str:
    """Returns a line for the log with the size of a source."""
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
    """Raises UserError if more than this share of a source's records is left out."""
    records = len(documents) + documents.skipped
    if documents.skipped > max_skipped * records:
        problems = ["The first:", *documents.problems] if documents.problems else []
        raise UserError(
            f"{text}: {documents.skipped} of {records} records cannot be read, and max_skipped = {max_skipped:g} of "
            f"them may be left out; mend them, or raise max_skipped. {f'{chr(10)}  '.join(problems)}".rstrip()
        )


def open_chunks(
    text: Openable,
    tokenizer: Tokenizer,
    *,
    chunk_tokens: int,
    on_bad_record: OnBadRecord,
    max_skipped: float = MAX_SKIPPED,
    pairs: bool = False,
    long_documents: LongDocuments = "split",
) -> Chunks:
    """Opens a source of text and returns its chunks.

    Args:
      max_skipped: the largest share of the records that may be skipped.
      pairs: the objective takes pairs of inputs and targets.
      long_documents: treatment of a document of more than chunk_tokens.

    Raises:
      UserError: the source is missing, empty or malformed; too many records are bad; no document is long enough.
    """
    documents = text.open(on_bad_record=on_bad_record)
    if documents.has_pairs != pairs:
        actual, expected = ("pairs of inputs and targets", "text") if documents.has_pairs else ("text", "pairs")
        raise UserError(
            f"{text} has {actual}, and its objective takes {expected}; the objective seq2seq takes pairs, those "
            f"of the kind pairs or of seqio tasks, probe those of the kind labelled, and all others take text"
        )
    # before the chunks, for which every document is tokenised
    check_skipped(text, documents, max_skipped)
    chunks = Chunks(documents, tokenizer, chunk_tokens, long_documents=long_documents)
    if not len(chunks):
        raise UserError(
            f"{text}: {chunks.dropped} documents, all of fewer than {SHORTEST_TOKENS} tokens; give longer ones"
        )
    if longest := chunks.longest_read_often:
        log.warning(
            "%s: documents of up to %d tokens are read and tokenised for each of their chunks; with "
            "data.cache_tokens=true, or from `t5g2 tokenize`, only the chunk is read",
            text,
            longest,
        )
    return chunks
