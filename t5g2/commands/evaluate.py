"""`t5g2 evaluate`."""

from dataclasses import replace

from t5g2.commands.flags import ALLOW_CHANGE, CONFIG, DISTRIBUTED, DTYPE, MESH, MODEL, OUT, WORKDIR, Flag, Parsed
from t5g2.core.bounds import LONGEST
from t5g2.core.errors import UserError

FLAGS = {
    "model": replace(MODEL, required=False),
    "tasks": Flag(
        "",
        "of --model: task files, FILE.py[:ARG], and names of files in configs/tasks, separated by commas; of a run: "
        "names of its config's tasks, by default all",
    ),
    "harness": Flag(
        "",
        "of --model, instead of --tasks: tasks, groups and tags of lm-evaluation-harness, separated by commas; * and ? "
        "stand for others",
    ),
    "include_path": Flag("", "folder of YAML files that --harness may name too"),
    "out": replace(
        OUT, help="folder to write, of --model; after an interruption the same command goes on", required=False
    ),
    "rows": Flag(8, "rows of a batch, of --model", least=1, most=2**20),
    "seed": Flag(0, "seed of what is drawn, of --model: shots, samples, resamples", least=0, most=2**63 - 1),
    "chunk_tokens": Flag(512, "tokens of a chunk of text, of --model, for held-out losses", least=16, most=LONGEST),
    "cost": Flag(False, "of --model: also FLOPs and latency of the queries of tasks that generate"),
    "dtype": DTYPE,
    "mesh": MESH,
    "config": replace(CONFIG, required=False),
    "workdir": replace(WORKDIR, required=False),
    "step": Flag("last", "step of the run's checkpoint, or last"),
    "distributed": DISTRIBUTED,
    "allow_change": ALLOW_CHANGE,
}
RUN = ("config", "workdir")


def run(flags: Parsed) -> None:
    """Scores a model folder on tasks of Python files, or a checkpoint of a run on the tasks of its config.

    Of a model folder, OUT gets scores.json (every score with its number of examples and a bootstrap 95% interval),
    predictions.jsonl and index.html. Of a run, <workdir>/evaluations/<step> gets scores.json and predictions.jsonl;
    settings of `eval` may differ from the run's.

    Example: t5g2 evaluate --model=models/t5gemma2-4b --tasks=my_tasks.py,docstrings:50 --out=evaluations/t5gemma2-4b
    Example: t5g2 evaluate --model=models/t5gemma2-4b --harness=arc_easy,gsm8k --out=evaluations/t5gemma2-4b
    Example: t5g2 evaluate --config=configs/quickstart.py:adapted --workdir=runs/quickstart/adapted --step=last
    """
    if flags.model is not None:
        _evaluate_folder(flags)
        return
    missing = [f"--{name}" for name in RUN if not flags.values[name]]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: give --model with --tasks and --out, or --config and --workdir of a run"
        )
    if flags.harness or flags.include_path:
        raise UserError("--harness and --include_path are of --model; export the run's weights, and give them there")
    if flags.out is not None:
        raise UserError("--out is of --model; what is evaluated of a run is written into its --workdir")
    if flags.step != "last" and not flags.step.isdigit():
        raise UserError(f"--step={flags.step}; give the number of a saved step, or last")
    step = None if flags.step == "last" else int(flags.step)
    from t5g2.core import distributed
    from t5g2.jobs import run_evaluation
    from t5g2.train import config_file

    distributed.initialize(flags.distributed)
    experiment = config_file.load(flags.config, flags.overrides)
    run_evaluation.evaluate_run(
        experiment, flags.workdir, step=step, tasks=flags.names("tasks"), allow_change=flags.names("allow_change")
    )


def _evaluate_folder(flags: Parsed) -> None:
    given = [f"--{name}" for name in RUN if flags.values[name]]
    if given or flags.overrides:
        raise UserError(
            f"--model and {given[0] if given else '--config'} are both given; give --model with --tasks and --out, or "
            f"--config and --workdir of a run"
        )
    if not flags.out:
        raise UserError("--out is missing: the folder to write")
    if flags.harness or flags.include_path:
        _evaluate_on_harness(flags)
        return
    from t5g2.core import distributed
    from t5g2.jobs import folder_evaluation

    distributed.initialize(flags.distributed)
    options = folder_evaluation.FolderOptions(
        flags.rows, flags.seed, flags.chunk_tokens, flags.dtype, flags.cost, flags.mesh
    )
    folder_evaluation.evaluate_folder(flags.model, flags.paths("tasks"), flags.out, options)


def _evaluate_on_harness(flags: Parsed) -> None:
    if not flags.harness:
        raise UserError("--harness is missing: the names of the tasks, of which --include_path has the files")
    if flags.tasks:
        raise UserError("--harness and --tasks are both given; give them in two commands, each with its --out")
    if flags.cost:
        raise UserError("--cost measures queries of --tasks, and --harness is given; leave one of them out")
    from t5g2.core.optional import require

    require("lm_eval", "harness")
    import jax

    from t5g2.core import distributed

    distributed.initialize(flags.distributed)
    if jax.process_count() > 1:
        raise UserError(
            f"--harness runs in one process, and these are {jax.process_count()}; start one, or evaluate --tasks"
        )
    from t5g2.jobs import harness_evaluation

    tasks = harness_evaluation.TaskFolder(flags.names("harness"), flags.include_path)
    options = harness_evaluation.HarnessOptions(flags.rows, flags.seed)
    harness_evaluation.evaluate_on_harness(flags.model, tasks, flags.out, options, dtype=flags.dtype, mesh=flags.mesh)
