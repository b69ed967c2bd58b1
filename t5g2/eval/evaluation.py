"""Tasks run on weights: scores and predictions, and their files."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5g2.core.distributed import is_primary
from t5g2.core.errors import unknown
from t5g2.eval.generation import Model
from t5g2.eval.tasks import EvalContext, Task, TaskResult


class Evaluation:
    """Tasks made ready once, to be run on the weights of any step.

    Raises:
      UserError: a task's text cannot be read, or does not fit the setting.
    """

    def __init__(self, tasks: Sequence[Task], context: EvalContext):
        self._measures = {task.name: task.prepare(context) for task in tasks}

    def run(self, model: Model, names: Iterable[str] | None = None) -> TaskResult:
        """What the tasks found, by default all of them; every process of a run calls this.

        Scores are named `<task>/<what>`, for example heldout/loss and heldout/loss/<denoiser>.

        Raises:
          UserError: there is no task of such a name.
        """
        scores, predictions = {}, []
        for name in self._measures if names is None else names:
            if name not in self._measures:
                raise unknown("evaluation task", name, self._measures)
            outcome = self._measures[name](model)
            scores |= outcome.scores
            predictions += outcome.predictions
        return TaskResult(scores, predictions)


def evaluate(model: Model, tasks: Sequence[Task], context: EvalContext) -> TaskResult:
    """What the tasks find, for weights that are measured once."""
    return Evaluation(tasks, context).run(model)


def write(folder: str | os.PathLike, step: int, result: TaskResult) -> None:
    """Writes scores.json, {"step": …, "heldout/loss": …}, and predictions.jsonl, one JSON object a line."""
    if is_primary():
        _replace(
            Path(folder) / "scores.json", json.dumps({"step": step, **_json_scores(result.scores)}, indent=1) + "\n"
        )
        write_predictions(Path(folder) / "predictions.jsonl", result.predictions)


def write_predictions(path: str | os.PathLike, predictions: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line; the file is whole or not there."""
    if is_primary():
        _replace(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions))


def _json_scores(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Scores as JSON knows them: what is not finite is null."""
    return {name: value if abs(value) < float("inf") else None for name, value in scores.items()}


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
