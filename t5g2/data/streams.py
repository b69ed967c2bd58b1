"""Virtual streams: an order of the data that depends on the seed alone, however many processes read it.

    each source:  chunks -> shuffle -> repeat -> example k = f(chunk, k) -> every streams-th example, from s on
    stream s:     its part of each source -> mix -> pack

Every epoch is shuffled anew. Example k of a source is a pure function of k, so streams see different draws and an epoch
has each chunk once. The mix is exact in each block of sum(weights) draws; the order in a block follows from seed,
stream and block. Where a stream stands is a few integers.

With B rows in the global batch: if B >= streams, row r comes from stream r // (B / streams). Otherwise, with g =
streams / B, row r of batch n comes from stream r * g + n mod g, so that all streams are read in turn. A *unit* is what
both have in common: max(B / streams, 1) rows and the max(g, 1) streams that fill them.
"""

import bisect
import dataclasses
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t5g2.core.batch import Example
from t5g2.core.errors import UserError
from t5g2.core.objective import Objective
from t5g2.core.seeds import derive_seed
from t5g2.core.special_tokens import SpecialTokens
from t5g2.data import image_tokens, packed_rows
from t5g2.data.chunking import Chunks, open_chunks
from t5g2.data.config import DataConfig, Source, TeacherFeatures
from t5g2.data.image_tokens import ImageRows
from t5g2.data.packing import START, PackedRows, Position
from t5g2.data.shards.logit_shards import CachedTeacherLogits
from t5g2.data.shards.token_cache import CachedText
from t5g2.data.sources.dialogues import Chat, FilteredChat
from t5g2.data.sources.image_documents import FilteredImageText
from t5g2.data.sources.image_text import ImageText


@dataclass(frozen=True, eq=False)
class Corpus:
    """A config whose sources are open.

    Attributes:
      chunks: of each source.
      answers: of a teacher about them, where the config has such; else None for each.
    """

    config: DataConfig
    chunks: tuple[Chunks, ...]
    teacher_logits: tuple[CachedTeacherLogits | None, ...]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the texts, the tokenizer and how they are cut, and a teacher's answers."""
        parts = [p.documents.fingerprint for p in self.chunks] + self._chunking_settings()
        return _digest([*parts, *(answers.fingerprint for answers in self.teacher_logits if answers is not None)])

    def chunks_fingerprint(self, source: int) -> str:
        """16 hex digits that change with the chunks of a source."""
        return _digest([self.chunks[source].documents.fingerprint, *self._chunking_settings()])

    def _chunking_settings(self) -> list[str]:
        truncated = ["truncated"] if self.config.long_documents == "truncate" else []
        images = [] if self.config.images is None else [str(self.config.images)]
        return [self.config.tokenizer.fingerprint(), str(self.config.chunk_tokens), *truncated, *images]

    def with_images(self, rows: packed_rows.Rows) -> packed_rows.Rows:
        """Stacked rows whose images are there, uint8[b, I, size, size, 3], and not where they are, int64[b, I, 3]."""
        if self.config.images is None:
            return rows
        where, pictures = rows["images"], packed_rows.no_images(self.config.images, len(rows["images"]))
        for row, i in np.argwhere(where[..., 0] != packed_rows.NO_EXAMPLE).tolist():
            source, chunk, nth = where[row, i].tolist()
            pictures[row, i] = self.chunks[source].image(chunk, nth)
        return {**rows, "images": pictures}


def open_corpus(config: DataConfig) -> Corpus:
    """Opens every source.

    Raises:
      UserError: a source is missing, empty or malformed; names it.
    """
    chunks = []
    for name, source in zip(config.names, config.sources, strict=True):
        try:
            opened = open_source(source, config)
        except UserError as error:
            raise UserError(f"source {name!r}: {error}") from None
        chunks.append(opened)
    corpus = Corpus(config, tuple(chunks), (None,) * len(chunks))
    return (
        corpus
        if config.teacher_features is None or config.teacher_features.cache is None
        else _with_teacher_logits(corpus, config.teacher_features)
    )


