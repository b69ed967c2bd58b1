"""Evaluation of a model folder on tasks of lm-evaluation-harness (EleutherAI; extra `harness`).

lm_eval has no plug-in for models of other packages, so its own command line, with all of its flags, is

    python -m t5g2.jobs.harness_evaluation --model t5g2 --model_args path=DIR --tasks …

where the model `t5g2` is registered; otherwise it is `python -m lm_eval`.
"""

import contextlib
import difflib
import multiprocessing
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from t5g2.api import loading
from t5g2.api.language_model import LanguageModel
from t5g2.checkpoint import source_folder
from t5g2.core import logs
from t5g2.core.errors import UserError
from t5g2.core.optional import require
from t5g2.core.seeds import derive_seed
from t5g2.core.terminal import escaped
from t5g2.eval.harness import HarnessModel, HarnessOptions
from t5g2.eval.metrics.intervals import RESAMPLES, Interval
from t5g2.eval.sampling import Sampler
from t5g2.eval.task_interface import TaskResult
from t5g2.jobs import task_results
from t5g2.jobs.folder_evaluation import mesh_for, reading_of, weights_digest
from t5g2.jobs.task_settings import describe

_registry: Any = require("lm_eval.api.registry", "harness")

# seeds of lm_eval's own command line, so that shots and orders are those of other models' scores
PYTHON_SEED, NUMPY_SEED = 0, 1234


@dataclass(frozen=True)
class TaskFolder:
    """Tasks of the harness.

    Attributes:
      names: names of tasks, groups and tags, with * and ? as in file names.
      include_path: folder of YAML files that are tasks too; "" = none.
    """

    names: tuple[str, ...]
    include_path: str = ""

    def manager(self) -> Any:
        """Returns the harness's manager of tasks.

        Raises:
          UserError: there is no such folder, or no task in it.
        """
        if self.include_path and not any(Path(self.include_path).glob("**/*.yaml")):
            exists = "has no task file (*.yaml)" if Path(self.include_path).is_dir() else "is not a folder"
            raise UserError(f"--include_path={self.include_path} {exists}; give the folder of your harness tasks")
        manager_class = require("lm_eval.tasks", "harness").TaskManager
        if self.include_path:
            manager = manager_class(include_path=self.include_path, include_defaults=False)
            # to read the harness's own 14,000 takes a quarter of a minute; a group may have some of them
            if all(set(manager.match_tasks([name]) or [name]) <= set(manager.all_subtasks) for name in self.names):
                return manager
        return manager_class(include_path=self.include_path or None)

    def chosen(self, manager: Any) -> list[str]:
        """Returns the names that are meant, each once.

        Raises:
          UserError: there is no task of a name (nearest name).
        """
        chosen: dict[str, None] = {}
        for name in self.names:
            matches = manager.match_tasks([name])
            if not matches:
                close = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
                raise UserError(
                    f"unknown harness task {name!r}; {hint}`python -m lm_eval ls tasks` lists the "
                    f"{len(manager.all_tasks):,} that come with it, and --include_path adds those of a folder"
                )
            chosen |= dict.fromkeys(matches)
        return list(chosen)


