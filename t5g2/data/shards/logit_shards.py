"""Teacher logits that `t5g2 cache-logits` has computed before a run, for each token of each chunk of a source.

answers.json                             the teacher, the chunks and the shards; written last
answers-00003-of-00016.array_record      one record per chunk of n tokens, little-endian, with N kept tokens per token:
                                           ids         n * N   of the manifest's `dtype`
                                           log_probs   n * N   float16
                                           tail        n       float16, the probability of all tokens that are not kept

Position t of a chunk has the distribution of token t, given BOS and the tokens before it. Of P chunks, shard s of S
holds those from s * P // S on, in the order of the source, so the logits serve every seed and every objective.
"""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from t5g2.core.errors import UserError
from t5g2.data.shards import array_record
from t5g2.data.shards.shard_folder import ShardFormat

MANIFEST = "answers.json"
FORMAT = ShardFormat(
    manifest=MANIFEST,
    keys={
        **dict.fromkeys(("teacher", "teacher_fingerprint", "pieces_fingerprint", "method", "dtype"), str),
        **dict.fromkeys(("pieces", "vocab_size", "per_token", "seed"), int),
        "shards": list,
    },
    options={"objective": str},
    shard={"file": str, "bytes": int},
    content="teacher logits",
    command="t5g2 cache-logits",
    uncompared=frozenset(("teacher",)),  # a path: the same teacher may have moved
)


