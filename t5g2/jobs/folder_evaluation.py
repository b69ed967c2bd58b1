"""Evaluation of a model folder of any format on tasks of Python files; resumable by task."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from t5g2.api import loading, model_inputs
from t5g2.api.dual_encoder import DualEncoder
from t5g2.api.language_model import LanguageModel
from t5g2.checkpoint import checksum, generation_ids
from t5g2.core import files, logs, settings, tree
from t5g2.core.errors import UserError
from t5g2.core.logs import log
from t5g2.core.terminal import escaped
from t5g2.data.config import DataConfig, Source
from t5g2.data.sources.python_text import PythonText
from t5g2.eval.evaluation import Evaluator
from t5g2.eval.generate_and_compare import GenerateAndCompare
from t5g2.eval.image_tasks import ImageTask
from t5g2.eval.metrics.intervals import Interval
from t5g2.eval.reading import ImagePrompt, Reading
from t5g2.eval.task_interface import EvalContext, Task, TaskResult
from t5g2.eval.tasks import HeldoutLoss
from t5g2.jobs import task_files
from t5g2.jobs.task_settings import describe
from t5g2.objectives import Causal, PrefixLM
from t5g2.report import evaluation_page


@dataclass(frozen=True)
class FolderOptions:
    """Options of an evaluation.

    Attributes:
      rows: rows of a batch.
      seed: seed of everything that is drawn.
      chunk_tokens: tokens of a chunk of text for tasks of held-out loss.
      dtype: dtype of the weights; None = as they are stored.
      cost: also FLOPs and latency of the queries of tasks that generate.
    """

    rows: int = 8
    seed: int = 0
    chunk_tokens: int = 512
    dtype: str | None = None
    cost: bool = False


def evaluate_folder(model: str, tasks: Sequence[str], out: str, options: FolderOptions) -> None:
    """Scores a model on tasks; writes scores.json, predictions.jsonl and index.html, and prints the scores.

    Each task's result is written whole, to OUT/tasks, when the task is finished; a rerun goes on with the next one and
    writes the same files.

    Args:
      model: a model folder, a Hugging Face folder or an official Flax one.
      tasks: as in task_files.load.
      out: the folder to write.

    Raises:
      UserError: a task or the model cannot be read, or does not fit the other; OUT has results of another model or of
        other settings.
    """
    logs.setup()
    chosen = task_files.load(tasks)
    loaded = loading.load(model, dtype=options.dtype)
    _check_kind(loaded, chosen)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder, busy=f"another process writes to {folder}; wait for it, or give another folder"):
        identity: dict[str, Any] = {
            "weights": _weights_digest(loaded),
            "compute": describe(loaded.compute),
            "seed": options.seed,
            "rows": options.rows,
        } | ({"cost": True} if options.cost else {})
        records = {task.name: identity | {"task": describe(task)} for task in chosen}
        finished = {name: _read(folder, name, record) for name, record in records.items()}
        context = None
        for task in chosen:
            if finished[task.name] is not None:
                log.info("task %s is finished already: %s", task.name, _file(folder, task.name))
                continue
            context = context or _context(loaded, chosen, options)
            with logs.TaskProgress(task.name) as progress:
                result = _measure(loaded, task, context, progress)
            finished[task.name] = _plain(records[task.name], result)
            files.write_json(_file(folder, task.name), finished[task.name])
        _write(folder, str(model), identity["weights"], [finished[task.name] for task in chosen])
    _print(finished)


def _measure(
    loaded: LanguageModel | DualEncoder, task: Task, context: EvalContext, progress: logs.TaskProgress
) -> TaskResult:
    has_images = isinstance(task, GenerateAndCompare) and task.images
    if has_images and isinstance(loaded, LanguageModel) and loaded.config.image_stack.images is not None:
        loaded.read_tower()
    evaluator = Evaluator([task], replace(context, advance=progress.advance))
    return evaluator.run(loaded if isinstance(loaded, DualEncoder) else loaded.params)


def _check_kind(loaded: LanguageModel | DualEncoder, tasks: Sequence[Task]) -> None:
    is_dual = isinstance(loaded, DualEncoder)
    for task in tasks:
        if isinstance(task, ImageTask) != is_dual:
            kinds = ("a dual encoder (SigLIP)", "a language model")
            raise UserError(
                f"task {task.name!r} is for {kinds[is_dual]}, and {loaded.folder.path} is {kinds[not is_dual]}; leave "
                f"the task out, or give another model"
            )


def _weights_digest(loaded: LanguageModel | DualEncoder) -> str:
    """Returns 16 hex digits of the weights that are loaded, wherever their folder is and whatever its format."""
    sums = checksum.checksums(tree.named(loaded.params))
    return hashlib.sha256(json.dumps(sorted(sums.items())).encode()).hexdigest()[:16]


def _context(loaded: LanguageModel | DualEncoder, tasks: Sequence[Task], options: FolderOptions) -> EvalContext:
    """Returns the context in which tasks read texts as the model's folder says."""
    tokenizer = loaded.tokenizer
    has_encoder = isinstance(loaded, LanguageModel) and loaded.config.is_encoder_decoder
    # tasks of held-out loss bring their text and objective; other tasks need rows and a tokenizer alone
    losses = [Source(task.text, task.objective, name=task.name) for task in tasks if isinstance(task, HeldoutLoss)]
    sources = tuple(losses) or (Source(PythonText(), PrefixLM() if has_encoder else Causal()),)
    lengths = [source.objective.lengths(options.chunk_tokens) for source in sources]
    data = DataConfig(
        sources,
        tokenizer,
        rows=options.rows,
        encoder_length=max(encoder for encoder, _ in lengths) if has_encoder else 0,
        decoder_length=max(decoder for _, decoder in lengths),
        chunk_tokens=options.chunk_tokens,
        streams=options.rows,
    )
    reading = _reading(loaded) if isinstance(loaded, LanguageModel) else None
    return EvalContext(data, seed=options.seed, compute=loaded.compute, reading=reading, cost=options.cost)


