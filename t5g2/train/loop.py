"""The training run, in seven numbered parts. No hooks: an experiment that needs another loop copies this file.

What the order guarantees: an evaluation at step n sees the weights after n updates; a checkpoint at step n holds those
weights and the position of the data after the n batches that made them, whatever was prefetched, and is begun before
the evaluation, which may take longer than a preempted run has left; a signal ends an evaluation at its next batch; a
state that is not finite is never written; and a run that is killed anywhere and started again ends in the same bits as
one that was never stopped.
"""

import contextlib
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from t5g2.core import logs, metrics_writer, sharding
from t5g2.core.hang_timeout import HangTimeout
from t5g2.core.logs import log
from t5g2.core.startup import START_UP
from t5g2.data import row_memory
from t5g2.data.pipeline import to_global
from t5g2.eval.evaluation import Evaluator
from t5g2.eval.tasks import EvaluationStopped
from t5g2.train import data_resume, flops_budget, optim, preemption, profiled_steps, recorder
from t5g2.train import plan as plans
from t5g2.train import restore as restoring
from t5g2.train import workdir as workdirs
from t5g2.train.experiment import Experiment
from t5g2.train.state import TrainState


def train(
    experiment: Experiment, folder: str, *, replay: int | None = None, allow_change: tuple[str, ...] = ()
) -> None:
    """Trains until `train.steps` updates are done, or until a signal, and leaves the workdir ready to be resumed.

    Args:
      experiment: the settings; its constructor has checked them.
      folder: the workdir; a run that it holds is resumed.
      replay: start from the checkpoint of this step instead of the newest, and write nothing.
      allow_change: paths of settings that may differ from the saved experiment's.

    Raises:
      UserError: the mesh does not fit the devices, the text cannot be read, the workdir holds another experiment, or an
        update is not finite.
      SystemExit: 143 after SIGTERM, 130 after Ctrl-C; the state is saved.
    """
    # 1 mesh: the experiment's constructor has checked its fields; the rules that need devices are checked here
    logs.setup(process=jax.process_index())
    metrics_writer.check_outputs(experiment.log.wandb)
    mesh = sharding.make(experiment.mesh)
    rows, experiment = plans.local_rows(experiment, mesh), flops_budget.of_new_run(experiment)
    row_memory.check(experiment.data, rows)
    workdir, writes = Path(folder), replay is None
    with ExitStack() as stack:
        stack.enter_context(workdirs.claimed(workdir, experiment, replay=replay, allow_change=allow_change))
        waiting = stack.enter_context(HangTimeout(experiment.train.hang_timeout_secs))
        preempted = stack.enter_context(preemption.on_signals(waiting))
        stack.enter_context(jax.set_mesh(mesh))
        recorder.log_devices(mesh)

        # 2 shapes: the state and its shardings; no array yet
        plan = plans.make(experiment, mesh)

        # 3 weights: from the workdir, init.resume, init.adapt or init.params, whichever exists first, else new
        checkpoints = stack.enter_context(workdirs.open_checkpoints(workdir, experiment, read_only=not writes))
        start = restoring.restore(workdir, plan, checkpoints, replay=replay, allow_change=allow_change)
        state, step = start.state, start.step
        if writes and workdirs.is_done(workdir, experiment, step):
            log.info("done: %d steps; %s", step, recorder.last_scores(workdir))
            return
        START_UP.ended("weights", state)

        # 4 data: every stream at the position that these weights have seen
        evaluator = Evaluator(experiment.eval.tasks, plan.eval_context(rows, preempted.agreed))
        pipeline = stack.enter_context(data_resume.open_pipeline(start.data, plan, rows, allow_change=allow_change))
        digest = restoring.check_teacher(start, plan, allow_change=allow_change)
        if writes:
            workdirs.write_experiment(workdir, experiment, start.provenance)
        START_UP.ended("data")

        # 5 compile: once; memory, FLOPs and tokens are logged before the first step
        update, teacher = plan.compile(), plans.load_teacher(plan)
        record = stack.enter_context(recorder.Recorder(experiment, workdir, step=step, write=writes))
        profiled = stack.enter_context(
            profiled_steps.ProfiledSteps(experiment.train.profiled, workdir, record.pause, write=writes)
        )

        # 6 loop
        while True:
            stop_signal, last = preempted.agreed_before(), step == experiment.train.steps
            if writes and (stop_signal or due(step, experiment.save.every_steps, last=last)):
                with record.pause():  # raises if the step before was not finite
                    workdirs.save_checkpoint(checkpoints, experiment, step, state, pipeline=pipeline, teacher=digest)
            if not stop_signal and due(step, experiment.eval.every_steps, first=True, last=last):
                with record.pause(), contextlib.suppress(EvaluationStopped):
                    record.evaluation(step, evaluator.run(evaluated(experiment, state), task_names(experiment, last)))
                if preempted.agreed():  # once more around, to save this step
                    continue
            if stop_signal or last:
                break
            host_batch = pipeline.next()
            START_UP.ended("first batch")
            batch = to_global(host_batch.batch, sharding.batch_sharding(mesh), rows=experiment.data.rows)
            profiled.begin(step + 1, state)
            state, metrics = update(state, batch, teacher)
            step += 1
            record.step(step, metrics, host_batch)
            profiled.end(step, state)

        # 7 close: wait for the writers, however long they take; the weights as a model folder
        waiting.end()
        record.flush()
        checkpoints.wait()
        if stop_signal:
            name = preemption.signal_name(stop_signal)
            log.info("stopped by %s at step %d; run the same command to go on", name, step)
            sys.exit(128 + stop_signal)
        if writes:
            workdirs.finish(workdir, experiment, step, state, start.provenance)
        log.info("done: %d steps; %s", step, recorder.last_scores(workdir))


def evaluated(experiment: Experiment, state: TrainState) -> Any:
    """Returns the weights that are evaluated: those of the state, or their running mean."""
    return optim.mean_weights(state.params, state.opt) if experiment.eval.ema else state.params


def task_names(experiment: Experiment, last: bool) -> list[str]:
    """Returns the tasks of an evaluation: those in eval.final only at the end."""
    return [task.name for task in experiment.eval.tasks if last or task.name not in experiment.eval.final]


def due(step: int, every_steps: int, *, first: bool = False, last: bool = False) -> bool:
    """True at multiples of `every_steps` (0 = never in between), at step 0 if `first`, and if `last`."""
    return last or (step == 0 and first) or (every_steps > 0 and step > 0 and step % every_steps == 0)
