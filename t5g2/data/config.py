"""Data settings of a run as frozen dataclasses; every rule that needs no file is checked on construction."""

import bisect
import functools
import math
from dataclasses import dataclass
from typing import Annotated, Literal

from t5g2.core.bounds import LONGEST, Bounds, Share, checked
from t5g2.core.errors import UserError
from t5g2.core.objective import Objective
from t5g2.data.chunking import MAX_SKIPPED, LongDocuments
from t5g2.data.image_tokens import ImageRows
from t5g2.data.sources.documents import SHORTEST_TOKENS, OnBadRecord
from t5g2.data.sources.image_text import ImageText
from t5g2.data.sources.labelled_text import LabelledText
from t5g2.data.sources.text_pairs import TextPairs
from t5g2.data.sources.text_source import TextSource
from t5g2.data.tokenizers.base import Tokenizer


@dataclass(frozen=True)
@checked
class Source:
    """A source of text, with its objective and its weight in the mixture.

    Attributes:
      text: the files, or the data set of a library.
      objective: turns each chunk into an example.
      weight: share of the examples that are drawn from this source, in proportion to the other weights; a whole number
        or not, such as the number of its examples (data/mixture.py).
      name: label in logs and metrics, unique in a run; "" = the source's number.
    """

    text: TextSource
    objective: Objective
    weight: Annotated[int | float, Bounds(least=1e-18, most=10**18, hint="to leave the source out, remove it")] = 1
    name: str = ""

    def __post_init__(self):
        if "/" in self.name or self.name.startswith("."):  # it names metrics, and folders of shards
            raise UserError(f"name = {self.name!r}; the name of a source has no / in it and does not begin with a dot")


@dataclass(frozen=True)
@checked
class TeacherFeatures:
    """Features that rows have for a teacher, in addition to the origins of the targets.

    Attributes:
      carry: "rows" = none, the teacher reads the student's rows; "text" = the text that each example was made of, for a
        decoder-only teacher; "cached_logits" = the teacher's logits, computed by `t5g2 cache-logits` before the run.
      cache: folder of the cached logits.
      per_token: number of tokens that are kept of a distribution.
      method: selection of the kept tokens, as in Distillation.
      teacher: fingerprint of the teacher that computed the cached logits; None = any.
    """

    carry: Literal["rows", "text", "cached_logits"]
    cache: str | None = None
    per_token: Annotated[int, Bounds(least=0, most=LONGEST)] = 0
    method: str = ""
    teacher: str | None = None


