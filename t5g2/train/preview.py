"""The data of an experiment before a run: as a person reads it, and as tokens made ahead."""

import collections
import json
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from t5g2.core import logs, settings
from t5g2.core.errors import unknown
from t5g2.data import shards as token_shards
from t5g2.data import sources
from t5g2.data.config import DataConfig
from t5g2.data.pipeline import Pipeline
from t5g2.data.preview import show_row
from t5g2.train.experiment import Experiment

BATCHES = 8  # what shares and padding are measured on


def show(experiment: Experiment, *, rows: int) -> None:
    """Prints the first rows of the first batch, then of a few batches the shares, padding and tokens/s of making them.

    Raises:
      UserError: the text is missing, empty or malformed.
    """
    logs.setup()
    config = experiment.data
    tokens = collections.Counter()
    with Pipeline(config, seed=experiment.train.seed) as pipeline:
        start = time.perf_counter()
        for number in range(BATCHES):
            batch = pipeline.next()
            if number == 0:
                for row in range(min(rows, config.rows)):
                    print(show_row(batch, row, config), end="\n\n")
            real = batch.batch.decoder.segments > 0
            pairs = zip(batch.batch.sources[real].tolist(), batch.batch.denoisers[real].tolist(), strict=True)
            tokens.update(pairs)
        seconds = time.perf_counter() - start
        summary = pipeline.statistics.summary()
    total = sum(tokens.values())
    print("source          denoiser        share of the decoder's tokens")
    for (source, denoiser), count in sorted(tokens.items()):
        print(f"{config.names[source]:15} {config.denoisers[denoiser]:15} {count / total:.1%}")
    print(
        f"padding: {padding(summary, encoder=config.encoder_length > 0)}; {summary['examples_per_row']:.1f} examples a "
        f"row (the first {BATCHES} batches)\n{pipeline.statistics.tokens / seconds:.0f} tokens/s"
    )


def padding(summary: Mapping[str, float], *, encoder: bool) -> str:
    """The shares of padding in words; of a decoder-only model the decoder's alone."""
    decoder = f"{summary['decoder_padding']:.1%} of the decoder's slots"
    return f"{summary['encoder_padding']:.1%} of the encoder's slots, {decoder}" if encoder else decoder


def tokenize(
    config: DataConfig, out: str | PathLike, *, names: Sequence[str] = (), shards: int = 16, workers: int = 1
) -> None:
    """Writes the tokens of sources, a folder each, and says what to set so that a run reads them.

    Args:
      config: its sources and its tokenizer count.
      out: the folder of the folders.
      names: of sources; none = all that are texts.
      shards: files of each source.
      workers: processes.

    Raises:
      UserError: no such source; a text is missing or malformed; a folder holds other tokens.
    """
    logs.setup()
    for name in names:
        if name not in config.names:
            raise unknown("source", name, config.names)
    for number, (name, source) in enumerate(zip(config.names, config.sources, strict=True)):
        if (names and name not in names) or isinstance(source.text, token_shards.Tokens):
            continue
        opened = source.text.open(on_bad_record=config.on_bad_record)
        described = settings.dump(source.text, tables=(sources.BY_NAME,))
        job = token_shards.Job(opened, config.tokenizer, described, min(shards, len(opened)))
        begun = time.perf_counter()
        said = token_shards.write(job, Path(out) / name, workers=workers)
        seconds = time.perf_counter() - begun
        setting = json.dumps({"kind": "tokens", "path": str(Path(out) / name)})
        print(
            f"{name}: {said['documents']:,} documents, {said['tokens']:,} tokens in {len(said['shards'])} shards, "
            f"{seconds:.0f} s\n  --config.data.sources.{number}.text='{setting}'"
        )
