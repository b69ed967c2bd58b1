"""Rows of several examples: what the packer is told, and what is made of its rows.

The packer (grain's first fit) fills `packing_rows` rows at a time and puts an example into the first row that has room
for it on both sides. Two examples in a row of encoder_length = 8, decoder_length = 6 are drawn in core/batch.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from t5g2.core.batch import Batch, Example, HostBatch, Stream
from t5g2.data.config import DataConfig

Rows = Mapping[str, np.ndarray]

NO_EXAMPLE = -1


def features(example: Example, example_id: int, denoiser: int, *, blocks: bool = False) -> dict[str, np.ndarray]:
    """An example as the packer takes it: arrays by name, the ids as one more short sequence; with blocks if the run's
    rows have them.
    """
    none = np.zeros(len(example.targets), np.int32)
    more = {"blocks": none if example.blocks is None else example.blocks} if blocks else {}
    return {
        "encoder": example.encoder_tokens,
        "decoder": example.decoder_tokens,
        "targets": example.targets,
        "weights": example.weights,
        "ids": np.array([[example_id, denoiser]], np.int64),
        **more,
    }


def packed(examples: Any, config: DataConfig, *, seed: int) -> Any:
    """A grain.IterDataset of rows, of one of `features`; one example a row if the config says so."""
    import grain

    several = config.packing == "first_fit"
    blocks = ["blocks"] if config.uses_blocks else []
    return grain.experimental.FirstFitPackIterDataset(
        examples,
        length_struct={
            "encoder": config.encoder_length,
            "decoder": config.decoder_length,
            "targets": config.decoder_length,
            "weights": config.decoder_length,
            "ids": config.examples_per_row,
            **dict.fromkeys(blocks, config.decoder_length),
        },
        padding_struct={
            "encoder": config.tokenizer.specials.pad,
            "decoder": config.tokenizer.specials.pad,
            "targets": config.tokenizer.specials.pad,
            "weights": 0.0,
            "ids": NO_EXAMPLE,
            **dict.fromkeys(blocks, 0),
        },
        # these are laid out like the decoder's tokens, and the ids one an example
        meta_features=("targets", "weights", "ids", *blocks),
        num_packing_bins=config.packing_rows if several else 1,
        max_sequences_per_bin=config.examples_per_row,
        shuffle_bins=several,
        seed=seed,
    )


def empty_rows(config: DataConfig, rows: int) -> dict[str, np.ndarray]:
    """Rows without an example: padding alone."""
    pad = config.tokenizer.specials.pad
    out: dict[str, np.ndarray] = {}
    for side, length in (("encoder", config.encoder_length), ("decoder", config.decoder_length)):
        out[side] = np.full((rows, length), pad, np.int32)
        out[f"{side}_segment_ids"] = np.zeros((rows, length), np.int32)
        out[f"{side}_positions"] = np.zeros((rows, length), np.int32)
    out["targets"] = np.full((rows, config.decoder_length), pad, np.int32)
    out["weights"] = np.zeros((rows, config.decoder_length), np.float32)
    out["ids"] = np.full((rows, config.examples_per_row, 2), NO_EXAMPLE, np.int64)
    if config.uses_blocks:
        out["blocks"] = np.zeros((rows, config.decoder_length), np.int32)
    return out


def host_batch(rows: Rows, streams: np.ndarray, positions: np.ndarray, config: DataConfig) -> HostBatch:
    """Stacked rows as the step and the loop take them."""
    segments = rows["decoder_segment_ids"]
    ids, denoisers = rows["ids"][..., 0], rows["ids"][..., 1]
    here = segments > 0
    example = np.maximum(segments - 1, 0)
    denoiser_of_token = np.where(here, np.take_along_axis(denoisers, example, axis=1), 0)
    source_of_token = np.where(here, np.take_along_axis(ids % len(config.sources), example, axis=1), 0)
    batch = Batch(
        encoder=_stream(rows, "encoder") if config.encoder_length else None,
        decoder=_stream(rows, "decoder")._replace(blocks=rows.get("blocks")),
        targets=rows["targets"],
        weights=rows["weights"],
        denoisers=denoiser_of_token.astype(np.int32),
        sources=source_of_token.astype(np.int32),
    )
    return HostBatch(batch, ids, streams, positions)


def _stream(rows: Rows, side: str) -> Stream:
    return Stream(rows[side], rows[f"{side}_segment_ids"], rows[f"{side}_positions"])
