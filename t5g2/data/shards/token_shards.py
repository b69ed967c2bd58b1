"""Tokens made ahead of a run: ArrayRecord shards of a source's documents, which a run opens without reading a text.

tokens.json                             which text by which tokenizer, and the shards; written last
tokens-00003-of-00016.array_record      a record a document: its token ids, little-endian, as `dtype` says
lengths-00003-of-00016.npy              int32[documents]: how many tokens each has

Shard s of S holds the documents from s * N // S on, in their order, short ones too. So the shards are the source over
again, tokenised: the chunks, and with them the batches of a run, are those of the text itself.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from t5g2.core.errors import UserError
from t5g2.core.processes import EndWithParent
from t5g2.data.shards import manifest
from t5g2.data.sources.documents import Documents, OnBadRecord
from t5g2.data.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)

MANIFEST = "tokens.json"
KEYS = {"text_fingerprint", "tokenizer_fingerprint", "tokenizer", "characters", "skipped", "dtype", "shards"}
PLAN = "plan.json"  # what an unfinished folder is going to hold


@dataclass(frozen=True)
class Tokens:
    """A folder that `t5g2 tokenize` wrote.

    Attributes:
      path: of the folder.
    """

    path: str

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """Its documents. Records that could not be read were dealt with when it was written.

        Raises:
          UserError: it does not exist, is not finished, or a file of it is missing or of another length.
        """
        del on_bad_record
        folder = Path(self.path)
        if not (folder / MANIFEST).is_file():
            unfinished = (folder / PLAN).is_file()
            what = "is not finished: run the same `t5g2 tokenize` again" if unfinished else f"has no {MANIFEST}"
            raise UserError(f"{folder.absolute()} {what}; give a folder that `t5g2 tokenize` has written")
        said = _described(folder / MANIFEST)
        shards = [folder / shard["file"] for shard in said["shards"]]
        lengths = [_lengths(folder, shard) for shard in said["shards"]]
        return TokenDocuments(folder, said, tuple(map(str, shards)), lengths)


class TokenDocuments(Documents):
    """Documents that are tokens already; their text is not kept."""

    def __init__(self, folder: Path, said: dict[str, Any], files: Sequence[str], lengths: Sequence[np.ndarray]):
        self._folder, self._said, self._files = folder, said, tuple(files)
        self._ends = np.cumsum([len(part) for part in lengths])
        self._lengths = np.concatenate(lengths)
        self._readers: dict[int, Any] = {}

    def __reduce__(self):
        return Tokens.open, (Tokens(str(self._folder)),)

    @property
    def fingerprint(self) -> str:
        """Of the text, so that a run may go from the text to its tokens and back."""
        return self._said["text_fingerprint"]

    @property
    def characters(self) -> int:
        """Of the text."""
        return self._said["characters"]

    @property
    def skipped(self) -> int:
        """Records that were left out when the text was read."""
        return self._said["skipped"]

    @property
    def has_pairs(self) -> bool:
        """Whether they are pairs of inputs and targets."""
        return "pairs" in self._said

    @property
    def is_indivisible(self) -> bool:
        """Whether they are not to be cut."""
        return "whole" in self._said or self.has_pairs

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> str:
        raise UserError(f"{self._folder} holds tokens, whose text is not kept; give the text itself")

    def token_lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        """int64[documents].

        Raises:
          UserError: the tokens are another tokenizer's.
        """
        if tokenizer.fingerprint() != self._said["tokenizer_fingerprint"]:
            raise UserError(
                f"{self._folder.absolute()} was made with another tokenizer, {self._said['tokenizer']}, and the run "
                f"has {tokenizer.to_dict()}; give the run that one, or tokenize the text again"
            )
        return self._lengths.astype(np.int64)

    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        """int32[tokens] of a document.

        Raises:
          UserError: the shard is damaged.
        """
        shard = int(np.searchsorted(self._ends, index, side="right"))
        at = index - (int(self._ends[shard - 1]) if shard else 0)
        try:
            if shard not in self._readers:
                self._readers[shard] = _reader(self._files[shard])
            [record] = self._readers[shard].read([at])
        except (RuntimeError, IndexError) as error:
            raise UserError(
                f"{self._files[shard]} is damaged at record {at} ({str(error)[:120]}); remove it, and run the same "
                f"`t5g2 tokenize` again"
            ) from None
        found = np.frombuffer(record, self._said["dtype"]).astype(np.int32)
        if len(found) != self._lengths[index]:
            raise UserError(
                f"{self._files[shard]}, record {at}, has {len(found)} tokens and should have {self._lengths[index]}; "
                f"remove it, and run the same `t5g2 tokenize` again"
            )
        return found


@dataclass(frozen=True)
class Job:
    """What is tokenised: a source of text, as whoever makes a shard opens it anew.

    Attributes:
      opened: the documents; a pickle of them does not hold their text.
      described: the source as plain data, for the record.
      shards: how many files.
    """

    documents: Documents = field(repr=False)
    tokenizer: Tokenizer
    source: dict[str, Any]
    shards: int

    @property
    def plan(self) -> dict[str, Any]:
        """What the shards follow from."""
        return {
            "text": self.source,
            "text_fingerprint": self.documents.fingerprint,
            "documents": len(self.documents),
            "characters": self.documents.characters,
            "skipped": self.documents.skipped,
            **({"pairs": True} if self.documents.has_pairs else {}),
            **({"whole": True} if self.documents.is_indivisible and not self.documents.has_pairs else {}),
            "tokenizer": self.tokenizer.to_dict(),
            "tokenizer_fingerprint": self.tokenizer.fingerprint(),
            "dtype": self.dtype,
            "shards": [self.file("tokens", shard, "array_record") for shard in range(self.shards)],
        }

    @property
    def dtype(self) -> str:
        """How a token is kept: in two bytes if they will do."""
        return "<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<i4"

    def file(self, what: str, shard: int, ending: str) -> str:
        """The name of a file of a shard."""
        return f"{what}-{shard:05}-of-{self.shards:05}.{ending}"

    def documents_of(self, shard: int) -> range:
        """The documents of a shard."""
        count = len(self.documents)
        return range(shard * count // self.shards, (shard + 1) * count // self.shards)


# makes each of some shards, with the function that makes one
ShardRunner = Callable[[Callable[[int], None], Sequence[int]], None]


def write(job: Job, folder: str | os.PathLike, *, workers: int = 1, run: ShardRunner | None = None) -> dict[str, Any]:
    """Writes the shards of a job into a folder and returns what tokens.json says; shards that are there are kept.

    Args:
      folder: where; made if it is missing. Interrupted, the same call goes on.
      workers: processes that make shards, one shard at a time each; 1 = this one.
      run: how shards are made instead, such as by other machines; the function and the folder must be known there.

    Raises:
      UserError: the folder holds something else, or shards of another text, tokenizer or number.
    """
    if not 1 <= job.shards <= len(job.documents) or workers < 1:
        raise UserError(
            f"shards = {job.shards} and workers = {workers}, for {len(job.documents)} documents; both must be at least 1, "
            f"and shards at most one a document"
        )
    folder, plan = Path(folder), job.plan
    with _alone(folder):
        return _write(job, folder, plan, workers=workers, run=run)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else writes into the folder meanwhile; raises UserError if somebody does, or it is no folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder.absolute()} cannot be a folder, because a file is in its place") from None
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another `t5g2 tokenize` writes into {folder.absolute()}; wait for it, or give another folder"
            ) from None
        yield
    finally:
        os.close(handle)


def _write(job: Job, folder: Path, plan: dict[str, Any], *, workers: int, run: ShardRunner | None) -> dict[str, Any]:
    _claim(folder, plan)
    for left in folder.glob(".*.part"):  # by a call that was killed
        left.unlink(missing_ok=True)
    make = functools.partial(_make, job, folder)
    told = _described(folder / MANIFEST)["shards"] if (folder / MANIFEST).is_file() else []
    missing = [
        shard
        for shard in range(job.shards)
        if not _is_there(job, folder, shard) or (told and _told(job, folder, shard) != told[shard])
    ]
    log.info("%s: %d of %d shards to make", folder, len(missing), job.shards)
    if run is not None:
        run(make, missing)
    elif workers == 1 or len(missing) < 2:
        for shard in missing:
            make(shard)
    else:
        _in_processes(make, missing, workers)
    made = [_told(job, folder, shard) for shard in range(job.shards)]
    said = plan | {"shards": made, "tokens": sum(shard["tokens"] for shard in made)}
    _replace(folder / MANIFEST, lambda file: file.write_text(json.dumps(said, indent=1) + "\n"))
    (folder / PLAN).unlink(missing_ok=True)
    return said


def _told(job: Job, folder: Path, shard: int) -> dict[str, Any]:
    """What tokens.json says of a shard."""
    tokens, lengths = job.file("tokens", shard, "array_record"), job.file("lengths", shard, "npy")
    counts = np.load(folder / lengths)
    size = (folder / tokens).stat().st_size
    facts = {"documents": len(counts), "tokens": int(counts.sum(dtype=np.int64)), "bytes": size}
    return {"file": tokens, "lengths": lengths} | facts


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    """Writes down what the folder is going to hold; raises UserError if it holds something else."""
    plan = json.loads(json.dumps(plan))
    for name in (MANIFEST, PLAN):
        if not (folder / name).is_file():
            continue
        said = _described(folder / name)
        said["shards"] = [shard if isinstance(shard, str) else shard["file"] for shard in said["shards"]]
        said.pop("tokens", None)
        if said != plan:
            differ = ", ".join(sorted(key for key in plan if plan[key] != said.get(key)))
            raise UserError(
                f"{folder.absolute()} holds tokens that were made otherwise ({differ} differ); give another folder, or "
                f"remove this one"
            )
        return
    # what ends in .part is of a call that was killed while it wrote
    others = sorted(file.name for file in folder.iterdir() if file.suffix != ".part")
    if others:
        raise UserError(f"{folder.absolute()} holds {others[0]}; tokens are written to a folder of their own")
    _replace(folder / PLAN, lambda file: file.write_text(json.dumps(plan, indent=1) + "\n"))


def _described(file: Path) -> dict[str, Any]:
    return manifest.read(file, keys=KEYS, command="t5g2 tokenize")


def _is_there(job: Job, folder: Path, shard: int) -> bool:
    """Whether a shard is whole: it has all its records. The lengths are written after the tokens."""
    lengths, tokens = (folder / job.file(*of) for of in (("lengths", shard, "npy"), ("tokens", shard, "array_record")))
    if not (lengths.is_file() and tokens.is_file()):
        return False
    try:
        return _reader(str(tokens)).num_records() == len(np.load(lengths)) == len(job.documents_of(shard))
    except (ValueError, EOFError):  # cut off
        return False


def _make(job: Job, folder: Path, shard: int) -> None:
    """Writes one shard; its files have their names only when they are whole."""
    from array_record.python.array_record_module import ArrayRecordWriter

    lengths = []

    def write_tokens(file: Path) -> None:
        # a record by itself: an example reads one document, wherever it is
        writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")
        for index in job.documents_of(shard):
            tokens = job.documents.tokens(index, job.tokenizer)
            lengths.append(len(tokens))
            writer.write(tokens.astype(job.dtype).tobytes())
        writer.close()

    def write_lengths(file: Path) -> None:
        with open(file, "wb") as out:
            np.save(out, np.array(lengths, np.int32))

    _replace(folder / job.file("tokens", shard, "array_record"), write_tokens)
    _replace(folder / job.file("lengths", shard, "npy"), write_lengths)


def _in_processes(make: Callable[[int], None], shards: Sequence[int], workers: int) -> None:
    """Calls `make` for each shard, in processes; the first failure ends it."""
    spawn = multiprocessing.get_context("spawn")
    many, watch = min(workers, len(shards)), EndWithParent(os.getpid())
    with concurrent.futures.ProcessPoolExecutor(many, mp_context=spawn, initializer=watch) as pool:
        try:
            for done in concurrent.futures.as_completed([pool.submit(make, shard) for shard in shards]):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _replace(target: Path, write: Callable[[Path], Any]) -> None:
    # a process of a call that was killed may write for a moment longer
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    write(part)
    os.replace(part, target)


def _reader(file: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(file, "readahead_buffer_size:0,max_parallelism:0")


def _lengths(folder: Path, shard: dict[str, Any]) -> np.ndarray:
    """int32[documents] of a shard whose files are there.

    Raises:
      UserError: one is missing, or has not the length that it was written with.
    """
    tokens, lengths = folder / shard["file"], folder / shard["lengths"]
    for file in (tokens, lengths):
        if not file.is_file():
            raise UserError(f"{file.absolute()} is missing; run the same `t5g2 tokenize` again")
    try:
        found = np.load(lengths)
    except (ValueError, EOFError):
        raise UserError(f"{lengths.absolute()} is cut off; run the same `t5g2 tokenize` again") from None
    size = tokens.stat().st_size
    if size != shard["bytes"] or len(found) != shard["documents"] or found.sum(dtype=np.int64) != shard["tokens"]:
        raise UserError(
            f"{tokens.absolute()} has {size} bytes, {len(found)} documents and {found.sum(dtype=np.int64)} tokens and "
            f"was written with {shard['bytes']}, {shard['documents']} and {shard['tokens']}; run the same `t5g2 "
            f"tokenize` again"
        )
    return found
