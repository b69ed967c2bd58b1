"""The training run, in seven numbered parts. No hooks: an experiment that needs another loop copies this file.

What the order guarantees: an evaluation at step n sees the weights after n updates; a checkpoint at step n holds those
weights and the position of the data after the n batches that made them, whatever was prefetched; a state that is not
finite is never written; and a run that is killed anywhere and started again ends in the same bits as one left alone.
"""

import logging
import sys
from contextlib import ExitStack
from pathlib import Path

import jax

from t5g2.core import logs, sharding
from t5g2.data.pipeline import Pipeline, to_global
from t5g2.eval.evaluation import Evaluator
from t5g2.train import plan as start
from t5g2.train import preemption, recorder
from t5g2.train import workdir as workdirs
from t5g2.train.experiment import Experiment

log = logging.getLogger("t5g2")


def train(
    experiment: Experiment, folder: str, *, replay: int | None = None, allow_change: tuple[str, ...] = ()
) -> None:
    """Trains until `train.steps` updates are done, or until a signal, and leaves the workdir ready to be resumed.

    Args:
      experiment: checked by its own constructor.
      folder: the workdir; a run that it holds is resumed.
      replay: start at this checkpoint instead of the newest, and write nothing.
      allow_change: paths of settings that may differ from the saved experiment's.

    Raises:
      UserError: the mesh does not fit the devices, the text cannot be read, or the workdir holds another experiment.
      FloatingPointError: a loss or a gradient is not finite; the message has the step.
      SystemExit: 143 after SIGTERM, 130 after Ctrl-C; the state is saved.
    """
    # 1 world: the rules that cross fields were checked when the experiment was made; now those that need devices
    logs.setup(process=jax.process_index())
    world = sharding.make(experiment.mesh)
    rows = start.local_rows(experiment, world)
    workdir = Path(folder)
    with ExitStack() as closing:
        closing.enter_context(workdirs.claimed(workdir, experiment, replay=replay, allow_change=allow_change))
        stopping = closing.enter_context(preemption.on_signals())
        closing.enter_context(jax.set_mesh(world))
        recorder.world(world)

        # 2 shapes: what the state looks like and where each leaf of it will lie; no array yet
        plan = start.plan(experiment, world)

        # 3 weights: the first that applies of workdir, resume, adapt, params, scratch
        saved = closing.enter_context(start.checkpoints(experiment, workdir, read_only=replay is not None))
        begun = start.begin(experiment, workdir, plan, saved, replay=replay)
        state, step = begun.state, begun.step
        if replay is None and workdirs.is_done(workdir, experiment, step):
            log.info("done: %d steps; %s", step, recorder.last_scores(workdir))
            return

        # 4 data: every stream at the position that these weights have seen
        evaluation = Evaluator(experiment.eval.tasks, plan.eval_context(rows))
        pipeline = closing.enter_context(
            Pipeline(plan.data, seed=experiment.train.seed, rows=rows, positions=begun.positions)
        )
        start.check_corpus(begun, pipeline, allow_change=allow_change)
        whose = start.check_teacher(begun, plan, allow_change=allow_change)
        if replay is None:
            workdirs.record(workdir, experiment, begun.provenance)

        # 5 compile: once; memory, FLOPs and tokens are told before the first step
        update, teacher = plan.compile(), start.teacher(plan)
        tell = closing.enter_context(recorder.Teller(experiment, workdir, step=step, write=replay is None))

        # 6 loop
        while True:
            stopped, last = stopping.agreed(), step == experiment.train.steps
            if not stopped and start.due(step, experiment.eval.every_steps, first=True, last=last):
                tell.flush()  # so that the pause holds none of the step before
                with tell.pause():
                    tell.outcome(step, evaluation.run(state.params, start.task_names(experiment, last)))
            if replay is None and (stopped or start.due(step, experiment.save.every_steps, last=last)):
                tell.flush()  # raises if the step before was not finite
                with tell.pause():
                    start.save(saved, experiment, step, state, pipeline=pipeline, teacher=whose)
            if stopped or last:
                break
            host_batch = pipeline.next()
            batch = to_global(host_batch.batch, sharding.batch_sharding(world), rows=experiment.data.rows)
            state, metrics = update(state, batch, teacher)
            step += 1
            tell.step(step, metrics, host_batch)

        # 7 close: wait for the writers; the weights as a model folder
        tell.flush()
        saved.wait()
        if stopped:
            log.info("stopped by %s at step %d; run the same command to go on", recorder.signal_name(stopped), step)
            sys.exit(128 + stopped)
        if replay is None:
            start.finish(experiment, workdir, step, state.params, begun.provenance)
        log.info("done: %d steps; %s", step, recorder.last_scores(workdir))
