"""Small texts, a mixture of two of them, and the batches that follow from it."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from t5g2.core.batch import HostBatch
from t5g2.data.config import DataConfig, Source
from t5g2.data.pipeline import Pipeline
from t5g2.data.sources.text_files import TextFiles
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.objectives import UL2, Causal, PrefixLM, PrefixLMDecoder

SPECIALS = Bytes().special_tokens


def write_texts(folder: Path, name: str, documents: int, *, seed: int = 0) -> TextFiles:
    """`documents` files of 20 to 200 characters; their source."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(f"{name} {seed}")
    for i in range(documents):
        text = "".join(draw.choices("abcdefgh \n", k=draw.randint(20, 200)))
        (folder / f"{name}{i:03}.txt").write_text(text)
    return TextFiles(f"{folder}/{name}*.txt")


def mixed(folder: Path, *, rows: int, streams: int, **changes) -> DataConfig:
    """Two sources, 3:1, UL2 and a uniform prefix language model, packed into rows of 96 and 96 tokens."""
    sources = (
        Source(write_texts(folder, "many", 23), UL2(), weight=3, name="many"),
        Source(write_texts(folder, "few", 5), PrefixLM("uniform"), name="few"),
    )
    fields = {"tokenizer": Bytes(), "encoder_length": 96, "decoder_length": 96, "chunk_tokens": 40, "packing_rows": 3}
    return DataConfig(**{"sources": sources, "rows": rows, "streams": streams} | fields | changes)


def decoder_only(folder: Path, *, rows: int, streams: int, **changes) -> DataConfig:
    """The same two sources for a decoder-only model: prefixes that see both ways, and text from left to right."""
    sources = (
        Source(write_texts(folder, "many", 23), PrefixLMDecoder("uniform"), weight=3, name="many"),
        Source(write_texts(folder, "few", 5), Causal(), name="few"),
    )
    return mixed(folder, rows=rows, streams=streams, **{"sources": sources, "encoder_length": 0} | changes)


def batches(
    config: DataConfig,
    *,
    count: int,
    rows: Sequence[int] | None = None,
    positions: Mapping | None = None,
    seed: int = 0,
) -> tuple[list[HostBatch], dict[int, tuple[int, ...]]]:
    """The next batches, and the positions after them."""
    with Pipeline(config, seed=seed, rows=rows, positions=positions) as pipeline:
        return [pipeline.next() for _ in range(count)], pipeline.positions


def arrays(batch) -> list[np.ndarray]:
    """Every array of a HostBatch, in a fixed order."""
    if isinstance(batch, tuple):
        return [array for part in batch for array in arrays(part)]
    return [] if batch is None else [batch]


def assert_same(left: Sequence[HostBatch], right: Sequence[HostBatch]) -> None:
    """The same batches, bit for bit."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for x, y in zip(arrays(a), arrays(b), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def joined(hosts: Sequence[Sequence[HostBatch]]) -> list[HostBatch]:
    """The global batches of several hosts' parts."""
    return [_concatenated(parts) for parts in zip(*hosts, strict=True)]


def _concatenated(parts):
    if isinstance(parts[0], tuple):
        return type(parts[0])(*(_concatenated(p) for p in zip(*parts, strict=True)))
    return None if parts[0] is None else np.concatenate(parts)


def write_files(folder, **texts):
    """Writes files of these contents; __ in a name stands for a dot."""
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_bytes(text if isinstance(text, bytes) else text.encode())