@dataclass(frozen=True)
class LogitShardLayout:
    """Layout of a source's teacher logits in files.

    Attributes:
      chunks, shards: number of each.
      per_token: N, number of tokens that are kept of a distribution.
      dtype: NumPy type of the ids.
    """

    chunks: int
    shards: int
    per_token: int
    dtype: str

    def file(self, shard: int) -> str:
        """Returns the name of a shard."""
        return f"answers-{shard:05}-of-{self.shards:05}.array_record"

    def shard_chunks(self, shard: int) -> range:
        """Returns the numbers of a shard's chunks."""
        return range(shard * self.chunks // self.shards, (shard + 1) * self.chunks // self.shards)

    def locate(self, chunk: int) -> tuple[int, int]:
        """Returns the number of a chunk's shard, and of its record in the shard."""
        # the inverse of shard_chunks: the last shard whose first chunk is not after this one
        shard = ((chunk + 1) * self.shards - 1) // self.chunks
        return shard, chunk - self.shard_chunks(shard).start

    def pack(self, ids: np.ndarray, log_probs: np.ndarray, tail: np.ndarray) -> bytes:
        """Returns the record of arrays [n, N], [n, N] and [n]."""
        return ids.astype(self.dtype).tobytes() + log_probs.astype("<f2").tobytes() + tail.astype("<f2").tobytes()

    def unpack(self, record: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the arrays of a record; raises ValueError if it is not a whole number of tokens."""
        size = np.dtype(self.dtype).itemsize
        tokens, rest = divmod(len(record), self.per_token * (size + 2) + 2)
        if rest:
            raise ValueError(f"{len(record)} bytes are not a whole number of tokens")
        ids, log_probs = tokens * self.per_token * size, tokens * self.per_token * 2
        shape = (tokens, self.per_token)
        return (
            np.frombuffer(record[:ids], self.dtype).reshape(shape).astype(np.int32),
            np.frombuffer(record[ids : ids + log_probs], "<f2").reshape(shape),
            np.frombuffer(record[ids + log_probs :], "<f2"),
        )


class CachedTeacherLogits:
    """Teacher logits of the chunks of one source. A pickle holds only the folder, whose files are opened again.

    Args:
      folder: written by `t5g2 cache-logits` for this source.
      per_token: number of kept tokens to use of each distribution, from the first on; the others are added to the
        tail.

    Raises:
      UserError: the folder does not exist, is not finished or has fewer than `per_token` kept tokens; a file is missing
        or has another size.
    """

    def __init__(self, folder: str | PathLike, *, per_token: int):
        self._folder, self._per_token = Path(folder), per_token
        if not FORMAT.is_finished(self._folder):
            others = sorted(file.parent.name for file in self._folder.parent.glob(f"*/{MANIFEST}"))
            raise UserError(
                f"{self._folder.absolute()} has no {MANIFEST}; give a folder that `t5g2 cache-logits` has finished, "
                f"with a folder in it for each source of the run"
                + (f"; {self._folder.parent} has those of {', '.join(others)}" if others else "")
            )
        self._manifest = FORMAT.read(self._folder / MANIFEST)
        kept = self._manifest["per_token"]
        if per_token > kept:
            raise UserError(
                f"{self._folder.absolute()} has {kept} entries per token and per_token = {per_token}; set it to at "
                f"most that, or compute the teacher logits again"
            )
        shards = self._manifest["shards"]
        # sizes only: reading all records would take as long as an epoch
        for shard in shards:
            FORMAT.check_size(self._folder / shard["file"], shard["bytes"])
        self._layout = LogitShardLayout(self._manifest["pieces"], len(shards), kept, self._manifest["dtype"])
        self._readers = array_record.RecordReaders(
            [str(self._folder / self._layout.file(shard)) for shard in range(len(shards))]
        )

    def __reduce__(self):
        return _open, (str(self._folder), self._per_token)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the teacher, the selection of kept tokens, and the number of them that is used."""
        manifest = self._manifest
        return f"{manifest['teacher_fingerprint']} {manifest['method']} {manifest['seed']} {self._per_token}"

    def check(self, chunks: str, *, objective: str, vocab_size: int, method: str, teacher: str | None) -> None:
        """Compares the manifest with the run.

        Args:
          chunks: fingerprint of the run's chunks.
          objective: `identity` of the source's objective; compared only if the teacher is an encoder-decoder, whose
            logits are of examples and not of the text.
          vocab_size: size of the vocabulary of the run's tokenizer.
          method: selection of the kept tokens.
          teacher: fingerprint of the teacher; None = any.

        Raises:
          UserError: the logits are those of other chunks or another teacher, or were selected by another method.
        """
        folder, manifest = self._folder.absolute(), self._manifest
        # Only manifests of encoder-decoder teachers have an objective
        if manifest.get("objective", objective) != objective:
            raise UserError(
                f"{folder} has logits of an encoder-decoder teacher for the examples of {manifest['objective']}, and "
                f"the run has {objective}; use that objective, or compute the teacher logits again"
            )
        if manifest["method"] != method:
            raise UserError(
                f"{folder} has teacher logits selected by method = {manifest['method']!r}, and distill has "
                f"{method!r}; set it to that of the folder, or compute the teacher logits again"
            )
        if teacher not in (None, manifest["teacher_fingerprint"]):
            raise UserError(
                f"{folder} has logits of another teacher, {manifest['teacher']} (fingerprint "
                f"{manifest['teacher_fingerprint']}, distill.teacher has {teacher}); leave out distill.teacher to "
                f"learn from that one, or compute the teacher logits again"
            )
        if manifest["pieces_fingerprint"] != chunks:
            raise UserError(
                f"{folder} has teacher logits of other text, of another tokenizer or of other chunks (fingerprint "
                f"{manifest['pieces_fingerprint']}, the run's is {chunks}); compute them again with the run's config: "
                f"t5g2 cache-logits --config=…"
            )
        # a larger vocabulary is fine: its first ids are the tokenizer's
        if manifest["vocab_size"] < vocab_size:
            raise UserError(
                f"{folder} has teacher logits of a vocabulary of {manifest['vocab_size']} and the tokenizer has "
                f"{vocab_size} ids; take a teacher whose vocabulary has them all"
            )

    def lookup(self, chunk: int, origins: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the teacher's distributions for some positions of a chunk; entries of origin -1 are meaningless.

        Args:
          origins: int32[T], positions in the chunk; -1 = none.

        Returns:
          ids int32[T, N], log_probs float16[T, N], tail float16[T].

        Raises:
          UserError: the shard is damaged.
        """
        shard, record = self._layout.locate(chunk)
        try:
            ids, log_probs, tail = self._layout.unpack(self._readers.read(shard, record))
            # origin -1 takes the first distribution: the loss ignores it
            positions = np.maximum(origins, 0)
            ids, log_probs, tail = ids[positions], log_probs[positions], tail[positions]
        except (RuntimeError, IndexError, ValueError) as error:
            raise FORMAT.damaged_record(self._readers.files[shard], record, error) from None
        used = self._per_token
        # kept tokens that are not used count as other tokens, whose total probability is the tail
        if used < self._layout.per_token:
            tail = (tail + np.exp(log_probs[:, used:].astype(np.float32)).sum(axis=1)).astype(np.float16)
        return ids[:, :used], log_probs[:, :used], tail


def _open(folder: str, per_token: int) -> CachedTeacherLogits:
    return CachedTeacherLogits(folder, per_token=per_token)
