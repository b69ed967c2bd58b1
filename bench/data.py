"""Speed of making batches, fullness of their rows, and their cost for a training step.

    python bench/data.py                                # all tables
    python bench/data.py speed documents padding step   # or some

Text: what ships with Python, tokenised ahead (`t5g2 tokenize`), 1 byte = 1 token, T5Gemma 2's UL2. A chunk is half as
long as the encoder's part of a row, and the decoder's part 1.19 times that, as examples of full chunks are. Tokens are
those that are no padding, encoder and decoder. How fast objectives are alone is what bench/objectives.py measures.

speed    Goal: 1 million tokens a second, 2 to aim at. By the clock (median of rounds), and per second of processor
         time of the training process, which is what batches take away from it.
documents  Goal: at most 2 times slower, however long the documents are. 12 MB of text as 6,000 documents, as 100 and as
         one, in turn; tokens a second over those of 6,000 documents.
padding  Goal: at most 20%, 10% to aim at. Slots are weighted with the FLOPs of a token on their side (forward, no
         attention), of T5Gemma 2 4B-4B; on the 270M one, whose head weighs most, in the last column.
step     Goal: a step with real data takes at most 1.05 times one with a batch that is always the same. Both in turn, in
         blocks of steps; the median over the blocks of their ratio.

Measured on 2 CPU cores; the steps while these had 5 to 9 processes to run:

    million tokens/s, workers 0, 1, 2     512 + 608: 1.75 1.92 2.05    2048 + 2432: 6.36 7.23 7.51
                                          4096 + 4864: 10.74 10.35 12.18
    documents, 6,000, 100 and 1           cache_tokens: 1.00 1.08 1.06        t5g2 tokenize: 1.00 1.15 1.07
    padding by FLOPs, 4B-4B               none    first_fit, 8 and 32 rows    best_fit, 8 and 32 rows
        512 + 608                         37.3%   19.1%  17.8%                16.9%  11.5%
        2048 + 2432                       38.8%   19.1%  17.1%                16.4%  12.4%
        4096 + 4864                       40.0%   19.3%  16.2%                17.7%  12.9%
    on 270M-270M's weights 0.5 to 0.9 points more; first_fit, 8 rows, 4096 + 4864: 20.1%
    a step, workers 0, 1, 2               1.013  1.016  0.938
"""

import contextlib
import dataclasses
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from t5g2.data.config import DataConfig, Source
from t5g2.data.pipeline import Pipeline
from t5g2.data.shards import token_shards
from t5g2.data.sources.python_text import PythonText
from t5g2.data.sources.text_files import Jsonl
from t5g2.data.sources.text_source import TextSource
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.objectives import UL2
from t5g2.train import config_file, restore, workdir

TOKENIZER = Bytes(sentinels=300)
LENGTHS = {512: 608, 2048: 2432, 4096: 4864}  # encoder's and decoder's part of a row
ROUNDS, ROUND_SECS = 5, 1.0
PADDING_TOKENS = 2_000_000
DOCUMENTS, DOCUMENT_BYTES = (6000, 100, 1), 12_000_000
BLOCKS, BLOCK_STEPS = 15, 16
# its steps take about 0.2 s on 2 CPU cores
STEP_CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.py"


