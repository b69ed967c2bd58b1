"""Runs evaluation tasks on a model, and writes scores and predictions."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5g2.core import files
from t5g2.core.distributed import is_primary
from t5g2.core.errors import unknown
from t5g2.core.logs import duration, log
from t5g2.eval.task_interface import EvalContext, Task, TaskResult


class Evaluator:
    """Tasks that are prepared once and run on the weights of any step.

    Raises:
      UserError: a task's text cannot be read, or does not fit the context.
    """

    def __init__(self, tasks: Sequence[Task], context: EvalContext):
        self._measures = {task.name: task.prepare(context) for task in tasks}

    def run(self, model: Any, names: Iterable[str] | None = None) -> TaskResult:
        """Returns the results of the named tasks, by default of all; every process of a run calls this.

        The model is a language module, or for tasks of images and texts a dual encoder (image_tasks.ImageTextEmbedder).

        Scores are named `<task>/<score>`, for example heldout/loss and heldout/loss/<denoiser>.

        Raises:
          EvaluationStopped: the context asks to stop.
          UserError: a name is not that of a task.
        """
        scores, predictions, intervals, signatures = {}, [], {}, {}
        for name in self._measures if names is None else names:
            if name not in self._measures:
                raise unknown("evaluation task", name, self._measures)
            start = time.perf_counter()
            result = self._measures[name](model)
            log.info("task %s took %s", name, duration(time.perf_counter() - start))
            scores |= result.scores
            predictions += result.predictions
            intervals |= result.intervals
            signatures |= result.signatures
        return TaskResult(scores, predictions, intervals, signatures)


def write(folder: str | os.PathLike, step: int, result: TaskResult) -> None:
    """Writes scores.json, {"step": …, "heldout/loss": …}, and predictions.jsonl, one JSON object a line."""
    if is_primary():
        files.write_json(Path(folder) / "scores.json", {"step": step, **_json_scores(result.scores)})
        write_predictions(Path(folder) / "predictions.jsonl", result.predictions)


def write_predictions(path: str | os.PathLike, predictions: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, whole or not at all."""
    if is_primary():
        files.write_json_lines(Path(path), predictions)


def _json_scores(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Returns scores that JSON can hold: values that are not finite become null."""
    return {name: value if abs(value) < float("inf") else None for name, value in scores.items()}
