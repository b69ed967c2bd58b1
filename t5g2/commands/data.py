"""The data of an experiment before a run: as a person reads it, and as tokens made ahead."""

import collections
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from t5g2.core import logs, settings
from t5g2.core.batch import Batch, HostBatch
from t5g2.core.errors import UserError, unknown
from t5g2.data import chunking
from t5g2.data.config import DataConfig
from t5g2.data.image_tokens import ImageRows
from t5g2.data.pipeline import Pipeline, describe_ratio
from t5g2.data.preview import format_row
from t5g2.data.shards import token_shards
from t5g2.data.sources import text_source
from t5g2.data.sources.image_text import ImageText
from t5g2.models import flops
from t5g2.models.config import ModelConfig
from t5g2.train.experiment import Experiment

BATCHES = 8  # what shares and padding are measured on


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
    """What the first batches of a run hold.

    Attributes:
      first: the first batch.
      shares: of the decoder's tokens, by source and denoiser.
      examples: the share of the examples that came from each source.
      summary: padding and the like, as Statistics gives it.
      flop_padding: the share of padding, slots weighted with the FLOPs of a token on their side, attention left out.
      tokens_per_s: that were made, no padding counted.
      images: in these batches.
    """

    config: DataConfig
    first: HostBatch
    shares: dict[tuple[str, str], float]
    examples: dict[str, float]
    summary: Mapping[str, float]
    flop_padding: float
    tokens_per_s: float
    images: int = 0

    @property
    def padding(self) -> str:
        """Shares of padding in words, and how many examples a row has."""
        words = padding(self.summary, encoder=self.config.encoder_length > 0)
        words += f" ({self.flop_padding:.1%} of the FLOPs of all slots, attention left out)"
        return f"{words}; {self.summary['examples_per_row']:.1f} examples a row (the first {BATCHES} batches)"


def look(experiment: Experiment) -> Look:
    """Reads a few batches.

    Raises:
      UserError: the text is missing, empty or malformed.
    """
    logs.setup()
    config = experiment.data
    tokens: collections.Counter = collections.Counter()
    examples: collections.Counter = collections.Counter()
    with Pipeline(config, seed=experiment.train.seed) as pipeline:
        batches = [pipeline.next()]  # it takes the start of what makes it, too
        start, before = time.perf_counter(), pipeline.statistics.tokens
        batches += [pipeline.next() for _ in range(BATCHES - 1)]
        seconds = time.perf_counter() - start
        summary, made = pipeline.statistics.summary(), pipeline.statistics.tokens - before
        encoder_flops, decoder_flops = flops_of_token(experiment.model)
        flop_padding = pipeline.statistics.padding(encoder_flops=encoder_flops, decoder_flops=decoder_flops)
    for host_batch in batches:
        batch = host_batch.batch
        real = batch.decoder.segments > 0
        tokens.update(zip(batch.sources[real].tolist(), batch.denoisers[real].tolist(), strict=True))
        segments = batch.decoder.segments
        begins = real & (np.diff(segments, axis=1, prepend=0) != 0)
        examples.update(config.names[source] for source in batch.sources[begins].tolist())
    total = sum(tokens.values())
    shares = {(config.names[s], config.denoisers[d]): count / total for (s, d), count in sorted(tokens.items())}
    images = sum(_images(host_batch.batch, config.images) for host_batch in batches)
    drawn = {name: examples[name] / examples.total() for name in config.names}
    return Look(config, batches[0], shares, drawn, summary, flop_padding, made / seconds, images)


def _images(batch: Batch, rows: ImageRows | None) -> int:
    """How many images stand among the tokens that are read."""
    read = batch.decoder if batch.encoder is None else batch.encoder
    return 0 if rows is None else int(np.sum(read.tokens == rows.token)) // rows.tokens


