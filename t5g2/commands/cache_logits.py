"""Asking a teacher ahead of a run: its answers about every chunk of a config's sources, as t5g2/data/shards/logit_shards.py keeps
them. Shards are written one after the other, and what is there is kept, so an interrupted call goes on.
"""

import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.folder import ModelFolder
from t5g2.core import logs, sharding
from t5g2.core.batch import Sequences
from t5g2.core.errors import UserError, unknown
from t5g2.core.seeds import derive_seed
from t5g2.data.config import DataConfig
from t5g2.data.shards import logit_shards as files
from t5g2.data.shards.logit_shards import LogitShardLayout
from t5g2.data.streams import Corpus, open_corpus
from t5g2.models import loss
from t5g2.models.distillation import Distillation
from t5g2.train import teachers
from t5g2.train.experiment import Experiment

log = logging.getLogger("t5g2")

PLAN = "plan.json"  # what an unfinished folder is going to hold
BLOCK = 16  # batches whose answers are in memory; more would fill rows better, because those of one length go together
TELL_SECONDS = 60.0


@dataclass(frozen=True)
class Part:
    """Which shards this call makes, of all calls that share the work: every `of`-th from number `which` on."""

    which: int = 0
    of: int = 1

    def __post_init__(self):
        if not 0 <= self.which < self.of:
            raise UserError(f"part = {self.which}/{self.of}; give WHICH/OF with 0 <= WHICH < OF, such as 0/4 to 3/4")

    @classmethod
    def parse(cls, text: str) -> "Part":
        """The part of "0/4"; raises UserError for anything else."""
        which, slash, of = text.partition("/")
        if not (slash and which.isdigit() and of.isdigit()):
            raise UserError(f"--part={text}; give WHICH/OF, such as 0/4, 1/4, 2/4 and 3/4 for four calls")
        return cls(int(which), int(of))


class Question(NamedTuple):
    """What a teacher reads of a chunk, and where in its text each of the answers belongs; -1 = nowhere."""

    encoder: np.ndarray
    decoder: np.ndarray
    origins: np.ndarray
    tokens: int


def cache_answers(
    experiment: Experiment,
    teacher: str,
    out: str | os.PathLike,
    how: Distillation,
    *,
    names: Sequence[str] = (),
    shards: int = 16,
    part: Part = Part(),
) -> None:
    """Writes a teacher's answers about every chunk of the sources, a folder each, and says what to set to read them.

    Args:
      experiment: its data, mesh and compute count.
      teacher: folder of a model. A decoder-only one reads the text, so its answers serve every objective; an
        encoder-decoder reads what the source's objective makes of a chunk, which must be the same every time.
      out: the folder of the folders; interrupted, the same call goes on.
      how: what is kept of each distribution.
      names: of sources; none = all.
      shards: files of each source.
      part: of the shards, if several calls share them.

    Raises:
      UserError: no such source or teacher; it speaks of other tokens; a folder holds other answers, or is none; the
        objective draws something and the teacher is an encoder-decoder; "full", or more tokens than there are.
    """
    logs.setup()
    if how.method == "full":
        raise UserError('method = "full": a cache keeps a part of each distribution; take "top_k" or "sampled"')
    how.check_vocabulary(experiment.vocab_size)
    if "://" in str(out):
        raise UserError(f"out = {str(out)!r} is a URL; answers are written to a local folder, so give one")
    for name in names:
        if name not in experiment.data.names:
            raise unknown("source", name, experiment.data.names)
    corpus = open_corpus(experiment.data)
    world = sharding.make(experiment.mesh)
    with jax.set_mesh(world):
        asked = _Asked(
            experiment, teachers.open_teacher(teacher, experiment.data.tokenizer, experiment.vocab_size), how
        )
        for source, name in enumerate(experiment.data.names):
            if not names or name in names:
                _source(asked, corpus, source, Path(out) / name, shards=shards, part=part)
    waiting = [name for name in experiment.data.names if not (Path(out) / name / files.MANIFEST).is_file()]
    if waiting:
        print(f"not yet to be trained with: {', '.join(waiting)} in {out} lacks shards, which other calls make")
        return
    print(f"--config.distill='{json.dumps({'cache': str(out), 'method': how.method, 'per_token': how.per_token})}'")


