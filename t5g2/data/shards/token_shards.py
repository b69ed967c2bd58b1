"""Tokens that are written before a run: ArrayRecord shards of a source's documents, which a run opens without the text.

tokens.json                             the text, the tokenizer and the shards; written last
tokens-00003-of-00016.array_record      the token ids of the documents, little-endian, of the manifest's `dtype`
lengths-00003-of-00016.npy              int32[documents]: the number of tokens of each

A document has a record for every `record_tokens` tokens, so that a part of it is read alone, and at least one record.
Folders of earlier versions have no `record_tokens`, and one record per document.

Of N documents, shard s of S holds those from s * N // S on, in their order, short ones too. So the chunks, and with
them the batches of a run, are the same as those of the text itself.
"""

import collections
import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from t5g2.core.errors import UserError
from t5g2.core.files import replacing
from t5g2.core.logs import log
from t5g2.core.processes import Worker
from t5g2.data.shards import array_record
from t5g2.data.shards.shard_folder import PLAN, ShardFolder, ShardFormat
from t5g2.data.sources.documents import Documents, OnBadRecord
from t5g2.data.tokenizers.base import Tokenizer

MANIFEST = "tokens.json"
# reading a record of this size takes no longer than making an example of a chunk
RECORD_TOKENS = 4096
# what np.save writes in front of a list of lengths (numpy.lib.format, version 1.0)
LENGTHS_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<i4', 'fortran_order': False, 'shape': \((\d{1,12}),\), \} *", re.DOTALL
)
FORMAT = ShardFormat(
    manifest=MANIFEST,
    keys={
        "text_fingerprint": str,
        "tokenizer_fingerprint": str,
        "tokenizer": dict,
        "characters": int,
        "skipped": int,
        "dtype": str,
        "shards": list,
    },
    options={"record_tokens": int},
    shard={"file": str, "bytes": int, "lengths": str, "documents": int, "tokens": int},
    content="tokens",
    command="t5g2 tokenize",
    uncompared=frozenset(("tokens",)),
)


@dataclass(frozen=True)
class Tokens:
    """A folder that `t5g2 tokenize` has written.

    Attributes:
      path: path of the folder.
    """

    path: str

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> "TokenDocuments":
        """Returns the documents; `on_bad_record` has no effect, because writing has refused or skipped bad records.

        Raises:
          UserError: the folder does not exist or is not finished; a file of it is missing or has another size.
        """
        del on_bad_record
        folder = Path(self.path)
        if not FORMAT.is_finished(folder):
            unfinished = (folder / PLAN).is_file()
            problem = "is not finished: run the same `t5g2 tokenize` again" if unfinished else f"has no {MANIFEST}"
            raise UserError(f"{folder.absolute()} {problem}; give a folder that `t5g2 tokenize` has written")
        manifest = FORMAT.read(folder / MANIFEST)
        lengths = [_read_lengths(folder, shard) for shard in manifest["shards"]]
        return TokenDocuments(folder, manifest, lengths)


