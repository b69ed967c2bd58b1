"""Measurement of the first batches of a run: shares of sources and denoisers, padding, tokens/s."""

import collections
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from t5g2.core import logs
from t5g2.core.batch import Batch, HostBatch
from t5g2.data import spellings as spelling_counts
from t5g2.data.config import DataConfig
from t5g2.data.image_tokens import ImageRows
from t5g2.data.pipeline import Pipeline
from t5g2.data.spellings import Spellings
from t5g2.data.tokenizers.subword import FileTokenizer
from t5g2.models import flops
from t5g2.models.config import ModelConfig
from t5g2.train.experiment import Experiment

BATCHES = 8  # the number of batches that are measured
SPELLINGS = 8  # the number of spelled special tokens that are named


@dataclass(frozen=True, eq=False)
class DataPreview:
    """The first BATCHES batches of a run.

    Attributes:
      first: the first batch.
      shares: shares of the decoder's tokens, by source and denoiser.
      examples: the share of the examples that came from each source.
      summary: padding and the like, as pipeline.Statistics gives it.
      flop_padding: the share of padding, slots weighted with the FLOPs of a token on their side, attention left out.
      tokens_per_s: speed of the pipeline, padding not counted.
      images: number of images in all batches.
      spellings: special tokens that are spelled in the text of each source.
    """

    config: DataConfig
    first: HostBatch
    shares: dict[tuple[str, str], float]
    examples: dict[str, float]
    summary: Mapping[str, float]
    flop_padding: float
    tokens_per_s: float
    images: int = 0
    spellings: Mapping[str, Spellings] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of all batches."""
        return BATCHES * self.config.rows

    @property
    def padding_text(self) -> str:
        """Shares of padding in words, and the number of examples per row."""
        words = describe_padding(self.summary, encoder=self.config.encoder_length > 0)
        words += f" ({self.flop_padding:.1%} of the FLOPs of all slots, attention left out)"
        return f"{words}; {self.summary['examples_per_row']:.1f} examples a row (the first {BATCHES} batches)"

    @property
    def spelling_lines(self) -> list[str]:
        """A line for each source in which special tokens are spelled."""
        tokenizer = self.config.tokenizer
        # either surprises some
        parsed = isinstance(tokenizer, FileTokenizer) and tokenizer.special_tokens_in_text
        meaning = "special tokens" if parsed else "text"
        return [
            f"special tokens spelled in {name}: "
            + ", ".join(f"{spelling} {times:,}" for spelling, times in list(spellings.counts.items())[:SPELLINGS])
            + f" (the first {spellings.documents:,} documents), read as {meaning}: "
            + "data.tokenizer.special_tokens_in_text"
            for name, spellings in self.spellings.items()
            if spellings.counts
        ]


def measure(experiment: Experiment) -> DataPreview:
    """Reads the first batches of a run.

    Raises:
      UserError: the text is missing, empty or malformed.
    """
    logs.setup()
    config = experiment.data
    with Pipeline(config, seed=experiment.train.seed) as pipeline:
        # the first batch is not timed: it includes the start of threads and processes
        batches = [pipeline.next()]
        start, tokens_before = time.perf_counter(), pipeline.statistics.tokens
        batches += [pipeline.next() for _ in range(BATCHES - 1)]
        seconds = time.perf_counter() - start
        summary, timed_tokens = pipeline.statistics.summary(), pipeline.statistics.tokens - tokens_before
        encoder_flops, decoder_flops = flops_per_token(experiment.model)
        flop_padding = pipeline.statistics.padding(encoder_flops=encoder_flops, decoder_flops=decoder_flops)
        documents = [chunks.documents for chunks in pipeline.corpus.chunks]
        spellings = {
            n: spelling_counts.count(d, config.tokenizer) for n, d in zip(config.names, documents, strict=True)
        }
    tokens: collections.Counter = collections.Counter()
    examples: collections.Counter = collections.Counter()
    for host_batch in batches:
        batch = host_batch.batch
        segments = batch.decoder.segments
        valid = segments > 0
        tokens.update(zip(batch.sources[valid].tolist(), batch.denoisers[valid].tolist(), strict=True))
        # an example starts where the segment changes
        starts = valid & (np.diff(segments, axis=1, prepend=0) != 0)
        examples.update(config.names[source] for source in batch.sources[starts].tolist())
    total = sum(tokens.values())
    shares = {(config.names[s], config.denoisers[d]): count / total for (s, d), count in sorted(tokens.items())}
    images = sum(_count_images(host_batch.batch, config.images) for host_batch in batches)
    example_shares = {name: examples[name] / examples.total() for name in config.names}
    speed = timed_tokens / seconds
    return DataPreview(
        config, batches[0], shares, example_shares, summary, flop_padding, speed, images, spellings=spellings
    )


def flops_per_token(model: ModelConfig) -> tuple[int, int]:
    """Returns forward FLOPs of an encoder and of a decoder token, attention left out; the head is the decoder's."""
    encoder, decoder = flops.Counts(encoder_tokens=1), flops.Counts(decoder_tokens=1)
    return sum(flops.forward(model, encoder).values()), sum(flops.forward(model, decoder).values())


def describe_padding(summary: Mapping[str, float], *, encoder: bool) -> str:
    """Returns the shares of padding in words, of the decoder alone if there is no encoder."""
    decoder = f"{summary['decoder_padding']:.1%} of the decoder's slots"
    return f"{summary['encoder_padding']:.1%} of the encoder's slots, {decoder}" if encoder else decoder


def _count_images(batch: Batch, rows: ImageRows | None) -> int:
    """Returns the number of images among the tokens of a batch."""
    inputs = batch.decoder if batch.encoder is None else batch.encoder
    return 0 if rows is None else int(np.sum(inputs.tokens == rows.token)) // rows.tokens