class _Asked:
    """A teacher that is ready to answer."""

    def __init__(self, experiment: Experiment, folder: ModelFolder, how: Distillation):
        self.folder, self.how, self.data = folder, how, experiment.data
        self.fingerprint = teachers.fingerprint(folder)
        self.seed = derive_seed(experiment.train.seed, "cache")
        self.world = sharding.make(experiment.mesh)
        self.vocab_size = experiment.vocab_size
        self.reads_text = teachers.reads_text(folder)
        self._model = folders.load_model(folder, mesh=self.world)
        self._answer = jax.jit(
            functools.partial(
                _answers,
                compute=experiment.compute,
                answer=functools.partial(loss.answers, how=how, tile_tokens=experiment.train.tile_tokens),
                vocab_size=self.vocab_size,
            )
        )

    def about(self, questions: Sequence[Question], key: jax.Array) -> list[tuple[np.ndarray, ...]]:
        """(ids, log_probs, tail) of each; of as many as the config's batches have rows."""
        rows = self.data.rows
        place = sharding.batch_sharding(self.world)
        sides = [_rows([getattr(q, side) for q in questions], rows, self.data) for side in ("encoder", "decoder")]
        encoder, decoder = (jax.device_put(side, place) for side in sides)
        made = self._answer(self._model, None if self.reads_text else encoder, decoder, key)
        return [_in_text(q, *(x[row] for x in jax.device_get(made))) for row, q in enumerate(questions)]


def _answers(
    model: Any, encoder: Sequences | None, decoder: Sequences, key: jax.Array, *, compute, answer, vocab_size: int
):
    hidden_BTD, head = model.hidden(encoder, decoder, compute=compute), model.head()
    return answer(hidden_BTD, type(head)(head.table_VD[:vocab_size], head.softcap), key=key)


def _source(asked: _Asked, corpus: Corpus, source: int, folder: Path, *, shards: int, part: Part) -> None:
    """Writes one source's folder."""
    chunks = corpus.chunks[source]
    layout = LogitShardLayout(len(chunks), min(shards, len(chunks)), asked.how.per_token, _dtype(asked.vocab_size))
    plan = _plan(asked, corpus, source, layout)
    bytes_of = _claim(folder, plan)
    mine = [shard for shard in range(layout.shards) if shard % part.of == part.which]
    missing = [shard for shard in mine if not _is_whole(folder / layout.file(shard), bytes_of)]
    log.info("%s: %d of %d shards to make", folder, len(missing), len(mine))
    for shard in missing:
        records = _records(asked, corpus, source, layout, shard)
        _replace(folder / layout.file(shard), functools.partial(files.write_shard, records=records))
    made = {layout.file(shard) for shard in missing}
    there = [folder / layout.file(shard) for shard in range(layout.shards)]
    waiting = [file for file in there if file.name not in made and not _is_whole(file, bytes_of)]
    if waiting:
        log.info("%s: %d of %d shards are still to come", folder, len(waiting), len(there))
        return
    said = plan | {"shards": [{"file": file.name, "bytes": file.stat().st_size} for file in there]}
    _write_json(folder / files.MANIFEST, said)
    (folder / PLAN).unlink(missing_ok=True)


def _is_whole(file: Path, bytes_of: Mapping[str, int]) -> bool:
    """Whether a shard is there, and as long as it was when its folder was finished."""
    return file.is_file() and file.stat().st_size == bytes_of.get(file.name, file.stat().st_size)


def _records(asked: _Asked, corpus: Corpus, source: int, layout: LogitShardLayout, shard: int) -> Iterator[bytes]:
    """The records of a shard, chunk after chunk; those of a few batches are in memory."""
    chunks, told, tokens = layout.chunks_of(shard), time.perf_counter(), 0
    for begin in range(chunks.start, chunks.stop, BLOCK * asked.data.rows):
        block = range(begin, min(begin + BLOCK * asked.data.rows, chunks.stop))
        packed: dict[int, bytes] = {}
        for batch in _batches(asked, corpus, source, block):
            key = jax.random.key(derive_seed(asked.seed, source, min(batch)))
            for chunk, found in zip(batch, asked.about(list(batch.values()), key), strict=True):
                packed[chunk] = layout.pack(*found)
                tokens += len(found[0])
        yield from (packed[chunk] for chunk in block)
        passed = time.perf_counter() - told
        if passed >= TELL_SECONDS or block.stop == chunks.stop:
            done = block.stop - chunks.start
            log.info("shard %d: %d of %d chunks, %.0f tokens/s", shard, done, len(chunks), tokens / passed)
            told, tokens = time.perf_counter(), 0


def _batches(asked: _Asked, corpus: Corpus, source: int, chunks: range) -> Iterator[dict[int, Question]]:
    """The questions about chunks, by chunk; those of about one length together, because short rows are padded."""
    questions = {chunk: _question(asked, corpus, source, chunk) for chunk in chunks}
    order = sorted(questions, key=lambda chunk: (len(questions[chunk].decoder), chunk))
    for at in range(0, len(order), asked.data.rows):
        yield {chunk: questions[chunk] for chunk in order[at : at + asked.data.rows]}


