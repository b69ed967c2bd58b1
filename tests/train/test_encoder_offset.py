"""A soft start of merged attention: an offset on the scores of the encoder's keys, in updates alone."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.core import sharding
from t5g2.core.errors import UserError
from t5g2.core.sharding import MeshShape
from t5g2.models.config import to_dict
from t5g2.models.layers import Compute
from t5g2.train import config_file, flops_budget, optim, plan, resume, state, step
from t5g2.train import experiment as experiments
from t5g2.train import workdir as workdirs
from t5g2.train.encoder_offset import EncoderOffset
from tests import weights
from tests.train.test_experiment import QUICKSTART
from tests.train.test_step import BATCH, CONFIG, DENOISERS, OPTIM, SOURCES, norm

FLOAT32 = Compute(dtype="float32")
SETTING = "train.encoder_offset"


@pytest.mark.parametrize(
    ("start", "steps", "expected"),
    [(-8.0, 4, [-8, -6, -4, -2, 0, 0, 0]), (-3.0, 1, [-3, 0, 0]), (-1.0, 3, [-1, -2 / 3, -1 / 3, 0])],
)
def test_the_offset_of_each_update(start, steps, expected):
    offset = EncoderOffset(start, steps)
    np.testing.assert_allclose([offset.at(done) for done in range(len(expected))], expected, atol=1e-6)
    # not nearly: from then on an update is one without an offset
    assert all(float(jax.jit(offset.at)(jnp.int32(done))) == 0.0 for done in (steps, steps + 1, 10**6))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"start": 0.0}, r"start = 0\.0; it must be at least -100 and below 0"),
        ({"start": -101.0}, r"start = -101\.0; it must be at least -100 and below 0"),
        ({"start": float("nan")}, "start = nan; it must be"),
        ({"steps": 0}, "steps = 0; it must be at least 1"),
    ],
)
def test_offsets_that_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        EncoderOffset(**wrong)


@pytest.mark.parametrize(
    ("arm", "changes"), [("source", ()), ("scratch", (("model.cross", "separate"), ("model.tied_embedding", "False")))]
)
def test_a_model_without_merged_attention_has_no_offset(arm, changes):
    given = (*changes, (SETTING, "{'start': -8.0, 'steps': 10}"))
    with pytest.raises(UserError, match=r"train\.encoder_offset is of the encoder's keys in merged attention, and"):
        config_file.load(f"{QUICKSTART}:{arm}", given)
    assert config_file.load(f"{QUICKSTART}:{arm}", changes).train.encoder_offset is None


@pytest.mark.parametrize(
    ("steps", "of", "remedy"),
    [
        (19, 20, None),
        (20, 20, "give it at most 19 steps, or the run more"),
        (500, 20, "give it at most 19 steps, or the run more"),
        (1, 1, "leave it out, or give more steps"),
    ],
)
def test_the_last_update_of_a_new_run_has_no_offset(steps, of, remedy, tmp_path):
    """A run that an earlier version let begin with one can still be read."""
    changes = [(SETTING, str({"start": -8.0, "steps": steps})), ("train.steps", str(of))]
    changes.append(("optim.schedule.warmup_steps", "0"))
    made = config_file.load(f"{QUICKSTART}:adapted", changes)
    workdirs.write_experiment(tmp_path, made, None)
    assert workdirs.read_experiment(tmp_path).train.encoder_offset == made.train.encoder_offset
    if remedy is None:
        assert flops_budget.of_new_run(made) is made
        return
    message = rf"encoder_offset\.steps = {steps} and train\.steps = {of}; the offset must be 0 .*: {remedy}$"
    with pytest.raises(UserError, match=message):
        flops_budget.of_new_run(made)


def test_an_update_has_the_offset_of_its_step_and_ends_as_one_without():
    """Its loss is that of the model with the offset; after the last it is the step without one, gradients included. It
    depends on the number of updates in the state alone, which is saved, so a resumed run goes on where it was.
    """
    params = weights.model(CONFIG)
    updates = optim.make(OPTIM, 10, params)
    plain = step.StepOptions(FLOAT32, DENOISERS, SOURCES)
    batch = jax.tree.map(jnp.asarray, BATCH)

    def run(options):
        program = jax.jit(step.make_train_step(updates, options))
        return lambda done: program(state.TrainState(jnp.int32(done), params, updates.init(params)), batch)

    soft = run(dataclasses.replace(plain, encoder_offset=EncoderOffset(-8.0, 4)))
    after, metrics = soft(4)
    wanted, without = run(plain)(4)
    np.testing.assert_allclose(metrics.loss, without.loss, rtol=1e-6)
    np.testing.assert_allclose(norm(after.opt[0].mu), norm(wanted.opt[0].mu), rtol=1e-5)

    loss = jax.jit(lambda offset: step.loss_sums(params, batch, plain, encoder_offset=offset)[1].loss)
    for done, offset in ((0, -8.0), (3, -2.0)):
        got = soft(done)[1].loss
        np.testing.assert_allclose(got, loss(jnp.float32(offset)), rtol=1e-5)
        assert abs(got - without.loss) > 1e-4 * without.loss
    in_parts = run(dataclasses.replace(plain, encoder_offset=EncoderOffset(-8.0, 4), microbatches=2))(0)[1]
    np.testing.assert_allclose(in_parts.loss, soft(0)[1].loss, rtol=1e-5)


def test_it_may_not_change_on_resume_and_a_run_without_it_has_its_former_fingerprint():
    plain = config_file.load(f"{QUICKSTART}:adapted")
    soft = config_file.load(f"{QUICKSTART}:adapted", ((SETTING, "{'start': -8.0, 'steps': 10}"),))
    with pytest.raises(UserError, match=r"train\.encoder_offset"):
        resume.check_resume(experiments.dump(soft), experiments.dump(plain))
    assert experiments.fingerprint(soft) != experiments.fingerprint(plain)
    # as an earlier version saved it: without the settings that came later
    saved = copy.deepcopy(experiments.dump(plain))
    del saved["train"]["encoder_offset"], saved["init"]["adapt"]["choices"]["encoder_scale"]
    assert resume.check_resume(saved, experiments.dump(plain)) == {}
    assert experiments.build(saved) == plain


def test_evaluations_and_what_is_exported_have_none():
    """A task is given all that it knows by its context, and a model folder by the architecture: neither has it."""
    mesh = sharding.make(MeshShape(), jax.devices()[:1])
    soft, plain = (
        config_file.load(f"{QUICKSTART}:scratch", ((SETTING, text),))
        for text in ("{'start': -8.0, 'steps': 3}", "None")
    )
    plans_of = [plan.make(experiment, mesh) for experiment in (soft, plain)]
    assert plans_of[0].step_options() != plans_of[1].step_options()
    assert plans_of[0].eval_context(range(8)) == plans_of[1].eval_context(range(8))
    assert to_dict(soft.model) == to_dict(plain.model)
