"""Teacher logits computed ahead of a run, for every chunk of a config's sources (t5g2/data/shards/logit_shards.py).

Shards are written one after the other; complete ones are kept, so a call goes on after an interruption.
"""

import functools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.folder import ModelFolder
from t5g2.core import logs, sharding, whole_weights
from t5g2.core.batch import Sequences
from t5g2.core.errors import UserError, unknown
from t5g2.core.files import replacing
from t5g2.core.logs import log
from t5g2.core.seeds import derive_seed
from t5g2.data.config import DataConfig
from t5g2.data.corpus import Corpus, open_corpus
from t5g2.data.shards import array_record, logit_shards
from t5g2.data.shards.logit_shards import LogitShardLayout
from t5g2.data.shards.shard_folder import ShardFolder
from t5g2.models import tiled_loss
from t5g2.models.distillation import Distillation
from t5g2.train import teachers
from t5g2.train.experiment import Experiment

# Batches whose distributions are in memory at a time. More would leave less padding, because chunks of about one length
# share a batch.
BLOCK_BATCHES = 16
LOG_SECS = 60.0


@dataclass(frozen=True)
class WorkShare:
    """The part of the shards that one of several calls writes: every `count`-th shard, from number `index` on."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise UserError(
                f"part = {self.index}/{self.count}; give INDEX/COUNT with 0 <= INDEX < COUNT, such as 0/4 to 3/4"
            )

    @classmethod
    def parse(cls, text: str) -> "WorkShare":
        """Returns the part of "0/4"; raises UserError for anything else."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit()):
            raise UserError(f"--part={text}; give INDEX/COUNT, such as 0/4, 1/4, 2/4 and 3/4 for four calls")
        return cls(int(index), int(count))


class TeacherExample(NamedTuple):
    """A chunk as the teacher reads it.

    Attributes:
      encoder: int32[S], empty for a decoder-only teacher.
      decoder: int32[T].
      origins: int32[T], position in the chunk's text of the token that each decoder position predicts; -1 = none.
      tokens: length of the chunk's text.
    """

    encoder: np.ndarray
    decoder: np.ndarray
    origins: np.ndarray
    tokens: int


def cache_teacher_logits(
    experiment: Experiment,
    teacher: str,
    out: str | os.PathLike,
    distillation: Distillation,
    *,
    names: Sequence[str] = (),
    shards: int = 16,
    part: WorkShare = WorkShare(),
) -> None:
    """Writes a teacher's logits for every chunk of the sources, a folder each, and prints the setting that reads them.

    Args:
      experiment: its data, mesh and compute are used.
      teacher: folder of a model. A decoder-only one reads the text, so its logits serve every objective; an
        encoder-decoder reads the examples of the source's objective, which must then not be stochastic.
      out: parent of the sources' folders; after an interruption the same call goes on.
      distillation: selection of the kept tokens.
      names: names of sources; none = all.
      shards: number of files of each source.
      part: the shards to write, if several calls share them.

    Raises:
      UserError: a source or the teacher does not exist; the teacher uses another tokenizer; a folder holds other
        logits, or cannot be created; the objective is stochastic and the teacher an encoder-decoder; method "full", or
        more tokens than the vocabulary has.
    """
    logs.setup()
    # every check that needs no weights comes before the teacher is loaded
    if distillation.method == "full":
        raise UserError('method = "full": a cache keeps a part of each distribution; take "top_k" or "sampled"')
    distillation.check_vocabulary(experiment.vocab_size)
    if "://" in str(out):
        raise UserError(f"out = {str(out)!r} is a URL; teacher logits are written to a local folder, so give one")
    for name in names:
        if name not in experiment.data.names:
            raise unknown("source", name, experiment.data.names)
    corpus = open_corpus(experiment.data)
    with jax.set_mesh(sharding.make(experiment.mesh)):
        folder = teachers.open_teacher(teacher, experiment.data.tokenizer, experiment.vocab_size)
        writer = _Writer(experiment, folder, distillation, corpus)
        for source, name in enumerate(experiment.data.names):
            if not names or name in names:
                writer.write(source, Path(out) / name, shards=shards, part=part)
    unfinished = [name for name in experiment.data.names if not logit_shards.FORMAT.is_finished(Path(out) / name)]
    if unfinished:
        print(f"not complete yet: {', '.join(unfinished)} in {out} lacks shards, which the other calls write")
        return
    setting = {"cache": str(out), "method": distillation.method, "per_token": distillation.per_token}
    print(f"--config.distill='{json.dumps(setting)}'")


