"""A teacher's answers, made ahead of a run by `t5g2 cache-logits`: of each chunk of a source, at each of its tokens.

answers.json                             whose answers they are, about what, and the shards; written last
answers-00003-of-00016.array_record      a record a chunk of n tokens, little-endian, N entries a token:
                                           ids         n * N   as `dtype` says
                                           log_probs   n * N   float16
                                           tail        n       float16, the probability of all tokens that are not kept

Entry t of a chunk is about token t, given BOS and the tokens before it. Shard s of S holds the chunks from s * P // S
on. The order of the chunks is that of the source, so the answers hold for every seed and every objective.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from t5g2.core.errors import UserError
from t5g2.data.shards import manifest

MANIFEST = "answers.json"
KEYS = {"teacher", "teacher_fingerprint", "pieces_fingerprint", "pieces", "vocab_size", "method", "per_token", "seed"}
KEYS |= {"dtype", "shards"}


@dataclass(frozen=True)
class LogitShardLayout:
    """How a source's answers lie in files.

    Attributes:
      chunks, shards: how many.
      per_token: entries of an answer, N.
      dtype: of ids.
    """

    chunks: int
    shards: int
    per_token: int
    dtype: str

    def file(self, shard: int) -> str:
        """The name of a shard."""
        return f"answers-{shard:05}-of-{self.shards:05}.array_record"

    def chunks_of(self, shard: int) -> range:
        """The chunks of a shard."""
        return range(shard * self.chunks // self.shards, (shard + 1) * self.chunks // self.shards)

    def locate(self, chunk: int) -> tuple[int, int]:
        """The shard that a chunk is in, and its record."""
        shard = ((chunk + 1) * self.shards - 1) // self.chunks
        return shard, chunk - self.chunks_of(shard).start

    def pack(self, ids: np.ndarray, log_probs: np.ndarray, tail: np.ndarray) -> bytes:
        """A record of [n, N], [n, N] and [n]."""
        return ids.astype(self.dtype).tobytes() + log_probs.astype("<f2").tobytes() + tail.astype("<f2").tobytes()

    def unpack(self, record: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What was packed; raises ValueError if it is no whole number of tokens."""
        size = np.dtype(self.dtype).itemsize
        tokens, rest = divmod(len(record), self.per_token * (size + 2) + 2)
        if rest:
            raise ValueError(f"{len(record)} bytes are no whole number of tokens")
        ids, log_probs = tokens * self.per_token * size, tokens * self.per_token * 2
        shape = (tokens, self.per_token)
        return (
            np.frombuffer(record[:ids], self.dtype).reshape(shape).astype(np.int32),
            np.frombuffer(record[ids : ids + log_probs], "<f2").reshape(shape),
            np.frombuffer(record[ids + log_probs :], "<f2"),
        )


