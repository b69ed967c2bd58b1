"""Leaves whose shape differs between source and target, and what bridges the difference.

V rows of a table, D width, K key/value heads, H head size, P patches.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from t5g2.models.siglip import resample_positions

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapeChange:
    """What makes a leaf of one shape from a leaf of another.

    Attributes:
      allows: (the source leaf's shape, the target leaf's) -> whether it can.
      note: (both shapes) -> what a reader of the account should know.
      make: (the source leaf's array, the target leaf's shape) -> the target leaf's array, of the source's dtype.
    """

    allows: Callable[[Shape, Shape], bool]
    note: Callable[[Shape, Shape], str]
    apply: Callable[[np.ndarray, Shape], np.ndarray]


def repeat_heads(leaf_DKH: np.ndarray, shape: Shape) -> np.ndarray:
    """Each key/value head as often as it takes, the copies side by side: query head n goes on using the same numbers.

    Heads [a b] for 4 heads: [a a b b].
    """
    return np.repeat(leaf_DKH, shape[1] // leaf_DKH.shape[1], axis=1)


def resize_rows(table_VD: np.ndarray, shape: Shape) -> np.ndarray:
    """The first rows; those that a longer table has besides are the mean of all."""
    rows, kept = shape[0], table_VD[: shape[0]]
    if len(kept) == rows:
        return kept
    mean_D = np.mean(table_VD, axis=0, dtype=np.float32).astype(table_VD.dtype)
    return np.concatenate([kept, np.broadcast_to(mean_D, (rows - len(kept), len(mean_D)))])


def resize_positions(positions_PD: np.ndarray, shape: Shape) -> np.ndarray:
    """Position embeddings of a square of patches for one of another size."""
    return resample_positions(positions_PD, math.isqrt(shape[0])).astype(positions_PD.dtype)


def _heads_repeat(old: Shape, new: Shape) -> bool:
    return len(old) == len(new) == 3 and (old[0], old[2]) == (new[0], new[2]) and new[1] % old[1] == 0


def _one_width(old: Shape, new: Shape) -> bool:
    return len(old) == len(new) == 2 and old[1] == new[1]


def _rows_note(old: Shape, new: Shape) -> str:
    return (
        f"the first {new[0]} of {old[0]} rows" if new[0] < old[0] else f"{new[0] - old[0]} rows more, the mean of all"
    )


HEADS = ShapeChange(_heads_repeat, lambda old, new: f"each of {old[1]} heads {new[1] // old[1]} times", repeat_heads)
ROWS = ShapeChange(_one_width, _rows_note, resize_rows)
POSITIONS = ShapeChange(
    _one_width,
    lambda old, new: f"resampled from {math.isqrt(old[0])} x {math.isqrt(old[0])} patches",
    resize_positions,
)


def end_of_image_vector(table_VD: np.ndarray, token: int) -> np.ndarray:
    """The end-of-image vector: its row of the table as the source embeds it, times sqrt(D), so that nothing changes.

    The scale is rounded to the dtype of the weights first, as the embedding does when it computes in that dtype.
    """
    row_D = table_VD[token]
    return row_D * np.asarray(math.sqrt(row_D.shape[0]), row_D.dtype)