def evaluate_on_harness(
    model: str,
    tasks: TaskFolder,
    out: str,
    options: HarnessOptions,
    *,
    dtype: str | None = None,
    mesh: str | None = None,
) -> None:
    """Scores a model folder on tasks of the harness; writes the files of `t5g2 evaluate --tasks`, prints the scores.

    Each name's result is written whole, to OUT/tasks, when it is finished; a rerun goes on with the next one.

    Args:
      mesh: devices of weights and rows, as sharding.shape_of reads them; None = one device.

    Raises:
      UserError: a task is not there, cannot be loaded, has images, or runs the code that a model writes; the model
        cannot be read or is no language model; OUT has results of another model or of other settings.
    """
    logs.setup()
    manager = tasks.manager()
    loaded_tasks = {name: _tasks(manager, name) for name in tasks.chosen(manager)}
    loaded = _load(model, dtype, mesh_for(mesh, options.rows))
    harness_model = HarnessModel(loaded.params, reading_of(loaded), _with_defaults_of(loaded, options))
    weights, version = weights_digest(loaded), _version()
    identity = {
        "weights": weights,
        "compute": describe(loaded.compute),
        "seed": options.seed,
        "rows": options.rows,
        "lm_eval": version,
    }

    def prepare(name: str) -> Callable[[], TaskResult]:
        return partial(measure, name)

    def measure(name: str) -> TaskResult:
        # its standard errors are of several kinds, and some it computes in a process for each core
        with loaded.on_devices():
            results = require("lm_eval", "harness").simple_evaluate(
                model=harness_model, tasks=[name], task_manager=manager, bootstrap_iters=0
            )
        return as_task_result(results, loaded_tasks[name], version, seed=options.seed)

    records = {
        name: identity | {"task": {task: _described(several[task]) for task in several}}
        for name, several in loaded_tasks.items()
    }
    task_results.complete_folder(Path(out), records, prepare, model=source_folder.pinned(model), weights=weights)


def _tasks(manager: Any, name: str) -> dict[str, Any]:
    """Returns the task of a name, or the tasks of a group or tag, by their own names.

    Raises:
      UserError: it cannot be loaded, has images, or runs the code that a model writes.
    """
    dataset_errors = require("datasets.exceptions", "harness")
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)
    try:
        tasks = manager.load([name])["tasks"]
    # of its data and of its Python functions
    except (OSError, ValueError, LookupError, TypeError, ImportError, AttributeError) as error:
        raise _unloadable(name, error) from error
    except dataset_errors.DatasetsError as error:
        raise _unloadable(name, error) from error
    for task in tasks.values():
        if getattr(task, "MULTIMODAL", False):
            raise UserError(
                f"harness task {task.task_name!r} has images or sounds, and this model class reads text only; leave "
                f"the task out"
            )
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"harness task {task.task_name!r} runs the code that the model writes; leave it out, or run it with "
                f"`python -m t5g2.jobs.harness_evaluation --confirm_run_unsafe_code …`"
            )
    return tasks


def _described(task: Any) -> dict[str, Any]:
    """Returns the settings and the data of a task as plain data."""
    return describe({**task.dump_config(), "data": list(task.eval_docs)})


def _unloadable(name: str, error: Exception) -> UserError:
    return UserError(
        f"harness task {name!r} cannot be loaded: {type(error).__name__}: {error}; mend its YAML file, or get its data"
    )


def as_task_result(results: Mapping[str, Any], tasks: Mapping[str, Any], version: str, *, seed: int = 0) -> TaskResult:
    """Returns the results of lm_eval's simple_evaluate, with intervals over resampled examples.

    A group's scores, which are means of its tasks' scores, have none (nan).
    """
    scores, intervals, signatures = {}, {}, {}
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            score = f"{task}/{metric}" if kind == "none" else f"{task}/{metric},{kind}"
            limits = (float("nan"), float("nan"))
            if task in tasks:
                samples = [sample for sample in results["samples"][task] if sample["filter"] == kind]
                values = [sample[metric] for sample in samples if metric in sample]
                limits = _limits(values, tasks[task].aggregation().get(metric, np.mean), derive_seed(seed, "bootstrap"))
            scores[score] = float(value)
            intervals[score] = Interval(float(value), metrics.get("sample_len", 0), *limits)
            signatures[score] = (
                f"{task}: lm_eval {version}, task version {results['versions'].get(task)}, "
                f"{results['n-shot'].get(task, 0)} shots"
            )
    predictions = [
        prediction for task, samples in results["samples"].items() for prediction in _predictions(task, samples)
    ]
    return TaskResult(scores, predictions, intervals, signatures)


