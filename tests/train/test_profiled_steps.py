"""Steps that a trace is written of: how they are named, and that the trace ends with the run."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from t5g2.core.errors import UserError
from t5g2.train.experiment import Train
from t5g2.train.profiled_steps import ProfiledSteps, parse
from t5g2.train.resume import check_resume


def test_the_steps_of_a_trace():
    assert list(parse("10:13", 20)) == [10, 11, 12]
    assert list(parse("1:2", 1)) == [1]
    assert list(parse(" 19:21 ", 20)) == [19, 20]
    assert Train(20).profiled == range(0)
    assert Train(20, profile_steps="4:6").profiled == range(4, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("13:10", "profile_steps = '13:10' has no steps; the second number must be above the first"),
        ("10:10", "has no steps"),
        ("0:3", "starts at step 0; the first step is 1, so start there or later"),
        ("-2:3", "starts at step -2"),
        ("10:22", "ends with step 21 and train.steps = 20; it must be at most 10:21"),
        ("30:31", "ends with step 30 and train.steps = 20; it must be within 1:21"),
        ("10", "profile_steps = '10'; it must be the first step, a colon and the step after the last"),
        ("1:2:3", "a colon and the step after the last: 10:13 are the steps 10, 11 and 12"),
        ("a:b", "profile_steps = 'a:b'; it must be"),
    ],
)
def test_steps_that_a_run_does_not_have(text, message):
    with pytest.raises(UserError) as error:
        Train(20, profile_steps=text)
    assert message in str(error.value)


def test_a_run_may_be_resumed_with_a_trace():
    before, now = ({"train": {"steps": 9, "profile_steps": steps}} for steps in (None, "3:5"))
    assert check_resume(before, now) == {"train.profile_steps": (None, "3:5")}


def test_a_trace_ends_with_the_run_and_is_off_by_default(tmp_path):
    double, x = jax.jit(lambda x: 2 * x), jnp.ones(3)
    for steps, write, files in (
        (range(2, 4), True, 1),
        (range(2, 9), True, 1),
        (range(0), True, 0),
        (range(2, 4), False, 0),
    ):
        workdir = tmp_path / f"{steps}{write}"
        with ProfiledSteps(steps, workdir, contextlib.nullcontext, write=write) as profiled:
            for step in range(1, 5):
                profiled.begin(step, x)
                x = double(x)
                profiled.end(step, x)
        assert len(list(workdir.rglob("*.xplane.pb"))) == files