@dataclass(frozen=True)
@checked
class DataConfig:
    """The data of a run. These settings and a seed determine the batches; workers and prefetch do not change them.

    Attributes:
      sources: the sources of the mixture.
      tokenizer: turns text into ids. Left out, or {"kind": "of_weights"}, it is the one beside the weights that the run
        starts from (or beside the teacher's), and bytes, or what "without_weights" names, if there are none.
      rows: number of rows of the global batch; it divides streams, or streams divides it.
      encoder_length, decoder_length: tokens of a row on either side; encoder_length 0 = a decoder-only model.
      chunk_tokens: maximum number of tokens of a chunk; documents are cut into chunks, and each chunk becomes an
        example.
      long_documents: "split" = every token is in a chunk, "truncate" = a document is its first chunk alone.
      packing: "first_fit" and "best_fit" put several examples into a row (data/packing.py), "none" puts one.
      packing_rows: number of rows that a stream fills at a time; more leave less padding, and make a resume slower.
      streams: number of virtual streams among which the sources are divided (data/streams.py); fixed during a run.
      workers: number of processes that make rows; 0 = a thread of this process.
      prefetch: number of batches that are made ahead.
      on_bad_record: "stop" = a record that cannot be read is an error, "skip" = such records are counted and left out.
      max_skipped: the largest share of a source's records that may be left out.
      cache_tokens: tokenise each text once, into the cache folder (data/shards/token_cache.py); dialogues and texts
        with images are not kept.
      images: the images of the rows; None = rows have none.
      teacher_features: features of the rows for a teacher; None = there is no teacher. Set by the run, not by a config.
    """

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    rows: Annotated[int, Bounds(least=1, most=2**20)]
    encoder_length: Annotated[int, Bounds(least=0, most=2**20)]
    decoder_length: Annotated[int, Bounds(least=2, most=2**20)]
    chunk_tokens: Annotated[int, Bounds(least=2 * SHORTEST_TOKENS, most=LONGEST)]
    long_documents: LongDocuments = "split"
    packing: Literal["first_fit", "best_fit", "none"] = "first_fit"
    packing_rows: Annotated[int, Bounds(least=1, most=4096)] = 8
    streams: Annotated[int, Bounds(least=1, most=2**16)] = 64
    workers: Annotated[int, Bounds(least=0, most=1024)] = 0
    prefetch: Annotated[int, Bounds(least=1, most=1024)] = 2
    on_bad_record: OnBadRecord = "stop"
    max_skipped: Share = MAX_SKIPPED
    cache_tokens: bool = False
    images: ImageRows | None = None
    teacher_features: TeacherFeatures | None = None

    def __post_init__(self):
        if not self.sources:
            raise UserError("sources is empty; give at least one source of text")
        # each process holds whole groups of rows and streams (data/streams.py)
        if self.rows % self.streams and self.streams % self.rows:
            raise UserError(
                f"rows = {self.rows} and streams = {self.streams}: neither divides the other, so rows cannot be "
                f"divided evenly; nearest streams that fit: {', '.join(map(str, self._fitting_streams()))}"
            )
        if len(set(self.names)) < len(self.names):
            raise UserError(f"two sources have the same name: {', '.join(self.names)}; give each another one")
        for source, name in zip(self.sources, self.names, strict=True):
            self._check_images(source, name)
            self._check_pairs(source, name)
            self._check_fits(source.objective, name)

    @property
    def names(self) -> tuple[str, ...]:
        """The sources' names; entries of `Batch.sources` are indices of this tuple."""
        return tuple(source.name or str(i) for i, source in enumerate(self.sources))

    @functools.cached_property
    def denoisers(self) -> tuple[str, ...]:
        """The names of the denoisers of all objectives, each once; entries of `Batch.denoisers` are indices of it."""
        return tuple(dict.fromkeys(name for source in self.sources for name in source.objective.denoisers))

    @property
    def uses_blocks(self) -> bool:
        """True if the decoder's rows have blocks: tokens that attend to each other in both directions."""
        return any(source.objective.uses_blocks for source in self.sources)

    @property
    def takes_labels(self) -> bool:
        """True if the examples have labels, which a probe predicts."""
        return any(source.objective.takes_labels for source in self.sources)

    @property
    def examples_per_row(self) -> int:
        """The maximum number of examples in a row: one for every 8 decoder tokens, or 1 without packing."""
        return 1 if self.packing == "none" else max(1, self.decoder_length // 8)

    def _check_images(self, source: Source, name: str):
        if not isinstance(source.text, ImageText):
            return
        if self.images is None:
            raise UserError(
                f"source {name!r}: its texts have images, and data.images is not set; set the number of images per "
                f'row, with a model that has an image tower: data.images = {{"per_row": 4}}'
            )
        if not source.objective.takes_images:
            raise UserError(
                f"source {name!r}: its texts have images, and its objective, {type(source.objective).__name__}, would "
                f"predict them; take multimodal_prefix_lm, or multimodal_prefix_lm_decoder for a decoder-only model"
            )

    def _check_pairs(self, source: Source, name: str):
        if isinstance(source.text, LabelledText) != source.objective.takes_labels:
            raise UserError(
                f"source {name!r} has the objective {type(source.objective).__name__} on {type(source.text).__name__}; "
                f"labelled texts (kind labelled) are for probe and probe_decoder, and these for labelled texts alone"
            )
        if self.takes_labels and not source.objective.takes_labels:
            raise UserError(
                f"source {name!r} has the objective {type(source.objective).__name__} beside one of a probe; a run "
                f"has one loss, so give all sources labels, or none"
            )
        if isinstance(source.text, TextPairs) and source.text.eos and source.objective.appends_eos:
            raise UserError(
                f"source {name!r}: its text and its objective both append EOS to the targets; turn off the objective's "
                f"eos, or text.eos"
            )

    def _check_fits(self, objective: Objective, name: str):
        # all bounds are the worst case of a chunk, so a run never meets an example that does not fit
        encoder, decoder = objective.lengths(self.chunk_tokens)
        if encoder > 0 and self.encoder_length == 0:
            raise UserError(
                f"source {name!r}: its objective, {type(objective).__name__}, makes encoder inputs, and "
                f"encoder_length is 0: the model is decoder-only. Take causal or prefix_lm_decoder, or an "
                f"encoder-decoder model with an encoder_length of at least {encoder}"
            )
        # blocks are bidirectional prefixes in the decoder; an encoder-decoder has its prefix in the encoder
        if objective.uses_blocks and self.encoder_length > 0:
            raise UserError(
                f"source {name!r}: its objective, {type(objective).__name__}, is for a decoder-only model, and "
                f"encoder_length is {self.encoder_length}; take prefix_lm, or a decoder-only model and encoder_length 0"
            )
        if encoder > self.encoder_length or decoder > self.decoder_length:
            raise UserError(
                f"source {name!r}: a chunk of chunk_tokens = {self.chunk_tokens} becomes up to {encoder} encoder and "
                f"{decoder} decoder tokens, but a row has encoder_length = {self.encoder_length} and decoder_length = "
                f"{self.decoder_length}; raise the lengths to at least these, or lower chunk_tokens"
                f"{self._longest_chunk(objective)}"
            )
        needed, available = objective.sentinels_needed(self.chunk_tokens), self.tokenizer.special_tokens.sentinels
        if needed > available:
            raise UserError(
                f"source {name!r}: a chunk of chunk_tokens = {self.chunk_tokens} takes up to {needed} sentinels, and "
                f"the tokenizer has {available}; give the tokenizer {needed} sentinels, lower chunk_tokens, choose "
                f"denoisers with longer spans or a lower rate, or let spans share them: the objective's sentinels = "
                f'"cyclic" begins again after the last, "mask" takes one token for every span'
            )
        try:
            objective.check_tokenizer(self.tokenizer.special_tokens, self.tokenizer.vocab_size)
        except UserError as error:
            raise UserError(f"source {name!r}: {error}") from None

    def _longest_chunk(self, objective: Objective) -> str:
        """Returns " to N" for the largest chunk_tokens whose examples fit the rows, "" if none does."""

        def too_long(tokens: int) -> bool:
            encoder, decoder = objective.lengths(tokens)
            return encoder > self.encoder_length or decoder > self.decoder_length

        # lengths never fall when chunks grow, so the numbers that fit come before all others
        sizes = range(SHORTEST_TOKENS + 1, self.chunk_tokens + 1)
        fitting = bisect.bisect_left(sizes, True, key=too_long)
        return f" to {sizes[fitting - 1]}" if fitting else ""

    def _fitting_streams(self) -> list[int]:
        """Returns the three nearest numbers of streams, by ratio, that divide the rows or are divided by them."""
        small = [d for d in range(1, math.isqrt(self.rows) + 1) if self.rows % d == 0]
        nearest = max(self.streams // self.rows, 1)
        multiples = [self.rows * n for n in range(max(nearest - 2, 1), nearest + 4)]
        fitting = {*small, *(self.rows // d for d in small), *multiples}
        return sorted(sorted(fitting, key=lambda s: abs(math.log(s / self.streams)))[:3])