def config(tokens: TextSource, encoder: int, **changes: Any) -> DataConfig:
    fields: dict[str, Any] = {"rows": 16, "streams": 16, "encoder_length": encoder, "decoder_length": LENGTHS[encoder]}
    fields |= {"chunk_tokens": encoder // 2, "tokenizer": TOKENIZER, "packing": "best_fit"}
    return DataConfig((Source(tokens, UL2()),), **(fields | changes))


def speed(tokens: token_shards.Tokens) -> None:
    print(
        "\n| rows | workers | million tokens/s | per CPU second of the trainer | us an example |\n|---|---|---|---|---|"
    )
    for encoder, decoder in LENGTHS.items():
        for workers in (0, 1, 2):
            with Pipeline(config(tokens, encoder, workers=workers), seed=0) as pipeline:
                for _ in range(10):  # the first sets of every stream
                    pipeline.next()
                rates = [rate(pipeline) for _ in range(ROUNDS)]
            wall, cpu, example = (statistics.median(column) for column in zip(*rates, strict=True))
            print(
                f"| {encoder} + {decoder} | {workers} | {wall / 1e6:.2f} | {cpu / 1e6:.2f} | {1e6 * example:.0f} |",
                flush=True,
            )


def rate(pipeline: Pipeline) -> tuple[float, float, float]:
    """Tokens per second and per second of this process's processor time, seconds per example, over one round."""
    tokens, examples = pipeline.statistics.tokens, pipeline.statistics.examples
    start, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < ROUND_SECS:
        pipeline.next()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    tokens, examples = pipeline.statistics.tokens - tokens, pipeline.statistics.examples - examples
    return tokens / wall, tokens / cpu, wall / examples


def padding(tokens: token_shards.Tokens) -> None:
    from t5g2.models import sizes
    from t5g2.report.data_preview import flops_per_token

    weights = [flops_per_token(sizes.size(f"t5gemma2:{name}")) for name in ("4b-4b", "270m-270m")]
    print(
        "\n| rows | packing | rows at a time | encoder | decoder | FLOPs, 4B-4B | FLOPs, 270M-270M |\n"
        + "|---" * 7
        + "|"
    )
    for encoder in LENGTHS:
        ways = [("none", 1)] + [(rule, rows) for rows in (8, 32) for rule in ("first_fit", "best_fit")]
        for rule, rows in ways:
            made = config(tokens, encoder, packing=rule, packing_rows=rows)
            if rule == "none":  # as short as the longest example lets it be
                longest, asked = made.sources[0].objective.lengths(made.chunk_tokens)
                made = dataclasses.replace(made, encoder_length=longest, decoder_length=asked)
            with Pipeline(made, seed=0) as pipeline:
                while pipeline.statistics.tokens < PADDING_TOKENS or pipeline.statistics.batches % rows:
                    pipeline.next()
                seen = pipeline.statistics
            by_flops = [f"{seen.padding(encoder_flops=e, decoder_flops=d):.1%}" for e, d in weights]
            summary = seen.summary()
            sides = [f"{summary[f'{side}_padding']:.1%}" for side in ("encoder", "decoder")]
            print(
                "| "
                + " | ".join([f"{made.encoder_length} + {made.decoder_length}", rule, str(rows), *sides, *by_flops])
                + " |",
                flush=True,
            )


def step(tokens: token_shards.Tokens) -> None:
    import jax

    from t5g2.core import sharding

    source = {"text": {"kind": "tokens", "path": tokens.path}, "objective": {"kind": "ul2"}, "name": "python"}
    overrides = [("data.sources", json.dumps([source])), ("data.tokenizer", '{"kind": "bytes", "sentinels": 300}')]
    overrides += [(f"model.{side}.vocab_size", "576") for side in ("encoder", "decoder")]
    print("\n| workers | a step, ms | with real data / with one batch |\n|---|---|---|")
    for workers in (0, 1, 2):
        made = config_file.load(f"{STEP_CONFIG}:scratch", [*overrides, ("data.workers", str(workers))])
        mesh = sharding.make(made.mesh)
        with jax.set_mesh(mesh):
            seconds, ratio = steps(made, mesh)
        print(f"| {workers} | {1e3 * seconds:.0f} | {ratio:.3f} |", flush=True)


def steps(made: Any, mesh: Any) -> tuple[float, float]:
    """Seconds of a step with one batch; how many times that a step with real data takes."""
    import jax

    from t5g2.core import sharding
    from t5g2.data.pipeline import to_global
    from t5g2.train import plan as plans

    plan = plans.make(made, mesh)
    with tempfile.TemporaryDirectory() as folder, Pipeline(plan.data, seed=0) as pipeline:
        state = restore.restore(Path(folder), plan, workdir.open_checkpoints(Path(folder), made)).state
        update, ratios, seconds = plan.compile(), [], []

        def batch() -> Any:
            return to_global(pipeline.next().batch, sharding.batch_sharding(mesh), rows=made.data.rows)

        constant = batch()
        for _ in range(BLOCKS):
            took = {}
            for real in (False, True):
                begun, metrics = time.perf_counter(), None
                for _ in range(BLOCK_STEPS):
                    state, metrics = update(state, batch() if real else constant, None)
                jax.block_until_ready(metrics)
                took[real] = time.perf_counter() - begun
            ratios.append(took[True] / took[False])
            seconds.append(took[False] / BLOCK_STEPS)
    return statistics.median(seconds), statistics.median(ratios)


def documents(tokens: token_shards.Tokens) -> None:
    del tokens  # the same text in other documents
    opened = PythonText().open()
    text = "".join(opened[i] for i in range(len(opened))).encode().decode("ascii", "ignore")
    text = (text * (1 + DOCUMENT_BYTES // len(text)))[:DOCUMENT_BYTES]
    print("\n| documents | cache_tokens | t5g2 tokenize |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        os.environ["T5G2_CACHE"] = f"{folder}/cache"
        pipelines = {}
        for count in DOCUMENTS:
            path, size = Path(folder) / f"{count}.jsonl", DOCUMENT_BYTES // count
            lines = (json.dumps({"text": text[i * size : (i + 1) * size]}) for i in range(count))
            path.write_text("".join(f"{line}\n" for line in lines))
            job = token_shards.Job(Jsonl(str(path)).open(), TOKENIZER, {}, min(count, 4))
            token_shards.write(job, f"{folder}/{count}")
            ready, cached = (token_shards.Tokens(f"{folder}/{count}"), Jsonl(str(path)))
            for way, source in (("cached", cached), ("ready", ready)):
                made = config(source, 512, cache_tokens=way == "cached")
                pipelines[count, way] = stack.enter_context(Pipeline(made, seed=0))
        for pipeline in pipelines.values():
            for _ in range(10):
                pipeline.next()
        rounds = [{key: rate(pipeline)[1] for key, pipeline in pipelines.items()} for _ in range(ROUNDS)]
        for count in DOCUMENTS:
            shares = [
                statistics.median(rates[count, way] / rates[DOCUMENTS[0], way] for rates in rounds)
                for way in ("cached", "ready")
            ]
            print(f"| {count:,} | {shares[0]:.2f} | {shares[1]:.2f} |", flush=True)


PARTS = {"speed": speed, "documents": documents, "padding": padding, "step": step}


def main():
    logging.getLogger("t5g2").setLevel(logging.WARNING)
    asked = sys.argv[1:] or list(PARTS)
    with tempfile.TemporaryDirectory() as folder:
        opened = PythonText().open()
        said = token_shards.write(token_shards.Job(opened, TOKENIZER, {"kind": "python"}, 4), folder)
        print(f"{said['documents']} documents, {said['tokens']:,} tokens")
        for part in asked:
            PARTS[part](token_shards.Tokens(folder))


if __name__ == "__main__":
    main()