def _limits(values: Sequence[Any], aggregate: Callable[[list[Any]], Any], seed: int) -> tuple[float, float]:
    """Returns the 2.5% and the 97.5% quantile of a score over resampled examples (eval/metrics/intervals.py)."""
    generator = np.random.default_rng(seed)
    resampled = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(len(values), size=len(values))
        # a score that some examples have none of, such as a correlation of equal values
        with contextlib.suppress(ArithmeticError, ValueError):
            resampled.append(float(aggregate([values[i] for i in drawn])))
    defined = np.array(resampled)[np.isfinite(resampled)]
    low, high = np.quantile(defined, [0.025, 0.975]).tolist() if len(defined) else (np.nan, np.nan)
    return low, high


def _predictions(task: str, samples: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for sample in samples:
        arguments, outputs = sample["arguments"], sample["filtered_resps"]
        prediction = {"task": task, "input": arguments[0][0]}
        if _are_likelihoods(outputs):
            pairs = [(*pair[:2], output[0]) for pair, output in zip(arguments, outputs, strict=True)]
            # choices after no context are those that acc_mutual_info subtracts
            after = [(text, total) for context, text, total in pairs if context] or [pair[1:] for pair in pairs]
            prediction["output"] = max(after, key=lambda choice: choice[1])[0]
            prediction["choices"] = [{"text": text, "log_likelihood": total} for text, total in after]
        else:
            prediction["output"] = outputs[0]
        prediction["reference"] = sample["target"]
        if sample["filter"] != "none":
            prediction["filter"] = sample["filter"]
        yield prediction | {"scores": {metric: sample[metric] for metric in sample["metrics"]}}


def _are_likelihoods(outputs: Sequence[Any]) -> bool:
    """True for a (log-likelihood, is greedy) of each continuation; a filter may leave lists of texts."""
    return all(isinstance(output, list | tuple) and isinstance(output[0], float) for output in outputs)


def _load(path: str, dtype: str | None, mesh: Mesh | None = None) -> LanguageModel:
    loaded = loading.load(path, dtype=dtype, mesh=mesh)
    if not isinstance(loaded, LanguageModel):
        raise UserError(f"{path} is a dual encoder (SigLIP), and the harness asks language models; give one")
    return loaded


def _with_defaults_of(loaded: LanguageModel, options: HarnessOptions) -> HarnessOptions:
    """Returns the options with a loaded model's compute, and samples drawn as its folder recommends."""

    def sampler(temperature: float, top_k: int | None, top_p: float | None) -> Sampler:
        return loaded.sampler(temperature=temperature, top_k=top_k, top_p=top_p)

    return replace(options, compute=loaded.compute, mesh=loaded.mesh, sampler=sampler)


def _version() -> str:
    from importlib import metadata

    return metadata.version("lm_eval")


@_registry.register_model("t5g2")
class FolderHarnessModel(HarnessModel):
    """The model `t5g2` of lm_eval: a model folder, a Hugging Face folder, an official Flax one or a GGUF file.

    Args:
      path: the folder or file, or its address at the hub.
      batch_size: rows of a batch.
      dtype: dtype of the weights; None = as they are stored.
      seed: seed of samples.
      max_length: largest number of tokens that encoder and decoder read; None = the context of each.
      device, max_batch_size: of lm_eval's command line, and not used: JAX chooses the device (JAX_PLATFORMS).
    """

    def __init__(
        self,
        path: str,
        batch_size: int | str = 8,
        dtype: str | None = None,
        seed: int = 0,
        max_length: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        if not str(batch_size).isdigit():
            raise UserError(f"batch_size={batch_size}; give a number of rows, for which the programs are compiled")
        options = HarnessOptions(rows=int(batch_size), seed=seed, max_length=max_length)
        loaded = _load(path, dtype)
        super().__init__(loaded.params, reading_of(loaded), _with_defaults_of(loaded, options))


def main() -> int:
    """Runs lm_eval's command line, in which there is the model `t5g2`; returns the exit status."""
    try:
        require("lm_eval.__main__", "harness").cli_evaluate()
    except UserError as error:
        print(escaped(f"lm_eval: {error}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # lm_eval resamples and prints in processes of its own, which must not be copies of one with JAX's threads
    multiprocessing.set_start_method("forkserver")
    sys.exit(main())
