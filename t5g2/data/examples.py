"""Examples by number: example k of a source is a pure function of the seed and k, in whatever process."""

import bisect
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from t5g2.core.batch import Example
from t5g2.core.objective import Objective
from t5g2.core.seeds import derive_seed
from t5g2.core.special_tokens import SpecialTokens
from t5g2.data import image_tokens, packed_rows
from t5g2.data.chunking import Chunks
from t5g2.data.config import TeacherFeatures
from t5g2.data.corpus import Corpus
from t5g2.data.image_tokens import ImageRows
from t5g2.data.shards.logit_shards import CachedTeacherLogits
from t5g2.data.sources.image_text import ImageText


class Chunk(NamedTuple):
    """A chunk of a source: int32[L] tokens, and the chunk's number in the source."""

    tokens: np.ndarray
    index: int


@dataclass(frozen=True)
class ExampleBuilder:
    """Builds example k of a source, a function of the chunk and of k.

    Attributes:
      source, sources: index of the source, and number of sources; an example's id is k * sources + source.
      denoisers: for each denoiser of the objective, its index in the run's list of denoisers.
      has_blocks: the run's rows have blocks.
      teacher_features: features of the rows for a teacher; None = there is no teacher.
      teacher_logits: cached teacher logits of the source's chunks; None = the run does not use any.
      images: images of the run's rows; None = rows have none.
      has_images: the chunks of this source have images.
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
        """Returns the features of the example, as the packer takes them."""
        # seeded by k, not drawn from a stream, so that any process computes the same example
        rng = np.random.default_rng([self.seed, self.source, k])
        if self.images is not None and not self.has_images:
            # in a source without images, an image token can only come from text that spells it
            tokens = image_tokens.replace_image_tokens(chunk.tokens, self.images, self.special_tokens.unk)
            chunk = chunk._replace(tokens=tokens)
        example = self.objective(chunk.tokens, rng, special_tokens=self.special_tokens)
        # one number for source and k, so that a batch can be traced back to its chunks
        example_id, denoiser = k * self.sources + self.source, self.denoisers[example.denoiser]
        features = packed_rows.example_features(example, example_id, denoiser)
        if self.has_blocks:
            no_blocks = np.zeros(len(example.targets), np.int32)
            features["blocks"] = no_blocks if example.blocks is None else example.blocks
        if example.label is not None:
            features["labels"] = np.full(len(example.targets), example.label, np.float32)
        if self.images is not None:
            count = np.count_nonzero(chunk.tokens == self.images.token) // self.images.tokens
            keys = [(self.source, chunk.index, nth) for nth in range(count)]
            features["images"] = np.array(keys, np.int64).reshape(count, 3)
        return features if self.teacher_features is None else features | self._for_teacher(example, chunk)

    def _for_teacher(self, example: Example, chunk: Chunk) -> dict[str, np.ndarray]:
        """Returns the features that a teacher takes."""
        assert self.teacher_features is not None
        assert example.origins is not None, f"{type(self.objective).__name__} gives no origins of its targets"
        features = {"origins": example.origins}
        if self.teacher_features.carry == "text":
            text = self.objective.text(chunk.tokens)
            # shifted by BOS: position t of the teacher's row predicts token t of the text
            features["text"] = np.concatenate([[self.special_tokens.bos], text[:-1]], dtype=np.int32, casting="unsafe")
        if self.teacher_logits is not None:
            logits = self.teacher_logits.lookup(chunk.index, example.origins)
            features |= dict(zip(packed_rows.TEACHER_LOGITS, logits, strict=True))
        return features


FEW = 4096  # chunks


def _entry(place: int, count: int, seed: int) -> int:
    """Returns an entry of a permutation of `count` numbers, as grain's MapDataset.shuffle computes it."""
    from grain.experimental import index_shuffle  # not above: importing grain imports jax

    return index_shuffle(place, max_index=count - 1, seed=seed, rounds=4)


# The cipher behind it permutes 2^16 numbers at least, and of few chunks seeks the next that is one of them: 2 ms for
# each of 10. What reads the same order again, as an evaluation does, finds it here.
@functools.lru_cache(maxsize=4 * FEW)
def _remembered_entry(place: int, count: int, seed: int) -> int:
    return _entry(place, count, seed)


class SourceExamples:
    """The examples of a source by number; epoch after epoch, each in an order of its own.

    Args:
      chunks: the chunks of the source.
      build: makes an example from a number and a chunk.
      seed: seed of the orders.
      epochs: number of epochs; None = endless.
    """

    def __init__(self, chunks: Chunks, build: ExampleBuilder, *, seed: int, epochs: int | None = None):
        self._chunks, self._build, self._seed = chunks, build, seed
        self._entry = _remembered_entry if len(chunks) <= FEW else _entry
        self._length = sys.maxsize if epochs is None else epochs * len(chunks)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        count = len(self._chunks)
        epoch, place = divmod(k, count)
        # one entry of a permutation is computed, so no list is kept, and any example of any epoch is reached at once
        index = self._entry(place, count, (self._seed + epoch) % 2**32)
        return self._build(k, Chunk(self._chunks[index], index))


class ConcatenatedExamples:
    """The first `limit` examples of each part (None = all), one part after the other."""

    def __init__(self, parts: Sequence[SourceExamples], *, limit: int | None = None):
        self._parts = parts
        self._ends = np.cumsum([len(part) if limit is None else min(len(part), limit) for part in parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


def source_examples(
    corpus: Corpus, source: int, *, seed: int, epochs: int | None = None, denoiser: str | None = None
) -> SourceExamples:
    """Returns the examples of a source, endless unless `epochs` limits them.

    With `denoiser`, every example is made by this one; its number is still its index in the run's list of denoisers.
    """
    config, objective = corpus.config, corpus.config.sources[source].objective
    objective = objective if denoiser is None else objective.only(denoiser)
    # one seed for all sources: ExampleBuilder adds the source's number to it
    build = ExampleBuilder(
        objective,
        config.tokenizer.special_tokens,
        derive_seed(seed, "example"),
        source=source,
        sources=len(config.sources),
        denoisers=tuple(config.denoisers.index(name) for name in objective.denoisers),
        has_blocks=config.uses_blocks,
        teacher_features=config.teacher_features,
        teacher_logits=corpus.teacher_logits[source],
        images=config.images,
        has_images=isinstance(config.sources[source].text, ImageText),
    )
    return SourceExamples(corpus.chunks[source], build, seed=derive_seed(seed, "shuffle", source), epochs=epochs)
