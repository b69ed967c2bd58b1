"""Where text comes from: documents in a fixed order, read when asked for, and cut into pieces of tokens."""

import glob
import hashlib
import json
import logging
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from t5g2.core.errors import UserError
from t5g2.data import copies
from t5g2.data.documents import Documents, OnBadRecord
from t5g2.data.shards import Tokens
from t5g2.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# A longer text file is read as several documents of about this size, so that a piece of it is near at hand.
SPAN_BYTES = 1 << 16

# A share of bad records above this is no accident.
MAX_SKIPPED = 0.01

# Of the bad records that are skipped, so many are named, and all are counted.
SHOWN_RECORDS = 10

# Documents and pieces of fewer tokens are not worth a place: a document this short is left out, and a text that would
# end in a piece this short ends in two equal ones instead.
SHORTEST_TOKENS = 8


@dataclass(frozen=True)
class PythonText:
    """English and code that ship with every Python: the language reference and the standard library.

    Documents are the topics of the language reference (`pydoc_data.topics`) and the top-level modules of the standard
    library, docstrings included, each one document, in the order of their names. Packages, tests and site-packages are
    left out. Which is held out follows from a document's name alone, so it stays what it is from Python to Python.

    Attributes:
      split: "train", "heldout" or "all".
      heldout_percent: how many of 100 documents are held out, about.
      max_bytes: stop adding documents, in an order drawn from their names, before there are more; 0 = all.
    """

    split: Literal["train", "heldout", "all"] = "train"
    heldout_percent: int = 10
    max_bytes: int = 0

    def __post_init__(self):
        if not 0 < self.heldout_percent < 100:
            raise UserError(f"heldout_percent = {self.heldout_percent}; it must be between 1 and 99")

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """The documents of this split; there are no bad records.

        Raises:
          UserError: this Python came without its library's sources.
        """
        texts = _python_texts()
        chosen, size = [], 0
        for name in sorted(texts, key=_rank):
            size += len(texts[name].encode())
            if self.max_bytes and size > self.max_bytes:
                break
            if self.split == "all" or (_rank(name) % 100 < self.heldout_percent) == (self.split == "heldout"):
                chosen.append(name)
        if not chosen:
            raise UserError(
                f"no document of the standard library is in split {self.split!r} with max_bytes = {self.max_bytes} and "
                f"heldout_percent = {self.heldout_percent}; raise them"
            )
        return _Texts(self, tuple(texts[name] for name in sorted(chosen)))


@dataclass(frozen=True)
class TextFiles:
    """UTF-8 text files, one document each; larger ones are several documents, cut at ends of lines.

    Attributes:
      path: a file, a folder (all files below it, hidden ones aside) or a pattern such as "corpus/**/*.txt"; here or at
        a URL (gs://…, s3://…); plain, or compressed if the name ends in .gz or .zst.
    """

    path: str

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """The documents, files in the order of their names.

        Raises:
          UserError: no file is found, all are empty, or one is not UTF-8 (unless those are skipped).
        """
        return _scan(self.path, _file_spans, None, on_bad_record)


@dataclass(frozen=True)
class Jsonl:
    """Files with a JSON object a line, one document each.

    Attributes:
      path: a file, a folder (all files below it, hidden ones aside) or a pattern such as "corpus/*.jsonl"; here or at
        a URL; plain, or compressed if the name ends in .gz or .zst.
      field: the key of the text.
    """

    path: str
    field: str = "text"

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """The documents, files in the order of their names; empty lines are none.

        Raises:
          UserError: no file is found, all are empty, or a line is no object with that text (unless those are skipped).
        """
        return _scan(self.path, _line_spans, self.field, on_bad_record)


@dataclass(frozen=True)
class Parquet:
    """Parquet files, a document a row (pip install 't5g2[parquet]').

    Attributes:
      path: a file, a folder (all files below it, hidden ones aside) or a pattern such as "corpus/*.parquet".
      field: the column of the text.
    """

    path: str
    field: str = "text"

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """The documents, files in the order of their names.

        Raises:
          UserError: no file is found, all are empty, one is damaged or has no such column, or a row has no text there
            (unless such rows are skipped).
        """
        return _scan(self.path, _line_spans, self.field, on_bad_record, column=self.field)


