"""Results of the tasks of an evaluation: a file for each that is finished, and the files made of all of them."""

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5g2.core import files, settings, tree
from t5g2.core.distributed import any_process, is_primary, on_primary
from t5g2.core.errors import UserError
from t5g2.core.logs import log
from t5g2.core.terminal import escaped
from t5g2.eval.metrics.intervals import Interval
from t5g2.eval.task_interface import TaskResult
from t5g2.report import evaluation_page


def complete_folder(
    folder: Path,
    records: Mapping[str, Mapping[str, Any]],
    prepare: Callable[[str], Callable[[], TaskResult]],
    *,
    model: str,
    weights: str,
) -> None:
    """Runs the tasks that are not finished; writes the files of the folder, and prints the scores.

    Of several processes all call this, and the first alone reads, writes and prints.

    Args:
      folder: the folder, made if it does not exist.
      records: the settings that each result is of, by the name of the task.
      prepare: returns the function that runs the task of a name; asked for all tasks that are not finished, before the
        first of them is run, so that what is wrong with the last is known at once.
      model, weights: what was evaluated, for people and as a digest.

    Raises:
      UserError: the folder has results of another model or of other settings; another process writes to it.
    """
    with contextlib.ExitStack() as stack:

        def read() -> dict[str, dict[str, Any]]:
            folder.mkdir(parents=True, exist_ok=True)
            busy = f"another process writes to {folder}; wait for it, or give another folder"
            stack.enter_context(files.locked(folder, busy=busy))
            results = {name: _finished(folder, name, record) for name, record in records.items()}
            return {name: result for name, result in results.items() if result is not None}

        finished = on_primary(read) or {}
        done = dict(zip(records, any_process([name in finished for name in records]), strict=True))
        measures = {name: prepare(name) for name in records if not done[name]}
        for name, record in records.items():
            if done[name]:
                log.info("task %s is finished already: %s", name, result_file(folder, name))
                continue
            finished[name] = _as_json(record, measures[name]())
            if is_primary():
                files.write_json(result_file(folder, name), finished[name])
        if not is_primary():
            return
        in_order = {name: finished[name] for name in records}
        _write_summary(folder, model, weights, list(in_order.values()))
    _print(in_order)


def result_file(folder: Path, task: str) -> Path:
    """Returns the file of a task's result."""
    return folder / "tasks" / f"{task}.json"


def _finished(folder: Path, task: str, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the result of a task that is finished, None if there is none.

    Raises:
      UserError: it is of another model or of other settings; the message names what differs.
    """
    path = result_file(folder, task)
    if not path.exists():
        return None
    result = files.read_json_object(path, fix="remove it, and the task is run again")
    # through JSON, so that both are what a file can hold
    difference = tree.difference(_flat(result.get("settings")), _flat(json.loads(json.dumps(record))))
    if difference:
        raise UserError(
            f"{path} is of another model or of other settings (- there, + now):\n{difference}\ngive another --out, or "
            f"remove the file to run the task again"
        )
    return result


def _flat(record: Any) -> dict[str, Any]:
    return {name: repr(value) for name, value in settings.flatten(record).items()}


def _as_json(record: Mapping[str, Any], result: TaskResult) -> dict[str, Any]:
    """Returns the result of a task as JSON holds it, with the settings that it is of."""
    scores = {
        name: _score(value, result.intervals.get(name), result.signatures.get(name))
        for name, value in result.scores.items()
    }
    return {"settings": record, "scores": scores, "predictions": json.loads(_json(result.predictions))}


def _score(value: float, interval: Interval | None, signature: str | None) -> dict[str, Any]:
    score: dict[str, Any] = {"value": _finite(value)}
    if interval is not None:
        score |= {"examples": interval.examples, "interval": [_finite(interval.low), _finite(interval.high)]}
    return score | ({"signature": signature} if signature else {})


def _finite(value: float) -> float | None:
    """Returns a number that JSON can hold: None if it is not finite."""
    return value if math.isfinite(value) else None


def _json(predictions: Any) -> str:
    """Returns predictions as JSON; numbers that are not finite become null, and other values their text."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return _finite(value) if isinstance(value, float) else value

    return json.dumps(finite(predictions), default=str)


def _write_summary(folder: Path, model: str, weights: str, results: Sequence[Any]) -> None:
    scores = {name: score for result in results for name, score in result["scores"].items()}
    predictions = [prediction for result in results for prediction in result["predictions"]]
    files.write_json(folder / "scores.json", {"model": model, "weights": weights, "scores": scores})
    files.write_json_lines(folder / "predictions.jsonl", predictions)
    files.write_text(folder / "index.html", evaluation_page.render(model, scores, predictions))


def _print(results: Mapping[str, Any]) -> None:
    scores = {name: score for result in results.values() for name, score in result["scores"].items()}
    for line in evaluation_page.table(scores).lines():
        print(escaped(line))
