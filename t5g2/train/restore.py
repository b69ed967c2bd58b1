"""The state that a run starts from: the workdir's own, another run's, adapted or imported weights, or new ones."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.train_states import Checkpoints, SavedStep
from t5g2.core import settings
from t5g2.core.errors import UserError
from t5g2.core.logs import log
from t5g2.core.seeds import derive_seed
from t5g2.train import adaptation, files_of_weights, image_rows, run_tokenizer, teachers
from t5g2.train import state as states
from t5g2.train import workdir as workdirs
from t5g2.train.data_resume import SavedData
from t5g2.train.experiment import TABLES, Experiment
from t5g2.train.optim import OptimConfig
from t5g2.train.plan import Plan
from t5g2.train.state import TrainState


class StartState(NamedTuple):
    """The state of a run when it starts.

    Attributes:
      state: weights and optimizer, on the devices.
      step: updates completed.
      data: position of the data; None = its start.
      teacher: fingerprint of the teacher of the steps before; None = any teacher.
      provenance: origin of each weight of an adapted model, as plain data; None if the model was not adapted here.
    """

    state: TrainState
    step: int
    data: SavedData | None
    teacher: str | None
    provenance: Any


def restore(
    workdir: Path,
    plan: Plan,
    checkpoints: Checkpoints,
    *,
    replay: int | None = None,
    allow_change: tuple[str, ...] = (),
) -> StartState:
    """Returns the first that exists: the workdir's checkpoint, that of init.resume, weights from `init`, new weights.

    Args:
      checkpoints: checkpoints of the workdir.
      replay: the step to start from; None = the newest.
      allow_change: paths of settings that may differ from the saved ones.

    Raises:
      UserError: the checkpoint does not exist, or is of another experiment; or a folder that `init` names does not
        exist or does not fit.
    """
    experiment, init = plan.experiment, plan.experiment.init
    origin, folder = f"the workdir, {workdir}", workdir
    # the workdir comes first, so that a run that was started from another one is resumed from its own checkpoints
    saved = checkpoints.restore(plan.abstract.params, plan.abstract.opt, step=replay)
    if saved is not None:
        workdirs.compare_saved(workdir, saved, experiment, allow_change=allow_change)
    if saved is None and init.resume is not None:
        origin, folder = f"init.resume, {init.resume}", Path(init.resume).expanduser()
        workdirs.require_run(folder)
        # read-only, because the other run may still be writing
        with Checkpoints(folder / workdirs.CHECKPOINTS, read_only=True) as other:
            saved = other.restore(plan.abstract.params, plan.abstract.opt)
        if saved is None:
            raise UserError(f"{origin} has no checkpoint; give the workdir of a run that has saved one")
    if saved is None:
        params, provenance = initial_params(plan, allow_change=allow_change)
        return StartState(states.fresh(params, plan.optimizer, plan.abstract), 0, None, None, provenance)
    if saved.step > experiment.train.steps:
        raise UserError(
            f"{origin} holds step {saved.step} and train.steps is {experiment.train.steps}; raise it to at least "
            f"that, or give another --workdir"
        )
    log.info("weights: from step %d of %s", saved.step, origin)
    _log_learning_rate(saved, experiment)
    # the step is not part of the saved arrays: its number is the name of the checkpoint
    replicated = plan.abstract.step.sharding
    step, skipped = (jax.device_put(np.int32(x), replicated) for x in (saved.step, saved.meta.get("skipped", 0)))
    state = TrainState(step, saved.params, saved.opt, skipped)
    provenance = workdirs.read_provenance(workdir)
    data = SavedData.of(saved, folder)
    return StartState(state, saved.step, data, saved.meta.get("teacher"), provenance)


def _log_learning_rate(saved: SavedStep, experiment: Experiment) -> None:
    """Logs the learning rate of the next step if other settings than the saved ones, such as train.steps, move it."""
    try:
        # these two parts alone: the data would open files that may be gone
        saved_settings = saved.meta["settings"]
        former = settings.build(OptimConfig, saved_settings["optim"], tables=TABLES)
        former_steps = saved_settings["train"]["steps"]
        schedules = (former.schedule.make(former_steps), experiment.optim.schedule.make(experiment.train.steps))
    except (KeyError, UserError):  # an earlier version saved the step, without settings or with other ones
        return
    rates = [float(learning_rate(saved.step)) for learning_rate in schedules]
    if rates[0] != rates[1]:
        log.warning(
            "the learning rate of step %d moves from %.3g to %.3g, because the schedule or its length has changed: "
            "train.steps %d -> %d",
            saved.step + 1,
            *rates,
            former_steps,
            experiment.train.steps,
        )


def initial_params(plan: Plan, *, allow_change: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """Returns the weights of a run at step 0, and their provenance (None for new weights).

    Raises:
      UserError: a folder that `init` names does not exist or does not fit, or has another tokenizer than the run.
    """
    experiment = plan.experiment
    init, dtype = experiment.init, experiment.train.param_dtype
    log.info(run_tokenizer.check(experiment.data.tokenizer, init, experiment.model, allow_change=allow_change))
    image_rows.check_processor(experiment.data.images, init)
    files_of_weights.read(init, experiment)  # what the end of the run copies is whole
    # by name, so that the weights do not depend on how many other seeds are drawn
    seed = derive_seed(experiment.train.seed, "weights")
    if init.adapt is not None:
        log.info("weights: adapted from init.adapt.source, %s", init.adapt.source)
        params, provenance = adaptation.adapt_into(
            init.adapt, experiment.model, mesh=plan.mesh, param_dtype=dtype, seed=seed
        )
        log.info("\n%s", provenance.table())
        return params, provenance.to_dict()
    if init.params is not None:
        log.info("weights: from init.params, %s", init.params)
        folder = adaptation.open_same_architecture(init.params, experiment.model, seed=seed)
        for note in folder.notes:
            log.info("  %s", note)
        return folders.load_model(folder, mesh=plan.mesh, param_dtype=dtype), folder.provenance
    log.info("weights: new, from seed %d", experiment.train.seed)
    return states.fresh_params(experiment.model, plan.abstract, key=jax.random.key(seed), param_dtype=dtype), None


def check_teacher(start: StartState, plan: Plan, *, allow_change: tuple[str, ...] = ()) -> str | None:
    """Returns the fingerprint of the teacher that runs in every step (reads all of its weights); None without one.

    Raises:
      UserError: the teacher differs from that of the steps before, and `allow_change` does not name distill.teacher.
    """
    if plan.teacher is None:
        return None
    folder = plan.teacher.folder
    fingerprint = teachers.fingerprint(folder)
    # None: a new run, or a checkpoint without a teacher's fingerprint
    if start.teacher not in (None, fingerprint):
        if not {"distill", "distill.teacher"} & set(allow_change):
            raise UserError(
                f"distill.teacher, {folder.origin}, is another model than when step {start.step} was saved "
                f"(fingerprint {start.teacher} -> {fingerprint}); restore it, use a new --workdir, or go on with it on "
                f"purpose: --allow_change=distill.teacher"
            )
        log.warning("the teacher has changed since step %d was saved: %s -> %s", start.step, start.teacher, fingerprint)
    return fingerprint
