"""The opened sources of a run, and fingerprints, by which a resumed run recognises its data."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from t5g2.core.errors import UserError
from t5g2.data import packed_rows
from t5g2.data.chunking import Chunks, open_chunks
from t5g2.data.config import DataConfig, Source, TeacherFeatures
from t5g2.data.shards.logit_shards import CachedTeacherLogits
from t5g2.data.shards.token_cache import CachedText
from t5g2.data.sources.dialogues import Chat, FilteredChat
from t5g2.data.sources.documents import Openable
from t5g2.data.sources.image_documents import FilteredImageText
from t5g2.data.sources.image_text import ImageText
from t5g2.data.sources.labelled_text import LabelledText
from t5g2.data.sources.text_pairs import FilteredPairs, TextPairs


@dataclass(frozen=True, eq=False)
class Corpus:
    """A config whose sources are open.

    Attributes:
      chunks: the chunks of each source.
      teacher_logits: cached teacher logits of each source's chunks; None for each if the run does not use any.
    """

    config: DataConfig
    chunks: tuple[Chunks, ...]
    teacher_logits: tuple[CachedTeacherLogits | None, ...]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the texts, the tokenizer, the chunking, and the cached teacher logits."""
        # compared on a resume, because example ids and positions count chunks, and are meaningless for other chunks
        parts = [chunks.documents.fingerprint for chunks in self.chunks] + self._chunking_settings()
        return _digest([*parts, *(logits.fingerprint for logits in self.teacher_logits if logits is not None)])

    def chunks_fingerprint(self, source: int) -> str:
        """Returns 16 hex digits that change with the chunks of a source."""
        return _digest([self.chunks[source].documents.fingerprint, *self._chunking_settings()])

    def _chunking_settings(self) -> list[str]:
        # settings at their defaults add nothing, so that the fingerprints of older runs stay valid
        truncated = ["truncated"] if self.config.long_documents == "truncate" else []
        images = [] if self.config.images is None else [str(self.config.images)]
        return [self.config.tokenizer.fingerprint(), str(self.config.chunk_tokens), *truncated, *images]

    def with_images(self, rows: packed_rows.Rows) -> packed_rows.Rows:
        """Returns stacked rows with images, uint8[b, I, size, size, 3], in the place of their keys, int64[b, I, 3]."""
        if self.config.images is None:
            return rows
        keys = rows["images"]
        images = packed_rows.no_images(self.config.images, len(keys))
        # only here are images decoded, once a row is complete
        for row, i in np.argwhere(keys[..., 0] != packed_rows.NO_EXAMPLE).tolist():
            source, chunk, nth = keys[row, i].tolist()
            images[row, i] = self.chunks[source].image(chunk, nth)
        return {**rows, "images": images}


def open_corpus(config: DataConfig) -> Corpus:
    """Opens every source.

    Raises:
      UserError: a source is missing, empty or malformed; the message has its name.
    """
    chunks = []
    for name, source in zip(config.names, config.sources, strict=True):
        try:
            opened = open_source(source, config)
        except UserError as error:
            raise UserError(f"source {name!r}: {error}") from None
        chunks.append(opened)
    corpus = Corpus(config, tuple(chunks), (None,) * len(chunks))
    features = config.teacher_features
    return corpus if features is None or features.cache is None else _with_teacher_logits(corpus, features)


def open_source(source: Source, config: DataConfig) -> Chunks:
    """Returns the chunks of a source as a run of this config reads them.

    Raises:
      UserError: as in open_chunks and FilteredImageText.open.
    """
    text: Openable = source.text
    if isinstance(text, ImageText):
        assert config.images is not None, "DataConfig refuses texts with images where rows have none"
        text = FilteredImageText(text, config.images, config.tokenizer, config.chunk_tokens)
    elif isinstance(text, Chat):
        text = FilteredChat(text, config.tokenizer, config.chunk_tokens)
    elif isinstance(text, TextPairs) and source.objective.takes_pairs:
        inputs, targets = source.objective.lengths(config.chunk_tokens)
        most = inputs, targets - source.objective.appends_eos
        text = FilteredPairs(text, config.tokenizer, config.chunk_tokens, *most)
    # dialogues, pairs, labelled texts and texts with images are not cached: their tokens depend on more than the text
    elif config.cache_tokens and not isinstance(text, LabelledText):
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


def _with_teacher_logits(corpus: Corpus, features: TeacherFeatures) -> Corpus:
    caches = []
    for i, name in enumerate(corpus.config.names):
        cache = CachedTeacherLogits(Path(features.cache or "") / name, per_token=features.per_token)
        cache.check(
            corpus.chunks_fingerprint(i),
            objective=corpus.config.sources[i].objective.identity,
            vocab_size=corpus.config.tokenizer.vocab_size,
            method=features.method,
            teacher=features.teacher,
        )
        caches.append(cache)
    return dataclasses.replace(corpus, teacher_logits=tuple(caches))


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
