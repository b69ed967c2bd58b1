"""The tasks of an experiment on a checkpoint of its run."""

from dataclasses import replace
from pathlib import Path

import jax

from t5g2.core import distributed, logs, sharding
from t5g2.core.errors import UserError
from t5g2.eval import evaluation as evaluate
from t5g2.train import plan as start
from t5g2.train import workdir as workdirs
from t5g2.train.experiment import Experiment


def evaluate_run(
    experiment: Experiment,
    folder: str,
    *,
    step: str = "last",
    tasks: tuple[str, ...] = (),
    allow_change: tuple[str, ...] = (),
) -> None:
    """Prints the scores of a checkpoint; writes scores.json and predictions.jsonl to <workdir>/evaluations/<step>.

    Args:
      step: a number, or "last".
      tasks: names; none = all of the experiment's.
      allow_change: paths of settings that may differ from the saved experiment's; those of eval may anyway.

    Raises:
      UserError: no such run, step or task, or the run is of a different experiment.
    """
    if step != "last" and not step.isdigit():
        raise UserError(f"--step={step}; give the number of a saved step, or last")
    workdir = Path(folder)
    logs.setup(process=jax.process_index())
    workdirs.compare_record(workdir, experiment, allow_change=("eval", *allow_change))
    world = sharding.make(experiment.mesh)
    rows = start.local_rows(experiment, world)
    with jax.set_mesh(world):
        plan = start.plan(replace(experiment, distill=None), world)  # no task asks a teacher
        with start.checkpoints(experiment, workdir, read_only=True) as saved:
            restored = saved.restore(plan.abstract.params, step=None if step == "last" else int(step))
        if restored is None:
            raise UserError(f"{workdir} has no checkpoint; give the workdir of a run that has saved one")
        evaluation = evaluate.Evaluator(experiment.eval.tasks, plan.eval_context(rows))
        outcome = evaluation.run(restored.params, tasks or None)
    evaluate.write(workdir / "evaluations" / str(restored.step), restored.step, outcome)
    if distributed.is_primary():
        width = max(map(len, outcome.scores), default=0)
        print(f"step {restored.step}")
        for name, value in outcome.scores.items():
            print(f"{name:{width}}  {value:.4f}")