class TokenDocuments(Documents):
    """Documents that are stored as tokens, without their text.

    Args:
      manifest: content of tokens.json.
      lengths: int32[documents] of each shard, in tokens.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], lengths: Sequence[np.ndarray]):
        self._folder, self._manifest = folder, manifest
        self._readers = array_record.RecordReaders([str(folder / shard["file"]) for shard in manifest["shards"]])
        self._shard_ends = np.cumsum([len(shard) for shard in lengths])
        self._lengths = np.concatenate(lengths)
        self._record_tokens: int | None = manifest.get("record_tokens")
        counts = [record_counts(shard, self._record_tokens) for shard in lengths]
        # int64[documents]: the number of each document's first record in its shard
        self._first_records = np.concatenate([np.cumsum(shard) - shard for shard in counts])

    def __reduce__(self):
        return Tokens.open, (Tokens(str(self._folder)),)

    @property
    @override
    def fingerprint(self) -> str:
        """Fingerprint of the text, so that a run may be resumed with the tokens instead of the text, or the reverse."""
        return self._manifest["text_fingerprint"]

    @property
    @override
    def characters(self) -> int:
        return self._manifest["characters"]

    @property
    @override
    def skipped(self) -> int:
        return self._manifest["skipped"]

    @property
    @override
    def has_pairs(self) -> bool:
        return "pairs" in self._manifest

    @property
    @override
    def is_indivisible(self) -> bool:
        return "whole" in self._manifest or self.has_pairs

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> str:
        raise UserError(f"{self._folder} holds tokens, whose text is not kept; give the text itself")

    @override
    def token_lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        """Returns int64[documents].

        Raises:
          UserError: the tokens were made with another tokenizer.
        """
        if tokenizer.fingerprint() != self._manifest["tokenizer_fingerprint"]:
            raise UserError(
                f"{self._folder.absolute()} was made with another tokenizer, {self._manifest['tokenizer']}, and the "
                f"run has {tokenizer.to_dict()}; use the folder's tokenizer, or tokenize the text again"
            )
        return self._lengths.astype(np.int64)

    @property
    @override
    def has_token_ranges(self) -> bool:
        return self._record_tokens is not None

    @property
    def longest(self) -> int:
        """Number of tokens of the longest document."""
        return int(self._lengths.max(initial=0))

    @override
    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        """Returns int32[tokens] of a document.

        Raises:
          UserError: the shard is damaged.
        """
        return self.token_range(index, 0, int(self._lengths[index]), tokenizer)

    @override
    def token_range(self, index: int, start: int, end: int, tokenizer: Tokenizer) -> np.ndarray:
        """Returns int32[end - start], tokens start to end - 1 of a document.

        Raises:
          UserError: the shard is damaged.
        """
        length = int(self._lengths[index])
        size = length if self._record_tokens is None else self._record_tokens
        # side="right", because the end of a shard is the number of the next shard's first document
        shard, first = int(np.searchsorted(self._shard_ends, index, side="right")), int(self._first_records[index])
        if not length:
            return np.empty(0, np.int32)
        records = range(start // size, -(-end // size))
        parts = [self._record(shard, first + i, min(size, length - i * size)) for i in records]
        tokens = np.concatenate(parts) if len(parts) > 1 else parts[0]
        before = start - records.start * size
        return tokens[before : before + end - start].astype(np.int32)

    def _record(self, shard: int, record: int, tokens: int) -> np.ndarray:
        """Returns the ids of a record, which must be this many."""
        file = self._readers.files[shard]
        try:
            data = self._readers.read(shard, record)
        except (RuntimeError, IndexError) as error:
            raise FORMAT.damaged_record(file, record, error) from None
        expected = tokens * np.dtype(self._manifest["dtype"]).itemsize
        # chunks were cut by these lengths, so a record of another length would be cut in wrong places
        if len(data) != expected:
            raise FORMAT.damaged_record(file, record, f"it has {len(data)} bytes and should have {expected}")
        return np.frombuffer(data, self._manifest["dtype"])


def record_counts(lengths: np.ndarray, record_tokens: int | None) -> np.ndarray:
    """Returns int64[documents]: the number of records of documents of these lengths; record_tokens None = one each."""
    if record_tokens is None:
        return np.ones(len(lengths), np.int64)
    return np.maximum(-(-lengths.astype(np.int64) // record_tokens), 1)


@dataclass(frozen=True)
class Job:
    """A source of text to tokenise, and the number of shards. Worker processes receive a pickle of it.

    Attributes:
      documents: the documents of the source; a pickle of them holds no text.
      source: the source as plain data, recorded in the manifest.
      shards: number of files.
      record_tokens: maximum number of tokens of a record; None = a document is one record, as in earlier versions.
    """

    documents: Documents = field(repr=False)
    tokenizer: Tokenizer
    source: dict[str, Any]
    shards: int
    record_tokens: int | None = RECORD_TOKENS

    @property
    def plan(self) -> dict[str, Any]:
        """Everything that determines the shards, as stored in plan.json and tokens.json."""
        return {
            "text": self.source,
            "text_fingerprint": self.documents.fingerprint,
            "documents": len(self.documents),
            "characters": self.documents.characters,
            "skipped": self.documents.skipped,
            # absent if False, so that folders from before these keys still have the same plan
            **({"pairs": True} if self.documents.has_pairs else {}),
            **({"whole": True} if self.documents.is_indivisible and not self.documents.has_pairs else {}),
            "tokenizer": self.tokenizer.to_dict(),
            "tokenizer_fingerprint": self.tokenizer.fingerprint(),
            "dtype": self.dtype,
            **({} if self.record_tokens is None else {"record_tokens": self.record_tokens}),
            "shards": [self.tokens_file(shard) for shard in range(self.shards)],
        }

    @property
    def dtype(self) -> str:
        """NumPy type of a stored token: two bytes if the vocabulary fits."""
        return "<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<i4"

    def tokens_file(self, shard: int) -> str:
        """Returns the name of a shard's file of tokens."""
        return f"tokens-{shard:05}-of-{self.shards:05}.array_record"

    def lengths_file(self, shard: int) -> str:
        """Returns the name of a shard's file of lengths."""
        return f"lengths-{shard:05}-of-{self.shards:05}.npy"

    def shard_documents(self, shard: int) -> range:
        """Returns the numbers of a shard's documents."""
        count = len(self.documents)
        return range(shard * count // self.shards, (shard + 1) * count // self.shards)


# calls the first argument, which writes one shard, for each of the shards
ShardRunner = Callable[[Callable[[int], None], Sequence[int]], None]


def write(job: Job, folder: str | os.PathLike, *, workers: int = 1, run: ShardRunner | None = None) -> dict[str, Any]:
    """Writes the shards of a job into a folder and returns its manifest; shards that are complete are kept.

    Args:
      folder: made if it is missing. After an interruption the same call continues.
      workers: number of processes that write shards, one shard at a time each; 1 = this process.
      run: writes the shards instead, such as on other machines, which must have this module and the folder.

    Raises:
      UserError: the folder has other content, or shards of another text, tokenizer or number of shards.
    """
    if not 1 <= job.shards <= len(job.documents) or workers < 1:
        raise UserError(
            f"shards = {job.shards} and workers = {workers}, for {len(job.documents)} documents; both must be at "
            f"least 1, and shards at most one a document"
        )
    path = Path(folder)
    job = _as_begun(job, path)
    describe = functools.partial(_describe_shard, job, path)
    with ShardFolder(path, FORMAT, job.plan, describe).claim(exclusive=True) as claimed:
        missing = claimed.missing(range(job.shards))
        log.info("%s: %d of %d shards to write", path, len(missing), job.shards)
        write_one = functools.partial(_write_shard, job, path)
        if run is not None:
            run(write_one, missing)
        # starting processes for a single shard would only take time
        elif workers == 1 or len(missing) < 2:
            for shard in missing:
                write_one(shard)
        else:
            _in_processes(write_one, missing, workers)
        manifest = claimed.finish(missing, totals=("tokens",))
    # only `run` can leave shards out without an error
    if manifest is None:
        raise UserError(f"{path.absolute()} still lacks shards; run the same `t5g2 tokenize` again")
    return manifest


def _as_begun(job: Job, folder: Path) -> Job:
    """Returns the job with the size of records that a folder was begun with: earlier versions' are continued."""
    for name in (MANIFEST, PLAN):
        if (folder / name).is_file():
            return replace(job, record_tokens=FORMAT.read(folder / name).get("record_tokens"))
    return job


def _describe_shard(job: Job, folder: Path, shard: int) -> dict[str, Any] | None:
    """Returns the manifest's entry of a shard; None if the shard does not have all its records."""
    tokens, lengths = folder / job.tokens_file(shard), folder / job.lengths_file(shard)
    # both files, because a call may be killed between writing the tokens and the lengths
    if not (lengths.is_file() and tokens.is_file()):
        return None
    try:
        counts = _load_lengths(lengths)
        records = array_record.open_reader(tokens).num_records()
    except (ValueError, RuntimeError):  # one of the files is cut off
        return None
    if len(counts) != len(job.shard_documents(shard)):
        return None
    if records != record_counts(counts, job.record_tokens).sum():
        return None
    totals = {"documents": len(counts), "tokens": int(counts.sum(dtype=np.int64)), "bytes": tokens.stat().st_size}
    return {"file": tokens.name, "lengths": lengths.name} | totals


def _write_shard(job: Job, folder: Path, shard: int) -> None:
    lengths: list[int] = []

    def records() -> Iterator[bytes]:
        for index in job.shard_documents(shard):
            tokens = job.documents.tokens(index, job.tokenizer)
            lengths.append(len(tokens))
            size = job.record_tokens or max(len(tokens), 1)
            # a document without tokens has a record too, so that each has at least one
            for start in range(0, max(len(tokens), 1), size):
                yield tokens[start : start + size].astype(job.dtype).tobytes()

    # tokens first: a shard counts as complete when its lengths are there
    with replacing(folder / job.tokens_file(shard)) as part:
        array_record.write_records(part, records(), compressed=False)
    with replacing(folder / job.lengths_file(shard)) as part, open(part, "wb") as file:
        np.save(file, np.array(lengths, np.int32))


def _load_lengths(file: Path) -> np.ndarray:
    """Returns int32[documents] of a file of lengths; raises ValueError if it is not what `_write_shard` writes.

    NumPy's own reader raises errors of Python's parser for a damaged header, and allocates what the header claims.
    """
    header, _, body = file.read_bytes().partition(b"\n")
    match = LENGTHS_HEADER.fullmatch(header)
    if match is None or len(body) != 4 * int(match[1]):
        raise ValueError(f"{file} is no array of lengths")
    lengths = np.frombuffer(body, "<i4")
    if (lengths < 0).any():
        raise ValueError(f"{file} has negative lengths")
    return lengths


def _in_processes(write_one: Callable[[int], None], shards: Sequence[int], workers: int) -> None:
    """Calls `write_one` for each shard, in processes; the first failure ends all."""
    with contextlib.ExitStack() as stack:
        started = [Worker(_write_shards, write_one) for _ in range(min(workers, len(shards)))]
        for worker in started:
            stack.callback(worker.close)
        left, at_work = collections.deque(shards), list(started)
        while at_work:
            ready = wait([worker.connection for worker in at_work])
            # a worker asks for a shard when it has started, and whenever it has written one
            for worker in [worker for worker in at_work if worker.connection in ready]:
                worker.receive()
                if left:
                    worker.send(left.popleft())
                else:
                    at_work.remove(worker)


def _write_shards(connection: Connection, write_one: Callable[[int], None]) -> None:
    """Writes the shards whose numbers come through the connection; runs in a worker."""
    while True:
        connection.send(None)
        write_one(connection.recv())


def _read_lengths(folder: Path, shard: dict[str, Any]) -> np.ndarray:
    """Returns int32[documents] of a shard, an entry of the manifest.

    Raises:
      UserError: a file of the shard is missing, or does not match the entry.
    """
    tokens, file = folder / shard["file"], folder / shard["lengths"]
    FORMAT.check_size(tokens, shard["bytes"])
    if not file.is_file():
        raise UserError(f"{file.absolute()} is missing; run the same `t5g2 tokenize` again")
    try:
        lengths = _load_lengths(file)
    except ValueError:
        raise UserError(f"{file.absolute()} is damaged or cut off; run the same `t5g2 tokenize` again") from None
    # totals only: counting the tokens of every record would read the whole folder
    count, total = len(lengths), lengths.sum(dtype=np.int64)
    if count != shard["documents"] or total != shard["tokens"]:
        raise UserError(
            f"{file.absolute()} has {count} documents and {total} tokens and was written with {shard['documents']} and "
            f"{shard['tokens']}; run the same `t5g2 tokenize` again"
        )
    return lengths