class _Writer:
    """A loaded teacher, and the corpus whose logits it writes."""

    def __init__(self, experiment: Experiment, folder: ModelFolder, distillation: Distillation, corpus: Corpus):
        self._folder, self._distillation, self._corpus = folder, distillation, corpus
        self._data, self._vocab_size = experiment.data, experiment.vocab_size
        self._fingerprint = teachers.fingerprint(folder)
        self._seed = derive_seed(experiment.train.seed, "cache")
        self._mesh = sharding.make(experiment.mesh)
        self._reads_text = teachers.reads_text(folder)
        self._model = folders.load_model(folder, mesh=self._mesh)
        whole_weights.warn(self._model, self._mesh)
        self._predict = jax.jit(
            functools.partial(
                _predict,
                compute=experiment.compute,
                select=functools.partial(
                    tiled_loss.sparse_distributions, distillation=distillation, tile_tokens=experiment.train.tile_tokens
                ),
                vocab_size=self._vocab_size,
            )
        )

    def write(self, source: int, folder: Path, *, shards: int, part: WorkShare) -> None:
        """Writes this part's missing shards of one source; finishes the folder if no shard is missing then."""
        chunks = len(self._corpus.chunks[source])
        dtype = "<u2" if self._vocab_size <= 1 << 16 else "<i4"
        layout = LogitShardLayout(chunks, min(shards, chunks), self._distillation.per_token, dtype)
        describe = functools.partial(_describe_shard, layout, folder)
        kind, plan = logit_shards.FORMAT, self._plan(source, layout)
        # not exclusive: the calls of the other parts write into the same folder
        with ShardFolder(folder, kind, plan, describe).claim(exclusive=False) as claimed:
            own = range(part.index, layout.shards, part.count)
            missing = claimed.missing(own)
            log.info("%s: %d of %d shards to write", folder, len(missing), len(own))
            for shard in missing:
                with replacing(folder / layout.file(shard)) as path:
                    array_record.write_records(path, self._records(source, layout, shard))
            if claimed.finish(missing) is None:
                log.info("%s: shards of the other parts are still missing", folder)

    def _plan(self, source: int, layout: LogitShardLayout) -> dict[str, Any]:
        """Returns the plan of a source's shards: everything that their content depends on."""
        distillation, objective = self._distillation, self._data.sources[source].objective
        plan: dict[str, Any] = {
            "teacher": self._folder.origin,
            "teacher_fingerprint": self._fingerprint,
            "pieces_fingerprint": self._corpus.chunks_fingerprint(source),
            "pieces": layout.chunks,
            "vocab_size": self._vocab_size,
            "method": distillation.method,
            "per_token": distillation.per_token,
            "seed": self._seed if distillation.method == "sampled" else 0,
            "dtype": layout.dtype,
            "shards": [layout.file(shard) for shard in range(layout.shards)],
        }
        if self._reads_text:
            return plan
        # logits for one draw do not fit the draws of the next epoch
        if objective.is_stochastic:
            raise UserError(
                f"source {self._data.names[source]!r}: the teacher, {self._folder.origin}, is an encoder-decoder, "
                f"whose logits depend on what {type(objective).__name__} draws for an example; run the teacher in the "
                f"training run (distill.teacher), or take a decoder-only teacher, which reads the text"
            )
        return plan | {"objective": objective.identity}

    def _records(self, source: int, layout: LogitShardLayout, shard: int) -> Iterator[bytes]:
        """Yields the records of a shard, chunk after chunk; those of a block of batches are in memory."""
        chunks, logged_at, tokens = layout.shard_chunks(shard), time.perf_counter(), 0
        block_chunks = BLOCK_BATCHES * self._data.rows
        for start in range(chunks.start, chunks.stop, block_chunks):
            block = range(start, min(start + block_chunks, chunks.stop))
            records: dict[int, bytes] = {}
            # batches come in the order of lengths, records in the order of chunks
            for batch in self._batches(source, block):
                # seeded by chunk, so that a shard has the same bytes whichever call writes it
                key = jax.random.key(derive_seed(self._seed, source, min(batch)))
                for chunk, arrays in zip(batch, self._distributions(list(batch.values()), key), strict=True):
                    records[chunk] = layout.pack(*arrays)
                    tokens += len(arrays[0])
            yield from (records[chunk] for chunk in block)
            seconds = time.perf_counter() - logged_at
            if seconds >= LOG_SECS or block.stop == chunks.stop:
                written = block.stop - chunks.start
                log.info("shard %d: %d of %d chunks, %.0f tokens/s", shard, written, len(chunks), tokens / seconds)
                logged_at, tokens = time.perf_counter(), 0

    def _batches(self, source: int, chunks: range) -> Iterator[dict[int, TeacherExample]]:
        """Yields {chunk: example}, of about one length in a batch, because short rows are padded."""
        examples = {chunk: self._example(source, chunk) for chunk in chunks}
        order = sorted(examples, key=lambda chunk: (len(examples[chunk].decoder), chunk))
        for start in range(0, len(order), self._data.rows):
            yield {chunk: examples[chunk] for chunk in order[start : start + self._data.rows]}

    def _example(self, source: int, chunk: int) -> TeacherExample:
        tokens, objective = self._corpus.chunks[source][chunk], self._data.sources[source].objective
        text, special_tokens = objective.text(tokens), self._data.tokenizer.special_tokens
        if self._reads_text:
            decoder = np.concatenate([[special_tokens.bos], text[:-1]], dtype=np.int32, casting="unsafe")
            return TeacherExample(np.empty(0, np.int32), decoder, np.arange(len(text)), len(text))
        # any generator will do: the objective draws nothing
        example = objective(tokens, np.random.default_rng(0), special_tokens=special_tokens)
        assert example.origins is not None
        return TeacherExample(example.encoder_tokens, example.decoder_tokens, example.origins, len(text))

    def _distributions(self, examples: Sequence[TeacherExample], key: jax.Array) -> list[tuple[np.ndarray, ...]]:
        """Returns (ids, log_probs, tail) of each example's text; at most as many examples as a batch has rows."""
        place = sharding.batch_sharding(self._mesh)
        encoder, decoder = (
            jax.device_put(_rows([getattr(example, side) for example in examples], self._data), place)
            for side in ("encoder", "decoder")
        )
        arrays = jax.device_get(self._predict(self._model, None if self._reads_text else encoder, decoder, key))
        return [_in_text_order(example, *(array[row] for array in arrays)) for row, example in enumerate(examples)]


