"""How fast data is made, on one machine: tokens/s of the objectives alone and through the pipeline.

    python bench/data.py

Tokens are those of the text (objectives) or all that are no padding, encoder and decoder (pipeline).
"""

import dataclasses
import time

import numpy as np

from t5g2.data.pipeline import DataConfig, Pipeline, Source
from t5g2.data.sources import PythonText
from t5g2.data.tokenizer import Bytes
from t5g2.objectives import UL2, Causal

SIZES = {256: (128, 16), 2048: (1024, 8)}  # row length: tokens of a piece, rows


def objectives() -> None:
    print(f"{'objective':12}{'piece':>8}{'Mtokens/s':>12}{'us/example':>12}")
    for name, objective in {"causal": Causal(), "ul2": UL2()}.items():
        for length in (128, 512, 4096):
            tokens, specials = np.zeros(length, np.int32), Bytes(sentinels=1000).specials
            count = 2000
            start = time.perf_counter()
            for k in range(count):
                objective(tokens, np.random.default_rng([0, 0, k]), specials=specials)
            secs = time.perf_counter() - start
            print(f"{name:12}{length:8}{count * length / secs / 1e6:12.2f}{secs / count * 1e6:12.1f}")


def pipelines() -> None:
    print(
        f"\n{'rows':>6}{'length':>8}{'workers':>9}{'first s':>9}{'rows/s':>9}{'Mtokens/s':>11}{'padding enc/dec':>18}"
    )
    for length, (piece, rows) in SIZES.items():
        config = DataConfig(
            sources=(Source(PythonText(), UL2()),),
            tokenizer=Bytes(sentinels=200),
            rows=rows,
            encoder_length=length,
            decoder_length=length,
            piece_tokens=piece,
            streams=16,
        )
        for workers in (0, 1, 2):
            show(dataclasses.replace(config, workers=workers))


def show(config: DataConfig, secs: float = 5.0) -> None:
    start = time.perf_counter()
    with Pipeline(config, seed=0) as pipeline:
        pipeline.next()
        first = time.perf_counter() - start
        before = pipeline.statistics.tokens
        start, rows = time.perf_counter(), 0
        while time.perf_counter() - start < secs:
            pipeline.next()
            rows += config.rows
        took, summary = time.perf_counter() - start, pipeline.statistics.summary()
    tokens = pipeline.statistics.tokens - before
    padding = f"{summary['encoder_padding']:.0%} / {summary['decoder_padding']:.0%}"
    print(
        f"{config.rows:6}{config.encoder_length:8}{config.workers:9}{first:9.1f}{rows / took:9.0f}"
        f"{tokens / took / 1e6:11.2f}{padding:>18}"
    )


if __name__ == "__main__":
    objectives()
    pipelines()
