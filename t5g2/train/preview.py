"""The data of an experiment as a person reads it."""

import collections

from t5g2.core import logs
from t5g2.data.pipeline import Pipeline
from t5g2.data.preview import show_row
from t5g2.train.experiment import Experiment

BATCHES = 8  # what shares and padding are measured on


def show(experiment: Experiment, *, rows: int) -> None:
    """Prints the first rows of the first batch, then shares of sources and denoisers, and padding, of a few batches.

    Raises:
      UserError: the text is missing, empty or malformed.
    """
    logs.setup()
    config = experiment.data
    tokens = collections.Counter()
    with Pipeline(config, seed=experiment.train.seed) as pipeline:
        for number in range(BATCHES):
            batch = pipeline.next()
            if number == 0:
                for row in range(min(rows, config.rows)):
                    print(show_row(batch, row, config), end="\n\n")
            real = batch.batch.decoder.segments > 0
            pairs = zip(batch.batch.sources[real].tolist(), batch.batch.denoisers[real].tolist(), strict=True)
            tokens.update(pairs)
        summary = pipeline.statistics.summary()
    total = sum(tokens.values())
    print("source          denoiser        share of the decoder's tokens")
    for (source, denoiser), count in sorted(tokens.items()):
        print(f"{config.names[source]:15} {config.denoisers[denoiser]:15} {count / total:.1%}")
    print(
        f"padding: {summary['encoder_padding']:.1%} of the encoder's slots, {summary['decoder_padding']:.1%} of the "
        f"decoder's; {summary['examples_per_row']:.1f} examples a row (the first {BATCHES} batches)"
    )
