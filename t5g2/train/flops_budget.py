"""The length of a run, which may have a budget of FLOPs (train.flops) in place of a number of updates.

    steps = floor(train.flops / FLOPs of an update)

FLOPs are those of models/flops.py, forward and backward, for the tokens and masks of the run's own rows: the mean over
a sample of its data, which is the same for every seed, so that all seeds are as long. So runs of different
architectures, lengths and objectives can be given the same compute. Not counted, as in the logged FLOPs: a teacher, and
what is left out while weights are frozen for a time.
"""

import math
from dataclasses import replace

from t5g2.core.bounds import INT32_MAX
from t5g2.core.errors import UserError
from t5g2.core.logs import log
from t5g2.data.pipeline import Pipeline
from t5g2.models import flops
from t5g2.train.experiment import Experiment
from t5g2.train.schedules import WarmupStableDecay

SAMPLE_ROWS = 256  # at least; in whole batches


def of_new_run(experiment: Experiment) -> Experiment:
    """Returns the experiment of a run that is to begin, or to go on, with the steps that it has, as `resolved` does.

    Raises:
      UserError: as there; or what is to end within the run does not. Not the constructor's to say, because runs of
        versions that took it can be read and evaluated.
    """
    experiment = resolved(experiment)
    steps, offset, schedule = experiment.train.steps, experiment.train.encoder_offset, experiment.optim.schedule
    if isinstance(schedule, WarmupStableDecay):
        schedule.check_length(steps)
    # what is evaluated and exported has no offset, so that the last update should have none
    if offset is not None and offset.steps >= steps:
        remedy = (
            f"give it at most {steps - 1} steps, or the run more" if steps > 1 else "leave it out, or give more steps"
        )
        raise UserError(
            f"train.encoder_offset.steps = {offset.steps} and train.steps = {steps}; the offset must be 0 before the "
            f"run ends: {remedy}"
        )
    return experiment


def resolved(experiment: Experiment) -> Experiment:
    """Returns the experiment with the steps that its budget gives; the experiment itself if it has no budget.

    Raises:
      UserError: steps and a budget are both set; the budget is below one update, or above 2^31 - 1; the text cannot be
        read.
    """
    train = experiment.train
    if train.flops is None:
        return experiment
    if train.steps:
        raise UserError(
            f"train.steps = {train.steps} and train.flops = {train.flops:g} are both set, and a run has one length; "
            f"set train.steps=0 to take the budget, or train.flops=None"
        )
    update = update_flops(experiment)
    steps = math.floor(train.flops / update)
    if not 1 <= steps <= INT32_MAX:
        raise UserError(
            f"train.flops = {train.flops:g} is {steps:,} updates of {update:.4g} FLOPs; give at least {update:.4g}, "
            f"and at most {INT32_MAX:,} updates"
        )
    log.info("train.flops: %d updates of %.4g FLOPs, %.4g in all", steps, update, steps * update)
    return replace(experiment, train=replace(train, steps=steps))


def update_flops(experiment: Experiment) -> float:
    """Returns the mean FLOPs of an update, forward and backward, over a sample of the run's rows."""
    model, optim, rows = experiment.model, experiment.optim, experiment.data.rows
    frozen = {"frozen_vision": optim.freezes_tower(model), "frozen_body": optim.trains_probe_alone(model)}
    batches = math.ceil(SAMPLE_ROWS / rows)
    # all rows in every process, so that all have the same length
    with Pipeline(experiment.data, seed=0) as pipeline:
        return sum(flops.of_batch(model, pipeline.next().batch, **frozen) for _ in range(batches)) / batches
