"""Casts of weights that lose no number: what is not finite, or does not fit, is an error with the weight's name."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from t5g2.core.errors import UserError

# share of a weight's numbers that a cast may make zero: few are that near to zero, unless the weight as a whole is
MOST_UNDERFLOW = 0.5
# dtypes of weights with more range than float16
WIDE_DTYPES = ("float32", "bfloat16")


def cast_weights(array: Any, dtype: Any, *, name: str) -> np.ndarray:
    """Returns a weight on the host in another dtype; dtype None = its own. Rounding, and few zeros more, are allowed.

    Args:
      name: the weight, and where it comes from, for messages.

    Raises:
      UserError: a number is NaN or infinite, or becomes infinite in `dtype`; more than MOST_UNDERFLOW of the numbers
        become zero; or they are no floating-point numbers.
    """
    array = np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(
            f"{name} holds {array.dtype}, not floating-point numbers; it may be quantised: give the weights as "
            f"float32, bfloat16 or float16"
        )
    not_finite = array.size - int(np.count_nonzero(np.isfinite(array)))
    if not_finite:
        raise UserError(
            f"{name} has {not_finite:,} of {array.size:,} numbers that are NaN or infinite; the file is damaged, or "
            f"the training that wrote it diverged: take other weights"
        )
    if dtype is None or array.dtype == jnp.dtype(dtype):
        return array
    cast = _cast(array, dtype)
    if not np.isfinite(cast).all():
        raise UserError(
            f"{name} has numbers up to {float(np.abs(array).max()):.6g}, and the largest of {jnp.dtype(dtype).name} is "
            f"{float(jnp.finfo(dtype).max):.6g}; {_fitting(array)}"
        )
    lost = _lost(array, cast)
    if lost > MOST_UNDERFLOW * np.count_nonzero(array):
        raise UserError(
            f"{name} has {lost:,} of {np.count_nonzero(array):,} numbers that become zero, because the smallest of "
            f"{jnp.dtype(dtype).name} is {float(jnp.finfo(dtype).smallest_subnormal):.2g}; {_fitting(array)}"
        )
    return cast


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore"):
        return array.astype(jnp.dtype(dtype))


def _lost(array: np.ndarray, cast: np.ndarray) -> int:
    """Returns how many numbers become zero."""
    return int(np.count_nonzero(array)) - int(np.count_nonzero(cast))


def _fitting(array: np.ndarray) -> str:
    """Returns advice: the dtypes of weights that an array fits into."""
    casts = {name: _cast(array, name) for name in WIDE_DTYPES}
    most = MOST_UNDERFLOW * np.count_nonzero(array)
    fitting = [name for name, cast in casts.items() if np.isfinite(cast).all() and _lost(array, cast) <= most]
    if fitting:
        return f"take {' or '.join(fitting)}"
    return "no dtype of weights holds them, so scale these weights, or take others"