Text = PythonText | TextFiles | Jsonl | Parquet | Tokens
BY_NAME = {"python": PythonText, "text": TextFiles, "jsonl": Jsonl, "parquet": Parquet, "tokens": Tokens}


class Pieces:
    """Documents as pieces of at most `piece_tokens` tokens; every token of every document is in one of them.

    A document of n tokens gives full pieces and the rest; a rest under SHORTEST_TOKENS is not left alone: the last two
    pieces then share their tokens evenly. With piece_tokens = 16, documents of 40, 34 and 7 tokens:

        [16 16 8]   [16 9 9]   [] (too short: left out, and counted in `dropped`)

    Attributes:
      documents: what is cut.
      tokens: of all pieces.
      dropped: documents that are too short.
    """

    def __init__(self, documents: Documents, tokenizer: Tokenizer, piece_tokens: int):
        self.documents = documents
        self._tokenizer = tokenizer
        lengths = documents.token_lengths(tokenizer)
        self.dropped = int(np.sum(lengths < SHORTEST_TOKENS))
        lengths = np.where(lengths < SHORTEST_TOKENS, 0, lengths)
        self.tokens = int(lengths.sum())
        self._document, self._start, self._end = _cut(lengths, piece_tokens)

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, index: int) -> np.ndarray:
        """int32[tokens] of a piece."""
        tokens = self.documents.tokens(int(self._document[index]), self._tokenizer)
        return tokens[self._start[index] : self._end[index]]

    def __repr__(self) -> str:
        return f"Pieces({len(self)})"