def _predict(
    model: Any, encoder: Sequences | None, decoder: Sequences, key: jax.Array, *, compute, select, vocab_size: int
):
    """Returns the kept part of the distributions over the first `vocab_size` ids; a padded embedding has more rows."""
    hidden_BTD, head = model.hidden(encoder, decoder, compute=compute), model.head()
    return select(hidden_BTD, type(head)(head.table_VD[:vocab_size], head.softcap), key=key)


def _describe_shard(layout: LogitShardLayout, folder: Path, shard: int) -> dict[str, Any] | None:
    """Returns the manifest's entry of a shard; None if it is missing."""
    file = folder / layout.file(shard)
    return {"file": file.name, "bytes": file.stat().st_size} if file.is_file() else None


def _in_text_order(example: TeacherExample, ids_TN, log_probs_TN, tail_T) -> tuple[np.ndarray, ...]:
    """Returns the arrays by position in the text; a position without a prediction has its whole probability in tail."""
    predicted = np.flatnonzero(example.origins >= 0)
    arrays = []
    for array, empty in ((ids_TN, 0), (log_probs_TN, -np.inf), (tail_T, 1)):
        out = np.full((example.tokens, *array.shape[1:]), empty, array.dtype)
        out[example.origins[predicted]] = array[predicted]
        arrays.append(out)
    return tuple(arrays)


def _rows(sequences: Sequence[np.ndarray], data: DataConfig) -> Sequences:
    """Returns one sequence a row and empty rows after the last, padded to a multiple of a quarter chunk."""
    # few different lengths, because every one of them is compiled
    step = max(data.chunk_tokens // 4, 1)
    length = -(-max(*map(len, sequences), 1) // step) * step
    tokens = np.full((data.rows, length), data.tokenizer.special_tokens.pad, np.int32)
    segments = np.zeros((data.rows, length), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
        segments[row, : len(sequence)] = 1
    return Sequences(tokens, segments, np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape) * segments)
