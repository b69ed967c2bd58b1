"""`t5g2 evaluate`."""

from t5g2.commands.flags import ALLOW_CHANGE, CONFIG, DISTRIBUTED, WORKDIR, Flag, Parsed
from t5g2.core.errors import UserError

FLAGS = {
    "config": CONFIG,
    "workdir": WORKDIR,
    "step": Flag("last", "step of the checkpoint, or last"),
    "tasks": Flag("", "names of tasks, separated by commas; default: all of the config's"),
    "distributed": DISTRIBUTED,
    "allow_change": ALLOW_CHANGE,
}


def run(flags: Parsed) -> None:
    """Scores a checkpoint of a run on the tasks of its config; writes scores.json and predictions.jsonl.

    Both go to <workdir>/evaluations/<step>. Settings of `eval` may differ from the run's.

    Example: t5g2 evaluate --config=configs/quickstart.py:adapted --workdir=runs/adapted --step=last
    """
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