def _cut(lengths: np.ndarray, piece: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each piece its document and where it starts and ends there, in tokens."""
    counts = -(-lengths // piece)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * piece
    length, count = lengths[document], counts[document]
    rest = length - (count - 1) * piece
    is_last = (number == count - 1) & (count > 1) & (rest < SHORTEST_TOKENS)
    start[is_last] -= (piece - rest[is_last]) // 2
    end = np.append(start[1:], 0)
    end[number == count - 1] = length[number == count - 1]
    return document, start, end


@dataclass(frozen=True, eq=False)
class _Texts(Documents):
    source: PythonText
    texts: tuple[str, ...]

    def __reduce__(self):
        return PythonText.open, (self.source,)

    @property
    def skipped(self) -> int:
        return 0

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))

    @property
    def fingerprint(self) -> str:
        return _fingerprint(text.encode() for text in self.texts)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str:
        return self.texts[index]


@dataclass(frozen=True)
class _Scanned:
    """What reading all records once has told: their fingerprint, their characters, and how many are left out."""

    fingerprint: str
    characters: int
    skipped: int


@dataclass(frozen=True, eq=False)
class _Spans(Documents):
    """Parts of files: `spans` int64[documents, 3] says which file, from which byte, how many bytes."""

    files: tuple[str, ...]
    spans: np.ndarray
    field: str | None
    scanned: _Scanned

    @property
    def fingerprint(self) -> str:
        return self.scanned.fingerprint

    @property
    def characters(self) -> int:
        return self.scanned.characters

    @property
    def skipped(self) -> int:
        return self.scanned.skipped

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> str:
        file, offset, size = self.spans[index].tolist()
        with open(self.files[file], "rb") as data:
            data.seek(offset)
            return _parse(data.read(size), self.field)


def _parse(data: bytes, field: str | None) -> str:
    """The text of a document's bytes; ValueError says what is wrong with them."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    if field is None:
        return text
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        keys = f"an object with {', '.join(sorted(record)) or 'no keys'}" if isinstance(record, dict) else "no object"
        raise ValueError(f"no text under {field!r}: the record is {keys}")
    return record[field]


def _scan(path: str, spans_of, field: str | None, on_bad_record: OnBadRecord, *, column: str | None = None) -> _Spans:
    """Reads every record once: where it is, whether it is sound, and the fingerprint of all."""
    files = _files(path)
    readable = tuple(copies.plain(file, column) for file in files)
    spans, digest, characters, skipped = [], hashlib.sha256(), 0, 0
    for number, file in enumerate(files):
        for place, offset, data in spans_of(readable[number]):
            try:
                text = _parse(data, field)
            except ValueError as error:
                if on_bad_record == "stop":
                    raise UserError(
                        f"{file}, {place}: {error}; mend it, or leave such records out with on_bad_record=skip"
                    ) from None
                skipped += 1
                if skipped <= SHOWN_RECORDS:
                    log.warning("%s, %s: %s; left out", file, place, error)
                continue
            digest.update(len(text).to_bytes(8, "little") + text.encode())
            characters += len(text)
            spans.append((number, offset, len(data)))
    if skipped:
        log.warning("%s: %d of %d records are left out", path, skipped, skipped + len(spans))
    if not characters:
        raise UserError(
            f"{path}: {len(files)} files without text; give files with at least {SHORTEST_TOKENS} tokens of it"
        )
    table = np.array(spans, np.int64).reshape(-1, 3)
    return _Spans(readable, table, field, _Scanned(digest.hexdigest()[:16], characters, skipped))


def _files(path: str) -> list[str]:
    """The files that a path or a URL means, sorted."""
    if copies.is_url(path):
        return copies.files(path)
    if Path(path).is_file():
        return [path]
    pattern = f"{glob.escape(path)}/**/*" if Path(path).is_dir() else path
    files = sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
    if not files:
        raise UserError(
            f"no file at {path!r}; give a file, a folder with files, or a pattern such as 'corpus/**/*.txt'"
        )
    return files


Span = tuple[str, int, bytes]


def _file_spans(path: str) -> Iterator[Span]:
    """(place in words, first byte, bytes) of the documents of a text file; they end where lines end."""
    with open(path, "rb") as file:
        offset = 0
        while data := file.read(SPAN_BYTES) + file.readline():
            yield f"from byte {offset}", offset, data
            offset += len(data)


def _line_spans(path: str) -> Iterator[Span]:
    """(place in words, first byte, bytes) of the lines that are not empty."""
    with open(path, "rb") as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            if record := line.rstrip():
                yield f"line {number}", offset, record
            offset += len(line)


def _python_texts() -> dict[str, str]:
    """{name: text} of the language reference's topics and of the standard library's top-level modules."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{name}.py" for name in sorted(sys.stdlib_module_names)]
    texts = {path.name: path.read_text(encoding="utf-8", errors="replace") for path in files if path.is_file()}
    try:
        from pydoc_data import topics

        reference = topics.topics
    except ImportError:
        reference = {}
    if not texts or not reference:
        raise UserError(
            f"this Python has {len(texts)} modules of its library as sources in {folder} and {len(reference)} topics "
            f"in pydoc_data; use one that was installed with both, or another source of text"
        )
    return texts | {f"topic {name}": text for name, text in reference.items()}


def _rank(name: str) -> int:
    """A number that depends on the name alone, for splits and limits that do not follow the alphabet."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def _fingerprint(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def describe(name: str, pieces: Pieces) -> str:
    """One line for the log: how much text a source has."""
    documents = pieces.documents
    parts = [f"{len(documents):,} documents", f"{documents.characters:,} characters", f"{pieces.tokens:,} tokens"]
    parts += [f"{len(pieces):,} pieces"]
    parts += [f"{pieces.dropped:,} documents too short"] if pieces.dropped else []
    parts += [f"{documents.skipped:,} bad records left out"] if documents.skipped else []
    return f"{name}: {', '.join(parts)}"


def open_pieces(
    text: Text,
    tokenizer: Tokenizer,
    *,
    piece_tokens: int,
    on_bad_record: OnBadRecord,
    max_skipped: float = MAX_SKIPPED,
) -> Pieces:
    """The pieces of a source of text.

    Args:
      max_skipped: the largest share of the records that may be skipped.

    Raises:
      UserError: it is missing, empty or malformed, too much of it is, or no document is long enough.
    """
    documents = text.open(on_bad_record=on_bad_record)
    records = len(documents) + documents.skipped
    if documents.skipped > max_skipped * records:
        raise UserError(
            f"{text}: {documents.skipped} of {records} records cannot be read, and max_skipped = {max_skipped:g} of "
            f"them may be left out; mend them (the first are named above), or raise max_skipped"
        )
    pieces = Pieces(documents, tokenizer, piece_tokens)
    if not len(pieces):
        raise UserError(
            f"{text}: {pieces.dropped} documents, all of fewer than {SHORTEST_TOKENS} tokens; give longer ones"
        )
    return pieces
