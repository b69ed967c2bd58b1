"""The one contract between data, objectives, models and evaluation: Stream, Example, Teaching, Batch, HostBatch.

Conventions, the same everywhere:
  segments  int32, 0 = padding, 1.. = the examples of a packed row; encoder and decoder of one example share a number
  positions int32, from 0 within each example and on each side
  blocks    int32, 0 = none; tokens of one non-zero block of one segment see each other both ways (images, prefixes)

Two examples packed in one row (encoder_length = 8, decoder_length = 6):

    encoder.tokens     [11 12 13  21 22  0  0  0]     decoder.tokens     [ 2 14 15   2 23  0]
    encoder.segments   [ 1  1  1   2  2  0  0  0]     decoder.segments   [ 1  1  1   2  2  0]
    encoder.positions  [ 0  1  2   0  1  0  0  0]     decoder.positions  [ 0  1  2   0  1  0]
                                                      targets            [14 15  1  23  1  0]
                                                      weights            [ 1  1  1   1  1  0]

Decoder inputs are shifted by the objective (BOS first), so nothing is shifted after packing.
NumPy only: data workers import this file, and must start without jax.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = Any  # np.ndarray on the host, jax.Array on devices


class Sequences(NamedTuple):
    """The tokens of one side of a model and where each stands; every array is int32[..., length]."""

    tokens: Array
    segments: Array
    positions: Array
    blocks: Array | None = None


def image_blocks(tokens: np.ndarray, image_token: int) -> np.ndarray:
    """int32[..., T], the block id of each token: runs of image tokens are 1, 2, …, everything else is 0.

    tokens [5 8 8 9 8], image_token = 8: blocks [0 1 1 0 2].
    """
    image = np.asarray(tokens) == image_token
    starts = image & ~np.concatenate([np.zeros_like(image[..., :1]), image[..., :-1]], axis=-1)
    return np.where(image, np.cumsum(starts, axis=-1), 0).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Example:
    """What an objective makes of one chunk of text: unpadded, not packed, already shifted.

    Attributes:
      encoder_tokens: int32[S], empty for a decoder-only objective.
      decoder_tokens: int32[T], the decoder's inputs, BOS first.
      targets: int32[T], targets[t] is predicted from decoder_tokens[: t + 1].
      weights: float32[T], the loss weight of each target (0 = not trained on).
      denoiser: index into the objective's `denoisers`.
      blocks: int32[T] or None: block ids of the decoder's inputs (a bidirectional prefix of a decoder-only model).
      origins: int32[T] or None: where each target stands in the objective's `text` of the chunk, -1 for what is not
        of it: sentinels, EOS. None = the objective does not say, and a teacher cannot be asked.
    """

    encoder_tokens: np.ndarray
    decoder_tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    denoiser: int = 0
    blocks: np.ndarray | None = None
    origins: np.ndarray | None = None


class TeacherInputs(NamedTuple):
    """What it takes to learn the targets of a batch from a teacher. B rows, decoder length T, K entries a token.

    The text [11 12 13 14 15] with [13 14] taken away, and what a decoder-only teacher is given and gives:

        targets        [90 13 14  1]
        origins        [-1  2  3 -1]    13 is predicted at place 2 of the teacher's row
        text.tokens    [ 2 11 12 13 14]

    Attributes:
      origins: int32[B, T], where the teacher's answer about each target stands; -1 = it has none, and the target
        itself is to be learnt (sentinels, EOS). Places of a row of `text`, if there is one.
      text: what a decoder-only teacher reads, BOS and the text of each example but its last token, packed as the
        examples are; None if a teacher reads the rows themselves, or has answered before.
      ids: int32[B, T, K], the tokens that the teacher's answers of before are about; None = it is to be asked.
      log_probs: float16[B, T, K], their log-probabilities.
      tail: float16[B, T], the probability of all other tokens together.
    """

    origins: Array
    text: Sequences | None = None
    ids: Array | None = None
    log_probs: Array | None = None
    tail: Array | None = None


class Batch(NamedTuple):
    """What the step sees. B rows, decoder length T, I images of a row; `encoder` is None for a decoder-only model.

    targets int32[B, T]; weights float32[B, T]; denoisers and sources int32[B, T]: per token, so that losses can be
    split by denoiser and by source (0 where the weight is 0 by padding); images uint8[B, I, H, W, 3], in the order of
    a row's image tokens, zeros past the last, None for a run without; teaching: None for a run without a teacher.
    """

    encoder: Sequences | None
    decoder: Sequences
    targets: Array
    weights: Array
    denoisers: Array
    sources: Array
    images: Array | None = None
    teacher: TeacherInputs | None = None


class HostBatch(NamedTuple):
    """The rows of a batch that this process holds, and what it takes to go on after them.

    Attributes:
      batch: NumPy arrays of the local rows, in the order of the global batch.
      example_ids: int64[b, E], the global ids of the examples packed in each row; -1 = no example.
      streams: int32[b], the virtual stream each row came from.
      positions: int64[b, K], that stream's position after the row: reading goes on here and repeats nothing.
    """

    batch: Batch
    example_ids: np.ndarray
    streams: np.ndarray
    positions: np.ndarray