def _question(asked: _Asked, corpus: Corpus, source: int, chunk: int) -> Question:
    tokens, objective = corpus.chunks[source][chunk], asked.data.sources[source].objective
    text, special_tokens = objective.text(tokens), asked.data.tokenizer.special_tokens
    if asked.reads_text:
        decoder = np.concatenate([[special_tokens.bos], text[:-1]], dtype=np.int32, casting="unsafe")
        return Question(np.empty(0, np.int32), decoder, np.arange(len(text)), len(text))
    example = objective(tokens, np.random.default_rng(0), special_tokens=special_tokens)
    assert example.origins is not None
    return Question(example.encoder_tokens, example.decoder_tokens, example.origins, len(text))


def _in_text(question: Question, ids_TN, log_probs_TN, tail_T) -> tuple[np.ndarray, ...]:
    """The answers where they belong in the text; elsewhere none."""
    there = np.flatnonzero(question.origins >= 0)
    places, made = question.origins[there], []
    for array, nothing in ((ids_TN, 0), (log_probs_TN, -np.inf), (tail_T, 1)):
        out = np.full((question.tokens, *array.shape[1:]), nothing, array.dtype)
        out[places] = array[there]
        made.append(out)
    return tuple(made)


def _rows(sequences: Sequence[np.ndarray], rows: int, data: DataConfig) -> Sequences:
    """One sequence a row, rows of nothing after the last; as long as the longest, rounded up so that shapes are few."""
    step = max(data.chunk_tokens // 4, 1)
    length = -(-max(*map(len, sequences), 1) // step) * step
    tokens = np.full((rows, length), data.tokenizer.special_tokens.pad, np.int32)
    segments = np.zeros((rows, length), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
        segments[row, : len(sequence)] = 1
    return Sequences(tokens, segments, np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape) * segments)


def _plan(asked: _Asked, corpus: Corpus, source: int, layout: LogitShardLayout) -> dict[str, Any]:
    """What a folder's shards follow from."""
    plan: dict[str, Any] = {
        "teacher": str(asked.folder.path),
        "teacher_fingerprint": asked.fingerprint,
        "pieces_fingerprint": corpus.chunks_fingerprint(source),
        "pieces": layout.chunks,
        "vocab_size": asked.vocab_size,
        "method": asked.how.method,
        "per_token": asked.how.per_token,
        "seed": asked.seed if asked.how.method == "sampled" else 0,
        "dtype": layout.dtype,
        "shards": [layout.file(shard) for shard in range(layout.shards)],
    }
    if not asked.reads_text:
        objective = asked.data.sources[source].objective
        if objective.is_stochastic:
            raise UserError(
                f"source {corpus.config.names[source]!r}: the teacher, {asked.folder.path}, is an encoder-decoder, "
                f"whose answers depend on what {type(objective).__name__} draws for an example; ask it in the run "
                f"(distill.teacher), or take a decoder-only teacher, which reads the text"
            )
        plan["objective"] = repr(objective)
    return json.loads(json.dumps(plan))


def _claim(folder: Path, plan: Mapping[str, Any]) -> dict[str, int]:
    """Writes down what the folder is going to hold; the bytes of its shards by name, if it has been finished before.

    Raises:
      UserError: it holds something else, or is none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder.absolute()} cannot be a folder, because a file is in its place") from None
    for name in (files.MANIFEST, PLAN):
        if not (folder / name).is_file():
            continue
        said = files.described(folder / name)
        shards = said.get("shards", [])
        said["shards"] = [shard if isinstance(shard, str) else shard["file"] for shard in shards]
        # the same teacher may lie somewhere else
        differ = [
            key for key in sorted(plan.keys() | said.keys()) if key != "teacher" and plan.get(key) != said.get(key)
        ]
        if differ:
            shown = "; ".join(f"{key}: {said.get(key)} -> {plan.get(key)}" for key in differ if key != "shards")
            raise UserError(
                f"{folder.absolute()} holds other answers (there -> now: {shown or 'another number of shards'}); give "
                f"another folder, or remove this one"
            )
        return {shard["file"]: shard["bytes"] for shard in shards if not isinstance(shard, str)}
    # what ends in .part is of a call that was killed while it wrote, or of another part of the work
    others = sorted(file.name for file in folder.iterdir() if file.suffix != ".part")
    if others:
        raise UserError(f"{folder.absolute()} holds {others[0]}; answers are written to a folder of their own")
    _write_json(folder / PLAN, plan)
    return {}


def _write_json(target: Path, what: Mapping[str, Any]) -> None:
    """Parts of the work may write the same at the same time, so each has a name of its own until it is whole."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.write_text(json.dumps(what, indent=1) + "\n")
    os.replace(part, target)


def _replace(target: Path, write: Callable[[Path], None]) -> None:
    part = target.with_name(f".{target.name}.part")
    write(part)
    os.replace(part, target)


def _dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<i4"