def open_source(source: Source, config: DataConfig) -> Chunks:
    """The chunks of a source as a run of this config reads them.

    Raises:
      UserError: as open_pieces, and InRows.
    """
    text = source.text
    if isinstance(text, ImageText):
        assert config.images is not None, "DataConfig refuses texts with images where rows have none"
        text = FilteredImageText(text, config.images, config.tokenizer, config.chunk_tokens)
    elif isinstance(text, Chat):
        text = FilteredChat(text, config.tokenizer, config.chunk_tokens)
    elif config.cache_tokens:
        text = CachedText(text, config.tokenizer, config.max_skipped, workers=config.workers)
    return open_chunks(
        text,
        config.tokenizer,
        chunk_tokens=config.chunk_tokens,
        on_bad_record=config.on_bad_record,
        max_skipped=config.max_skipped,
        pairs=source.objective.takes_pairs,
        long_documents=config.long_documents,
    )


def _with_teacher_logits(corpus: Corpus, teaching: TeacherFeatures) -> Corpus:
    answers = []
    for i, name in enumerate(corpus.config.names):
        found = CachedTeacherLogits(Path(teaching.cache or "") / name, per_token=teaching.per_token)
        found.check(
            corpus.chunks_fingerprint(i),
            objective=repr(corpus.config.sources[i].objective),
            vocab_size=corpus.config.tokenizer.vocab_size,
            method=teaching.method,
            teacher=teaching.teacher,
        )
        answers.append(found)
    return dataclasses.replace(corpus, answers=tuple(answers))


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


class Chunk(NamedTuple):
    """What an example is made of: int32[L] tokens, and which of its source's chunks they are."""

    tokens: np.ndarray
    index: int


@dataclass(frozen=True)
class ExampleBuilder:
    """Example k of a source: a function of the chunk and of k.

    Attributes:
      source, sources: its number, and how many there are; the example's id, k * sources + source, tells both.
      denoisers: for each denoiser of the objective its number in the run's list.
      blocks: whether the run's rows have blocks.
      teaching: what they carry for a teacher, if there is one.
      answers: of it, if they carry these.
      images: of the run's rows, if they have any; of this source's chunks too, if they are `pictured`.
    """

    objective: Objective
    special_tokens: SpecialTokens
    seed: int
    source: int
    sources: int
    denoisers: tuple[int, ...]
    has_blocks: bool = False
    teacher_features: TeacherFeatures | None = None
    teacher_logits: CachedTeacherLogits | None = None
    images: ImageRows | None = None
    has_images: bool = False

    def __call__(self, k: int, chunk: Chunk) -> dict[str, np.ndarray]:
        """The example as the packer takes it."""
        rng = np.random.default_rng([self.seed, self.source, k])
        if self.images is not None and not self.has_images:
            chunk = chunk._replace(
                tokens=image_tokens.replace_image_tokens(chunk.tokens, self.images, self.special_tokens.unk)
            )
        example = self.objective(chunk.tokens, rng, special_tokens=self.special_tokens)
        example_id, denoiser = k * self.sources + self.source, self.denoisers[example.denoiser]
        made = packed_rows.example_features(example, example_id, denoiser)
        if self.has_blocks:
            none = np.zeros(len(example.targets), np.int32)
            made["blocks"] = none if example.blocks is None else example.blocks
        if self.images is not None:
            count = np.count_nonzero(chunk.tokens == self.images.token) // self.images.tokens
            where = [(self.source, chunk.index, nth) for nth in range(count)]
            made["images"] = np.array(where, np.int64).reshape(count, 3)
        return made if self.teacher_features is None else made | self._for_teacher(example, chunk)

    def _for_teacher(self, example: Example, chunk: Chunk) -> dict[str, np.ndarray]:
        assert self.teacher_features is not None
        assert example.origins is not None, f"{type(self.objective).__name__} does not say where its targets stand"
        made = {"origins": example.origins}
        if self.teacher_features.carry == "text":
            text = self.objective.text(chunk.tokens)
            made["text"] = np.concatenate([[self.special_tokens.bos], text[:-1]], dtype=np.int32, casting="unsafe")
        if self.teacher_logits is not None:
            found = self.teacher_logits.lookup(chunk.index, example.origins)
            made |= {f"answer_{name}": array for name, array in zip(("ids", "log_probs", "tail"), found, strict=True)}
        return made


