"""Rows of several examples: what they consist of, and what is made of those that packer.py has filled.

Two examples in a row of encoder_length = 8, decoder_length = 6 are drawn in core/batch.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from t5g2.core.batch import Batch, Example, HostBatch, Sequences, TeacherInputs
from t5g2.data.config import DataConfig
from t5g2.data.image_tokens import ImageRows

Rows = Mapping[str, np.ndarray]

NO_EXAMPLE = -1
# features whose tokens belong together: the packer says for each token which example of the row it is of, and where
SIDES = ("encoder", "decoder", "text")


@dataclass(frozen=True)
class Feature:
    """Something of which every row has so much, and every example less: [length, *shape] of a row.

    Attributes:
      padding: what stands where no example is.
      beside: the feature that it lies beside: an example has as many of the one as of the other. None = it is counted.
    """

    length: int
    shape: tuple[int, ...] = ()
    dtype: Any = np.int32
    padding: float = 0
    aligned_with: str | None = None


def row_features(config: DataConfig) -> dict[str, Feature]:
    """The features of a run's rows by name; those of an example are the same, each as long as it needs."""
    pad, targets = config.tokenizer.special_tokens.pad, config.decoder_length
    found = {
        "encoder": Feature(config.encoder_length, padding=pad),
        "decoder": Feature(targets, padding=pad),
        "targets": Feature(targets, padding=pad, aligned_with="decoder"),
        "weights": Feature(targets, dtype=np.float32, aligned_with="decoder"),
        # of each example its id and its denoiser
        "ids": Feature(config.examples_per_row, (2,), np.int64, NO_EXAMPLE),
    }
    if config.uses_blocks:
        found["blocks"] = Feature(targets, aligned_with="decoder")
    if config.images is not None:
        # of each image its source, its chunk and its number there: pictures are made of whole rows
        found["images"] = Feature(config.images.per_row, (3,), np.int64, NO_EXAMPLE)
    if config.teacher_features is not None:
        found["origins"] = Feature(targets, padding=-1, aligned_with="decoder")
        if config.teacher_features.carry == "text":
            # every token of a text is read or asked for, so this is never the first to be full
            found["text"] = Feature(config.encoder_length + targets, padding=pad)
        if config.teacher_features.carry == "answers":
            found["answer_ids"] = Feature(targets, (config.teacher_features.per_token,), aligned_with="decoder")
            found["answer_log_probs"] = Feature(
                targets, (config.teacher_features.per_token,), np.float16, aligned_with="decoder"
            )
            found["answer_tail"] = Feature(targets, dtype=np.float16, aligned_with="decoder")
    return found


def example_features(example: Example, example_id: int, denoiser: int) -> dict[str, np.ndarray]:
    """The features that an example has of itself, as the packer takes them; the ids as one more short sequence."""
    return {
        "encoder": example.encoder_tokens,
        "decoder": example.decoder_tokens,
        "targets": example.targets,
        "weights": example.weights,
        "ids": np.array([[example_id, denoiser]], np.int64),
    }


def empty_rows(config: DataConfig, rows: int) -> dict[str, np.ndarray]:
    """Rows without an example: padding alone."""
    out: dict[str, np.ndarray] = {}
    for name, feature in row_features(config).items():
        out[name] = np.full((rows, feature.length, *feature.shape), feature.padding, feature.dtype)
        if name in SIDES:
            out[f"{name}_segment_ids"] = np.zeros((rows, feature.length), np.int32)
            out[f"{name}_positions"] = np.zeros((rows, feature.length), np.int32)
    return out


def empty_batch(config: DataConfig, *, rows: int) -> HostBatch:
    """A batch without an example; tells the shapes of all others."""
    zeros, made = np.zeros((rows, 3), np.int64), empty_rows(config, rows)
    if config.images is not None:
        made["images"] = no_images(config.images, rows)
    return host_batch(made, zeros[:, 0].astype(np.int32), zeros, config)


def no_images(images: ImageRows, rows: int) -> np.ndarray:
    """uint8[rows, I, size, size, 3], zeros."""
    return np.zeros((rows, images.per_row, images.size, images.size, 3), np.uint8)


def host_batch(rows: Rows, streams: np.ndarray, positions: np.ndarray, config: DataConfig) -> HostBatch:
    """Stacked rows as the step and the loop take them."""
    segments = rows["decoder_segment_ids"]
    ids, denoisers = rows["ids"][..., 0], rows["ids"][..., 1]
    here = segments > 0
    example = np.maximum(segments - 1, 0)
    denoiser_of_token = np.where(here, np.take_along_axis(denoisers, example, axis=1), 0)
    source_of_token = np.where(here, np.take_along_axis(ids % len(config.sources), example, axis=1), 0)
    batch = Batch(
        encoder=_sequences(rows, "encoder") if config.encoder_length else None,
        decoder=_sequences(rows, "decoder")._replace(blocks=rows.get("blocks")),
        targets=rows["targets"],
        weights=rows["weights"],
        denoisers=denoiser_of_token.astype(np.int32),
        sources=source_of_token.astype(np.int32),
        images=rows.get("images"),
        teacher=_teacher_inputs(rows),
    )
    return HostBatch(batch, ids, streams, positions)


def _teacher_inputs(rows: Rows) -> TeacherInputs | None:
    if "origins" not in rows:
        return None
    if "text" in rows:
        return TeacherInputs(_origins_in_row(rows), _sequences(rows, "text"))
    return TeacherInputs(rows["origins"], None, *(rows.get(f"answer_{name}") for name in ("ids", "log_probs", "tail")))


def _origins_in_row(rows: Rows) -> np.ndarray:
    """int32[B, T]: origins, which count in an example's text, counted in the row's; -1 stays."""
    segments, text = rows["decoder_segment_ids"], rows["text_segment_ids"]
    examples = 1 + int(max(segments.max(), text.max()))
    flat = np.bincount((np.arange(len(text))[:, None] * examples + text).ravel(), minlength=len(text) * examples)
    counts = flat.reshape(len(text), examples)
    counts[:, 0] = 0  # padding
    starts = np.cumsum(counts, axis=1) - counts
    shifted = rows["origins"] + np.take_along_axis(starts, segments, axis=1)
    return np.where(rows["origins"] < 0, -1, shifted).astype(np.int32)


def _sequences(rows: Rows, side: str) -> Sequences:
    return Sequences(rows[side], rows[f"{side}_segment_ids"], rows[f"{side}_positions"])
