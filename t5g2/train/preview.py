"""The data of an experiment as a person reads it."""

import collections
import time
from collections.abc import Mapping

from t5g2.core import logs
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