class CachedTeacherLogits:
    """The answers about the chunks of one source. A pickle of it is small, and opens the files again.

    Args:
      folder: that `t5g2 cache-logits` wrote for this source.
      per_token: entries to use of each answer, the first; what is left out goes to the tail.

    Raises:
      UserError: it does not exist, is not finished, has fewer entries, or a file is missing or of another length.
    """

    def __init__(self, folder: str | PathLike, *, per_token: int):
        self._folder, self._per_token = Path(folder), per_token
        if not (self._folder / MANIFEST).is_file():
            there = sorted(file.parent.name for file in self._folder.parent.glob(f"*/{MANIFEST}"))
            raise UserError(
                f"{self._folder.absolute()} has no {MANIFEST}; give a folder that `t5g2 cache-logits` has finished, "
                f"with a folder in it for each source of the run"
                + (f"; in {self._folder.parent} there are answers about {', '.join(there)}" if there else "")
            )
        self._said = described(self._folder / MANIFEST)
        if per_token > self._said["per_token"]:
            raise UserError(
                f"{self._folder.absolute()} has {self._said['per_token']} entries a token and per_token = {per_token}; "
                f"set it to at most that, or make the answers again"
            )
        shards = self._said["shards"]
        self._layout = LogitShardLayout(self._said["pieces"], len(shards), self._said["per_token"], self._said["dtype"])
        for shard in shards:
            file = self._folder / shard["file"]
            found = file.stat().st_size if file.is_file() else None
            if found != shard["bytes"]:
                was = "is missing" if found is None else f"has {found} bytes and was written with {shard['bytes']}"
                raise UserError(f"{file.absolute()} {was}; remove it, and run the same `t5g2 cache-logits` again")
        self._readers: dict[int, Any] = {}

    def __reduce__(self):
        return _open, (str(self._folder), self._per_token)

    @property
    def manifest(self) -> dict[str, Any]:
        """What answers.json says."""
        return self._said

    @property
    def fingerprint(self) -> str:
        """Of the teacher, of what it was asked, and of how much of it is used."""
        return f"{self._said['teacher_fingerprint']} {self._said['method']} {self._said['seed']} {self._per_token}"

    def check(self, chunks: str, *, objective: str, vocab_size: int, method: str, teacher: str | None) -> None:
        """Compares the answers with what a run wants of them.

        Args:
          chunks: fingerprint of the run's.
          objective: what is made of them, which matters where the teacher read that and not the text.
          vocab_size: of the run's tokenizer.
          method: how they are to be chosen.
          teacher: whose they are to be, by its fingerprint; None = anybody's.

        Raises:
          UserError: they are about something else, of somebody else, or chosen otherwise.
        """
        if self._said.get("objective", objective) != objective:
            raise UserError(
                f"{self._folder.absolute()} has answers of an encoder-decoder, which read what "
                f"{self._said['objective']} made of the text, and the run has {objective}; give the run "
                f"that one, or make the answers again"
            )
        if self._said["method"] != method:
            raise UserError(
                f"{self._folder.absolute()} has answers that were chosen by method = {self._said['method']!r}, and "
                f"distill has {method!r}; set it to that of the answers, or make them again"
            )
        if teacher not in (None, self._said["teacher_fingerprint"]):
            raise UserError(
                f"{self._folder.absolute()} has answers of another teacher, {self._said['teacher']} (fingerprint "
                f"{self._said['teacher_fingerprint']}, distill.teacher has {teacher}); leave out distill.teacher "
                f"to learn from that one, or make the answers again"
            )
        if self._said["pieces_fingerprint"] != chunks:
            raise UserError(
                f"{self._folder.absolute()} has answers about other text, by another tokenizer or cut otherwise "
                f"(fingerprint {self._said['pieces_fingerprint']}, the run's is {chunks}); make them again with the "
                f"run's config: t5g2 cache-logits --config=…"
            )
        if self._said["vocab_size"] < vocab_size:
            raise UserError(
                f"{self._folder.absolute()} has answers from a vocabulary of {self._said['vocab_size']} and the "
                f"tokenizer has {vocab_size} ids; give the answers of a teacher that knows them all"
            )

    def lookup(self, chunk: int, origins: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The answers about tokens of a chunk; what stands where there is none, origin -1, means nothing.

        Args:
          origins: int32[T], places in the chunk.

        Returns:
          ids int32[T, N], log_probs float16[T, N], tail float16[T].

        Raises:
          UserError: the shard is damaged.
        """
        shard, record = self._layout.locate(chunk)
        try:
            if shard not in self._readers:
                self._readers[shard] = reader(self._folder / self._layout.file(shard))
            [found] = self._readers[shard].read([record])
            ids, log_probs, tail = self._layout.unpack(found)
            places = np.maximum(origins, 0)
            ids, log_probs, tail = ids[places], log_probs[places], tail[places]
        except (RuntimeError, IndexError, ValueError) as error:
            raise UserError(
                f"{self._folder / self._layout.file(shard)} is damaged at record {record} ({str(error)[:120]}); remove "
                f"it, and run the same `t5g2 cache-logits` again"
            ) from None
        kept = self._per_token
        if kept < self._said["per_token"]:
            tail = (tail + np.exp(log_probs[:, kept:].astype(np.float32)).sum(axis=1)).astype(np.float16)
        return ids[:, :kept], log_probs[:, :kept], tail


def reader(file: str | PathLike) -> Any:
    """Of an ArrayRecord, record by record."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")


def _open(folder: str, per_token: int) -> CachedTeacherLogits:
    return CachedTeacherLogits(folder, per_token=per_token)


def described(file: Path) -> dict[str, Any]:
    """What answers.json, or the plan of an unfinished folder, says; raises UserError if it is damaged."""
    return manifest.read(file, keys=KEYS, command="t5g2 cache-logits")


def write_shard(file: Path, records: Iterable[bytes]) -> None:
    """Writes a shard; the file must not be read before this returns."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(file), "group_size:1")
    try:
        for record in records:
            writer.write(record)
    finally:
        writer.close()
