"""Rows that hold several examples: the features of rows, and the conversion of packed rows to batches.

core/batch.py draws two examples in a row of encoder_length = 8, decoder_length = 6.
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
# features for whose tokens the packer adds a segment (the number of the example in the row) and a position in the
# example
SIDES = ("encoder", "decoder", "text")
# features of cached teacher logits, in the order of TeacherInputs
TEACHER_LOGITS = ("teacher_ids", "teacher_log_probs", "teacher_tail")


@dataclass(frozen=True)
class Feature:
    """A feature, an array [length, *shape] of every row; an example's array has the same shape and a length of its own.

    Attributes:
      padding: value of entries without an example.
      aligned_with: another feature, of which every example has as many entries as of this one. Where there is room for
        that one there is room for this one, so the packer checks only that one. None = there is no such feature.
    """

    length: int
    shape: tuple[int, ...] = ()
    dtype: Any = np.int32
    padding: float = 0
    aligned_with: str | None = None


def row_features(config: DataConfig) -> dict[str, Feature]:
    """Returns the features of a run's rows by name; an example has the same ones."""
    pad, length = config.tokenizer.special_tokens.pad, config.decoder_length
    features = {
        "encoder": Feature(config.encoder_length, padding=pad),
        "decoder": Feature(length, padding=pad),
        "targets": Feature(length, padding=pad, aligned_with="decoder"),
        "weights": Feature(length, dtype=np.float32, aligned_with="decoder"),
        # for each example its id and its denoiser
        "ids": Feature(config.examples_per_row, (2,), np.int64, NO_EXAMPLE),
    }
    if config.uses_blocks:
        features["blocks"] = Feature(length, aligned_with="decoder")
    if config.takes_labels:
        features["labels"] = Feature(length, dtype=np.float32, aligned_with="decoder")
    if config.images is not None:
        # for each image its source, its chunk and its number in the chunk; Corpus.with_images replaces these keys
        features["images"] = Feature(config.images.per_row, (3,), np.int64, NO_EXAMPLE)
    teacher = config.teacher_features
    if teacher is not None:
        features["origins"] = Feature(length, padding=-1, aligned_with="decoder")
        if teacher.carry == "text":
            # every token of a text is in the encoder's or the decoder's sequence, so the text always has room
            features["text"] = Feature(config.encoder_length + length, padding=pad)
        if teacher.carry == "cached_logits":
            ids, log_probs, tail = TEACHER_LOGITS
            features[ids] = Feature(length, (teacher.per_token,), aligned_with="decoder")
            features[log_probs] = Feature(length, (teacher.per_token,), np.float16, aligned_with="decoder")
            features[tail] = Feature(length, dtype=np.float16, aligned_with="decoder")
    return features


def example_features(example: Example, example_id: int, denoiser: int) -> dict[str, np.ndarray]:
    """Returns the features that every example has, as the packer takes them; `ids` is a sequence of length 1."""
    return {
        "encoder": example.encoder_tokens,
        "decoder": example.decoder_tokens,
        "targets": example.targets,
        "weights": example.weights,
        "ids": np.array([[example_id, denoiser]], np.int64),
    }


def empty_rows(config: DataConfig, rows: int) -> dict[str, np.ndarray]:
    """Returns rows that hold only padding."""
    out: dict[str, np.ndarray] = {}
    for name, feature in row_features(config).items():
        out[name] = np.full((rows, feature.length, *feature.shape), feature.padding, feature.dtype)
        if name in SIDES:
            out[f"{name}_segment_ids"] = np.zeros((rows, feature.length), np.int32)
            out[f"{name}_positions"] = np.zeros((rows, feature.length), np.int32)
    return out


def empty_batch(config: DataConfig, *, rows: int) -> HostBatch:
    """Returns a batch without examples, in the shapes of a run's batches."""
    zeros, arrays = np.zeros((rows, 3), np.int64), empty_rows(config, rows)
    if config.images is not None:
        arrays["images"] = no_images(config.images, rows)
    return host_batch(arrays, zeros[:, 0].astype(np.int32), zeros, config)


def no_images(images: ImageRows, rows: int) -> np.ndarray:
    """Returns uint8[rows, I, size, size, 3], zeros."""
    return np.zeros((rows, images.per_row, images.size, images.size, 3), np.uint8)


def host_batch(rows: Rows, streams: np.ndarray, positions: np.ndarray, config: DataConfig) -> HostBatch:
    """Returns stacked rows as a HostBatch."""
    segments = rows["decoder_segment_ids"]
    ids, denoisers = rows["ids"][..., 0], rows["ids"][..., 1]
    # sources and denoisers are recorded by example; losses are split by token
    is_token = segments > 0
    example = np.maximum(segments - 1, 0)
    denoiser_of_token = np.where(is_token, np.take_along_axis(denoisers, example, axis=1), 0)
    source_of_token = np.where(is_token, np.take_along_axis(ids % len(config.sources), example, axis=1), 0)
    batch = Batch(
        encoder=_sequences(rows, "encoder") if config.encoder_length else None,
        decoder=_sequences(rows, "decoder")._replace(blocks=rows.get("blocks")),
        targets=rows["targets"],
        weights=rows["weights"],
        denoisers=denoiser_of_token.astype(np.int32),
        sources=source_of_token.astype(np.int32),
        images=rows.get("images"),
        teacher=_teacher_inputs(rows),
        labels=rows.get("labels"),
    )
    return HostBatch(batch, ids, streams, positions)


def _teacher_inputs(rows: Rows) -> TeacherInputs | None:
    if "origins" not in rows:
        return None
    if "text" in rows:
        return TeacherInputs(_origins_in_row(rows), _sequences(rows, "text"))
    return TeacherInputs(rows["origins"], None, *(rows.get(name) for name in TEACHER_LOGITS))


def _origins_in_row(rows: Rows) -> np.ndarray:
    """Returns int32[B, T]: origins, which are positions in an example's text, as positions in the row; -1 stays."""
    segments, text = rows["decoder_segment_ids"], rows["text_segment_ids"]
    examples = 1 + int(max(segments.max(), text.max()))
    # the number of text tokens of each example of each row, by one bincount over (row, example)
    flat = np.bincount((np.arange(len(text))[:, None] * examples + text).ravel(), minlength=len(text) * examples)
    counts = flat.reshape(len(text), examples)
    counts[:, 0] = 0  # padding
    starts = np.cumsum(counts, axis=1) - counts
    shifted = rows["origins"] + np.take_along_axis(starts, segments, axis=1)
    return np.where(rows["origins"] < 0, -1, shifted).astype(np.int32)


def _sequences(rows: Rows, side: str) -> Sequences:
    return Sequences(rows[side], rows[f"{side}_segment_ids"], rows[f"{side}_positions"])