class SourceMixture:
    """Which source draw i of a stream comes from, and which of that source's examples it is.

    Of each block of sum(weights) draws, weights[d] come from source d, in an order drawn from seed, stream and block.
    With weights (2, 1), block 0 drawn as [0 1 0] and block 1 as [1 0 0]:

        draw                0      1      2      3      4      5
        (source, example)  (0,0)  (1,0)  (0,1)  (1,1)  (0,2)  (0,3)
    """

    def __init__(self, weights: Sequence[int], *, seed: int, stream: int):
        self._weights, self._seed, self._stream = tuple(weights), seed, stream
        self._block, self._order = -1, np.empty((0, 2), np.int64)

    def __getitem__(self, index: int) -> tuple[int, int]:
        block, draw = divmod(index, sum(self._weights))
        if block != self._block:
            # kept, because the next draws are of this block; what it holds follows from the block alone
            self._block, self._order = block, self._draw(block)
        source, nth = self._order[draw].tolist()
        return source, block * self._weights[source] + nth

    def _draw(self, block: int) -> np.ndarray:
        """int64[draws, 2]: of each draw the source, and how many draws of the block came from it before."""
        sources = np.repeat(np.arange(len(self._weights)), self._weights)
        nth = np.concatenate([np.arange(weight) for weight in self._weights])
        rng = np.random.default_rng([self._seed, self._stream, block])
        out = np.empty((len(sources), 2), np.int64)
        out[np.argsort(rng.permutation(sources), kind="stable")] = np.stack([sources, nth], axis=1)
        return out


class SourceExamples:
    """The examples of a source by number; epoch after epoch, each in an order of its own.

    Args:
      chunks: of the source.
      make: an example of a chunk.
      seed: of the orders.
      epochs: how many; None = without end.
    """

    def __init__(self, chunks: Chunks, build: ExampleBuilder, *, seed: int, epochs: int | None = None):
        from grain.experimental import index_shuffle  # not above: importing grain imports jax

        self._pieces, self._make, self._seed, self._shuffle = chunks, build, seed, index_shuffle
        self._epoch, self._length = len(chunks), sys.maxsize if epochs is None else epochs * len(chunks)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(k, self._epoch)
        # as grain's MapDataset.shuffle does it
        index = self._shuffle(place, max_index=self._epoch - 1, seed=(self._seed + epoch) % 2**32, rounds=4)
        return self._make(k, Chunk(self._pieces[index], index))


def source_examples(
    corpus: Corpus, source: int, *, seed: int, epochs: int | None = None, denoiser: str | None = None
) -> SourceExamples:
    """The examples of a source, without end unless the epochs are limited.

    With a denoiser, every example is made with this one; its number stays that of the run's list.
    """
    config, objective = corpus.config, corpus.config.sources[source].objective
    objective = objective if denoiser is None else objective.only(denoiser)
    make = ExampleBuilder(
        objective,
        config.tokenizer.special_tokens,
        derive_seed(seed, "example"),
        source,
        len(config.sources),
        tuple(config.denoisers.index(name) for name in objective.denoisers),
        config.uses_blocks,
        config.teacher_features,
        corpus.teacher_logits[source],
        config.images,
        isinstance(config.sources[source].text, ImageText),
    )
    return SourceExamples(corpus.chunks[source], make, seed=derive_seed(seed, "shuffle", source), epochs=epochs)


