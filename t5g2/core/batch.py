"""The types that data, objectives, models and evaluation share: Sequences, Example, TeacherInputs, Batch, HostBatch.

Conventions, the same everywhere:
  segments  int32, 0 = padding, 1, 2, … = the examples of a packed row; the same on both sides of an example
  positions int32, from 0 within each example and on each side
  blocks    int32, 0 = none; attention within a block of a segment is bidirectional (images, prefixes)

Two examples packed in one row (encoder_length = 8, decoder_length = 6):

    encoder.tokens     [11 12 13  21 22  0  0  0]     decoder.tokens     [ 2 14 15   2 23  0]
    encoder.segments   [ 1  1  1   2  2  0  0  0]     decoder.segments   [ 1  1  1   2  2  0]
    encoder.positions  [ 0  1  2   0  1  0  0  0]     decoder.positions  [ 0  1  2   0  1  0]
                                                      targets            [14 15  1  23  1  0]
                                                      weights            [ 1  1  1   1  1  0]

The objective shifts decoder inputs (BOS first), so nothing is shifted after packing. NumPy only: data workers import
this file, and must start without jax.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = Any  # np.ndarray on the host, jax.Array on devices


class Sequences(NamedTuple):
    """Tokens of the encoder or the decoder, with segments, positions and blocks; every array is int32[..., length]."""

    tokens: Array
    segments: Array
    positions: Array
    blocks: Array | None = None


def image_blocks(tokens: np.ndarray, image_token: int) -> np.ndarray:
    """Returns int32[..., T], the block id of each token: 1, 2, … for runs of image tokens, 0 for all others.

    tokens [5 8 8 9 8], image_token = 8: blocks [0 1 1 0 2].
    """
    # a run starts where the token before is not an image token; neighbouring images are one block
    image = np.asarray(tokens) == image_token
    starts = image & ~np.concatenate([np.zeros_like(image[..., :1]), image[..., :-1]], axis=-1)
    return np.where(image, np.cumsum(starts, axis=-1), 0).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Example:
    """A training example from one chunk of text: neither padded nor packed, decoder inputs already shifted.

    Attributes:
      encoder_tokens: int32[S], empty for a decoder-only objective.
      decoder_tokens: int32[T], the decoder's inputs, BOS first.
      targets: int32[T], targets[t] is predicted from decoder_tokens[: t + 1].
      weights: float32[T], the loss weight of each target (0 = not trained on).
      denoiser: index into the objective's `denoisers`.
      blocks: int32[T] or None: block ids of the decoder's inputs (a bidirectional prefix of a decoder-only model).
      origins: int32[T] or None: position of each target in the text that `Objective.text` returns for the chunk; -1 =
        not in the text (sentinels, EOS). None = unknown, and distillation is not possible.
      label: the class's number or the number that a probe predicts for the whole text; None = the targets are tokens.
    """

    encoder_tokens: np.ndarray
    decoder_tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    denoiser: int = 0
    blocks: np.ndarray | None = None
    origins: np.ndarray | None = None
    label: float | None = None


class TeacherInputs(NamedTuple):
    """Inputs or cached outputs of a teacher for the targets of a batch.

    B rows, decoder length T, K kept tokens of each distribution.

    The text [11 12 13 14 15] with the noise span [13 14], for a decoder-only teacher:

        targets        [90 13 14  1]
        origins        [-1  2  3 -1]    the teacher predicts 13 at position 2 of its row
        text.tokens    [ 2 11 12 13 14]

    Attributes:
      origins: int32[B, T], the position of the teacher's distribution for each target, in the row of `text` if that is
        set; -1 = the teacher has no distribution (sentinels, EOS), and the target's loss is the cross-entropy.
      text: input of a decoder-only teacher: BOS and each example's text without its last token, packed like the
        examples; None if the teacher reads the student's rows, or its outputs are cached.
      ids: int32[B, T, K], the kept tokens of cached distributions; None = the teacher runs in the step.
      log_probs: float16[B, T, K], their log-probabilities.
      tail: float16[B, T], the probability of all other tokens together.
    """

    origins: Array
    text: Sequences | None = None
    ids: Array | None = None
    log_probs: Array | None = None
    tail: Array | None = None


class Batch(NamedTuple):
    """The input of a training step. B rows, decoder length T, I images per row.

    Attributes:
      encoder: None for a decoder-only model.
      targets: int32[B, T].
      weights: float32[B, T], 0 = no loss.
      denoisers, sources: int32[B, T], number of each target's denoiser and source, to split losses by; 0 at padding.
      images: uint8[B, I, H, W, 3], in the order of a row's image tokens, zeros past the last; None = no images.
      teacher: None without distillation.
      labels: float32[B, T], that of the example of each decoder token, which a probe predicts; 0 at padding. None = the
        targets are tokens.
    """

    encoder: Sequences | None
    decoder: Sequences
    targets: Array
    weights: Array
    denoisers: Array
    sources: Array
    images: Array | None = None
    teacher: TeacherInputs | None = None
    labels: Array | None = None


class HostBatch(NamedTuple):
    """The b rows of a batch that this process holds, and the positions at which reading resumes after them.

    Attributes:
      batch: NumPy arrays of the local rows, in the order of the global batch.
      example_ids: int64[b, E], the global ids of the up to E examples packed in each row; -1 = no example.
      streams: int32[b], the virtual stream of each row.
      positions: int64[b, 3], the position of that stream after the row (data/packing.py: Position).
    """

    batch: Batch
    example_ids: np.ndarray
    streams: np.ndarray
    positions: np.ndarray
