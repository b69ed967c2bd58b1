"""Position embeddings of image towers: learned for one square of patches, resampled for another."""

import math

import numpy as np
from jaxtyping import Float

from t5g2.core.errors import UserError


def resample_positions(positions_PD: Float[np.ndarray, "P D"], side: int) -> Float[np.ndarray, "Q D"]:
    """Returns float32[side * side, D]: position embeddings of a square of patches, resampled to another size.

    Bicubic with a = -0.75, no antialiasing, edges repeated: transformers' interpolate_pos_encoding, that is
    torch.nn.functional.interpolate with mode "bicubic" and align_corners=False. From 896 pixels to 448: side = 32.

    Raises:
      UserError: the embeddings are not those of a square of patches, or side is below 1.
    """
    positions_PD = np.asarray(positions_PD, np.float32)
    old = math.isqrt(len(positions_PD))
    if old**2 != len(positions_PD) or old < 1 or positions_PD.ndim != 2 or side < 1:
        raise UserError(
            f"position embeddings {list(positions_PD.shape)} for {side} x {side} patches: they must be those of a "
            f"square of patches, [side * side, D], and the new side at least 1"
        )
    if old == side:
        return positions_PD
    # separable: the same weights along both axes
    weights_QP = _bicubic_weights(old, side)
    grid = positions_PD.reshape(old, old, -1)
    return np.einsum("ap,bq,pqd->abd", weights_QP, weights_QP, grid, optimize=True).reshape(side**2, -1)


def _bicubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Returns the weights of old positions for each new one (Keys 1981, a = -0.75 as in torch and OpenCV)."""
    a = -0.75
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5
    weights = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        position = np.floor(centre) + offset
        x = np.abs(centre - position)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        # clipped positions repeat the edge; add.at, because several may be clipped to one entry
        np.add.at(weights, (np.arange(new), np.clip(position, 0, old - 1).astype(int)), np.where(x <= 1, near, far))
    return weights.astype(np.float32)