def show(seen: Look, *, rows: int) -> None:
    """Prints the first rows of the first batch, then the shares, padding and tokens/s of making a few batches.

    In a terminal what spells a special token is in colour, unless NO_COLOR is set (https://no-color.org).
    """
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    special_tokens = _special_tokens(seen) if colours else None
    for row in range(min(rows, seen.config.rows)):
        text = format_row(seen.first, row, seen.config)
        print(special_tokens.sub("\033[36m\\g<0>\033[0m", text) if special_tokens else text, end="\n\n")
    print("source          denoiser        share of the decoder's tokens")
    for (source, denoiser), share in seen.shares.items():
        print(f"{source:15} {denoiser:15} {share:.1%}")
    images, config = "", seen.config
    if len(config.sources) > 1:
        whole = sum(source.weight for source in config.sources)
        weights = {name: source.weight for name, source in zip(config.names, config.sources, strict=True)}
        drawn = [f"{name} {share:.1%} (weight {weights[name]} of {whole})" for name, share in seen.examples.items()]
        print("examples:", ", ".join(drawn))
    if config.images is not None:
        each = seen.images / (BATCHES * config.rows)
        images = f"{each:.1f} images a row, which has room for {config.images.per_row}: data.images.per_row"
    told = filter(None, [f"padding: {seen.padding}", describe_ratio(seen.summary, config), images])
    print(*told, f"{seen.tokens_per_s:.0f} tokens/s", sep="\n")


def _special_tokens(seen: Look) -> re.Pattern | None:
    """How the special tokens of the first batch are spelled; None if it has none."""
    batch, tokenizer = seen.first.batch, seen.config.tokenizer
    read = batch.decoder if batch.encoder is None else batch.encoder
    tokens = np.unique(np.concatenate([batch.targets.ravel(), read.tokens.ravel()]))
    spelled = {tokenizer.decode(token[None]) for token in tokens[tokenizer.special_tokens.is_special(tokens)]} - {""}
    # the longest first, because the spelling of one may begin that of another
    return re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True)))) if spelled else None


def flops_of_token(model: ModelConfig) -> tuple[int, int]:
    """Of a token of the encoder and of the decoder, forward, attention left out; the head is the decoder's."""
    encoder, decoder = flops.Counts(encoder_tokens=1), flops.Counts(decoder_tokens=1)
    return sum(flops.forward(model, encoder).values()), sum(flops.forward(model, decoder).values())


def padding(summary: Mapping[str, float], *, encoder: bool) -> str:
    """The shares of padding in words; of a decoder-only model the decoder's alone."""
    decoder = f"{summary['decoder_padding']:.1%} of the decoder's slots"
    return f"{summary['encoder_padding']:.1%} of the encoder's slots, {decoder}" if encoder else decoder


def tokenize(
    config: DataConfig,
    out: str | PathLike,
    *,
    names: Sequence[str] = (),
    shards: int = 16,
    workers: int = 1,
    run: token_shards.ShardRunner | None = None,
) -> None:
    """Writes the tokens of sources, a folder each, and says what to set so that a run reads them.

    Args:
      config: its sources and its tokenizer count.
      out: the folder of the folders.
      names: of sources; none = all that are texts.
      shards: files of each source.
      workers: processes.
      run: how shards are made instead.

    Raises:
      UserError: no such source, or one with images; a text is missing or malformed; a folder holds other tokens.
    """
    logs.setup()
    for name in names:
        if name not in config.names:
            raise unknown("source", name, config.names)
    for number, (name, source) in enumerate(zip(config.names, config.sources, strict=True)):
        if (names and name not in names) or isinstance(source.text, token_shards.Tokens):
            continue
        if isinstance(source.text, ImageText):
            if names:
                raise UserError(f"source {name!r} has images, which are not kept as tokens; a run reads it as it is")
            continue
        opened = source.text.open(on_bad_record=config.on_bad_record)
        chunking.check_skipped(source.text, opened, config.max_skipped)
        described = settings.dump(source.text, tables=(text_source.BY_NAME,))
        job = token_shards.Job(opened, config.tokenizer, described, min(shards, len(opened)))
        begun = time.perf_counter()
        said = token_shards.write(job, Path(out) / name, workers=workers, run=run)
        seconds = time.perf_counter() - begun
        setting = json.dumps({"kind": "tokens", "path": str(Path(out) / name)})
        print(
            f"{name}: {said['documents']:,} documents, {said['tokens']:,} tokens in {len(said['shards'])} shards, "
            + (f"{opened.skipped:,} bad records left out, " if opened.skipped else "")
            + f"{seconds:.0f} s\n  --config.data.sources.{number}.text='{setting}'"
        )
