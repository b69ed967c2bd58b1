"""An update that is not finite: which numbers are at fault, and the batch that caused it."""

from functools import partial
from pathlib import Path

import jax
import numpy as np

from t5g2.core import files, tree
from t5g2.core.batch import HostBatch
from t5g2.core.errors import UserError
from t5g2.models import build
from t5g2.models.config import ModelConfig
from t5g2.train.step import Metrics

FOLDER = "nonfinite"


def describe(metrics: Metrics, config: ModelConfig) -> str:
    """Returns the loss and the norms of an update, and the leaves whose gradient or weight is not finite."""
    names = list(tree.named(build.abstract(config)))
    parts = [f"loss {float(metrics.total)}", f"norm of the gradient {float(metrics.gradient_norm)}"]
    parts[1] += _at_fault(names, np.asarray(metrics.finite_gradients))
    parts.append(f"of the updated weights {float(metrics.parameter_norm)}")
    parts[2] += _at_fault(names, np.asarray(metrics.finite_params))
    return ", ".join(parts)


def save_batch(workdir: Path, step: int, batch: HostBatch) -> Path:
    """Writes the batch of an update, nonfinite/<step>.npz, and returns its path; each process writes its own rows.

    The file has the arrays of core.batch.Batch by name ("encoder.tokens", "targets", …) and "example_ids".
    """
    process = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
    path = workdir / FOLDER / f"{step}{process}.npz"
    name = partial(jax.tree_util.keystr, simple=True, separator=".")
    arrays = {name(keys): np.asarray(x) for keys, x in jax.tree.leaves_with_path(batch.batch)}
    # to an open file, because numpy would add .npz to the temporary name
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, example_ids=batch.example_ids, **arrays)  # pyright: ignore[reportArgumentType]
    return path


def error(step: int, metrics: Metrics, config: ModelConfig, batch: str, *, allowed: int) -> UserError:
    """Returns the error that ends a run at an update that is not finite.

    Args:
      batch: where the batch is, as words of the message.
      allowed: train.max_nonfinite_updates.
    """
    count = f"; it is number {int(metrics.skipped)}, and train.max_nonfinite_updates = {allowed}" if allowed else ""
    return UserError(
        f"step {step} is not finite: {describe(metrics, config)}{count}. Its state is not saved; {batch}. Lower the "
        f"learning rate, check data and weights, or leave such updates out: train.max_nonfinite_updates=N. "
        f"--replay=N repeats the steps after checkpoint N"
    )


def _at_fault(names: list[str], finite: np.ndarray) -> str:
    """Returns the names of leaves that are not finite, at most three: " (in mlp.up.0, mlp.up.1 and 5 more)"."""
    leaves = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
    if not leaves:
        return ""
    more = f" and {len(leaves) - 3} more" if len(leaves) > 3 else ""
    return f" (in {', '.join(leaves[:3])}{more})"
