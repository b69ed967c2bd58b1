"""Evaluation of a checkpoint of a run on the tasks of its config."""

from dataclasses import replace
from pathlib import Path

import jax

from t5g2.core import distributed, logs, sharding, whole_weights
from t5g2.core.errors import UserError
from t5g2.core.terminal import escaped
from t5g2.eval import evaluation
from t5g2.train import flops_budget, optim
from t5g2.train import plan as plans
from t5g2.train import workdir as workdirs
from t5g2.train.experiment import Experiment


def evaluate_run(
    experiment: Experiment,
    folder: str,
    *,
    step: int | None = None,
    tasks: tuple[str, ...] = (),
    allow_change: tuple[str, ...] = (),
) -> None:
    """Prints the scores of a checkpoint; writes scores.json and predictions.jsonl to <workdir>/evaluations/<step>.

    Args:
      experiment: the experiment of the run.
      folder: the workdir.
      step: step of the checkpoint; None = the newest.
      tasks: names of tasks; none = all of the experiment's.
      allow_change: paths of settings that may differ from the saved experiment's; those of eval may anyway.

    Raises:
      UserError: the run, the step or a task does not exist, or the run has a different experiment.
    """
    workdir = Path(folder)
    logs.setup(process=jax.process_index())
    experiment = flops_budget.resolved(experiment)
    workdirs.compare_experiment(workdir, experiment, allow_change=("eval", *allow_change))
    mesh = sharding.make(experiment.mesh)
    rows = plans.local_rows(experiment, mesh)
    with jax.set_mesh(mesh):
        plan = plans.make(replace(experiment, distill=None), mesh)  # no task needs a teacher
        whole_weights.warn(plan.abstract.params, mesh)
        with workdirs.open_checkpoints(workdir, experiment, read_only=True) as checkpoints:
            # without the optimizer's state, which no task needs but of the running mean
            opt = plan.abstract.opt if experiment.eval.ema else None
            restored = checkpoints.restore(plan.abstract.params, opt, step=step)
        if restored is None:
            raise UserError(f"{workdir} has no checkpoint; give the workdir of a run that has saved one")
        evaluator = evaluation.Evaluator(experiment.eval.tasks, plan.eval_context(rows))
        params = optim.mean_weights(restored.params, restored.opt) if experiment.eval.ema else restored.params
        result = evaluator.run(params, tasks or None)
    evaluation.write(workdir / "evaluations" / str(restored.step), restored.step, result)
    if distributed.is_primary():
        width = max(map(len, result.scores), default=0)
        print(f"step {restored.step}")
        for name, value in result.scores.items():
            print(escaped(f"{name:{width}}  {value:.4f}"))