class StreamExamples:
    """The examples of a stream in the order of its draws: its part of each source, mixed."""

    def __init__(self, corpus: Corpus, stream: int, *, seed: int):
        config = corpus.config
        self._stream, self._streams = stream, config.streams
        self._sources = [source_examples(corpus, source, seed=seed) for source in range(len(config.sources))]
        weights = [source.weight for source in config.sources]
        self._selection = SourceMixture(weights, seed=derive_seed(seed, "mix"), stream=stream)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, draw: int) -> dict[str, np.ndarray]:
        source, nth = self._selection[draw] if len(self._sources) > 1 else (0, draw)
        return self._sources[source][self._stream + nth * self._streams]


class ConcatenatedExamples:
    """The first `most` examples of each part, one part after the other."""

    def __init__(self, parts: Sequence[SourceExamples], *, limit: int | None = None):
        self._parts = parts
        self._ends = np.cumsum([len(part) if limit is None else min(len(part), limit) for part in parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


def pack_rows(examples: Any, config: DataConfig, *, seed: int, position: Position = START) -> PackedRows:
    """The rows of examples, as the config packs them."""
    return PackedRows(
        examples,
        packed_rows.row_features(config),
        rows=config.packing_rows,
        policy=config.packing,
        seed=seed,
        position=position,
    )


class StreamReader:
    """The rows of one stream, from a position on."""

    def __init__(self, corpus: Corpus, stream: int, *, seed: int, position: Position = START):
        self.stream = stream
        examples = StreamExamples(corpus, stream, seed=seed)
        self._rows = pack_rows(examples, corpus.config, seed=derive_seed(seed, "rows", stream), position=position)

    @property
    def position(self) -> Position:
        """Where the stream stands."""
        return self._rows.position

    def next(self) -> dict[str, np.ndarray]:
        """The arrays of the next row."""
        return next(self._rows)


@dataclass(frozen=True)
class StreamAssignment:
    """How rows and streams belong together."""

    rows: int
    streams: int

    @property
    def count(self) -> int:
        """How many units there are."""
        return min(self.rows, self.streams)

    def rows_of(self, group: int) -> range:
        """The rows of the global batch that a unit fills."""
        each = self.rows // self.count
        return range(group * each, (group + 1) * each)

    def streams_of(self, group: int) -> range:
        """The streams that a unit reads in turn."""
        each = self.streams // self.count
        return range(group * each, (group + 1) * each)

    def groups_with(self, rows: range) -> range:
        """The units that hold these rows."""
        each = self.rows // self.count
        return range(rows.start // each, -(-rows.stop // each))


class StreamGroupReader:
    """The rows of some units, batch by batch."""

    def __init__(
        self, corpus: Corpus, groups: Sequence[int], *, seed: int, positions: Mapping[int, Position] | None = None
    ):
        self._corpus = corpus
        self._layout = StreamAssignment(corpus.config.rows, corpus.config.streams)
        self._units: list[list[StreamReader]] = []
        for unit in groups:
            streams = self._layout.streams_of(unit)
            at = {s: START if positions is None else positions[s] for s in streams}
            self._units.append([StreamReader(corpus, s, seed=seed, position=at[s]) for s in streams])
        self._each = corpus.config.rows // self._layout.count

    def next(self) -> dict[str, np.ndarray]:
        """The arrays of this batch's rows, stacked in the order of the units, with "streams" and "positions"."""
        rows, streams, positions = [], [], []
        for readers in self._units:
            # the rows that a unit's streams have given so far are its turns
            turn = sum(reader.position[2] for reader in readers)
            reader = readers[turn // self._each % len(readers)]
            for _ in range(self._each):
                rows.append(reader.next())
                streams.append(reader.stream)
                positions.append(reader.position)
        out = self._corpus.with_images({name: np.stack([row[name] for row in rows]) for name in rows[0]})
        return {**out, "streams": np.array(streams, np.int32), "positions": np.array(positions, np.int64)}

    def close(self) -> None:
        """Nothing is held open."""