def _reading(model: LanguageModel) -> Reading:
    ids, special_tokens = generation_ids.read(model.folder.path), model.tokenizer.special_tokens
    bos = special_tokens.bos if ids.bos is None else ids.bos
    images = model.config.image_stack.images

    def read_images(text: str, several: Sequence[Any]) -> ImagePrompt:
        assert images is not None
        array, [count] = model_inputs.images([list(several)], 1, images.vision.image_size, model.image_processor)
        return ImagePrompt(model_inputs.prompt(model.tokenizer, text, count, images), np.asarray(array[0]))

    return Reading(
        model.tokenizer,
        bos,
        bos if ids.decoder_start is None else ids.decoder_start,
        encoder_bos=model.encoder_bos,
        stop_ids=model.stop_ids,
        suppressed_ids=model.suppressed_ids,
        read_images=None if images is None else read_images,
    )


def _file(folder: Path, task: str) -> Path:
    return folder / "tasks" / f"{task}.json"


def _read(folder: Path, task: str, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the result of a task that is finished, None if there is none.

    Raises:
      UserError: it is of another model or of other settings; the message names what differs.
    """
    path = _file(folder, task)
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


def _plain(record: Mapping[str, Any], result: TaskResult) -> dict[str, Any]:
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


def _write(folder: Path, model: str, weights: str, results: Sequence[Any]) -> None:
    scores = {name: score for result in results for name, score in result["scores"].items()}
    predictions = [prediction for result in results for prediction in result["predictions"]]
    files.write_json(folder / "scores.json", {"model": model, "weights": weights, "scores": scores})
    files.write_json_lines(folder / "predictions.jsonl", predictions)
    files.write_text(folder / "index.html", evaluation_page.render(model, scores, predictions))


def _print(results: Mapping[str, Any]) -> None:
    scores = {name: score for result in results.values() for name, score in result["scores"].items()}
    for line in evaluation_page.table(scores).lines():
        print(escaped(line))
