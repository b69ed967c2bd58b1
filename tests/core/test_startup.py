"""The time of a run up to its first step, by part."""

import numpy as np

from t5g2.core import startup
from t5g2.core.startup import StartUp


def test_parts_are_told_once_and_later_steps_are_none_of_them(monkeypatch):
    lines = []
    monkeypatch.setattr(startup.log, "info", lambda text, *values: lines.append(text % values))
    seconds = iter([0.0, 1.5, 4.0, 4.25, 7.0])
    start = StartUp(clock=lambda: next(seconds))
    start.ended("imports")
    start.event(startup.COMPILED, 0.25, fun_name="step")
    start.event("/jax/core/compile/jaxpr_trace_duration", 9.0)
    start.event(startup.COMPILED, 2.0)
    start.ended("compile")
    start.ended("imports")
    for _ in range(3):  # steps of a loop; the clock is not read after the first
        start.first_step(np.zeros(2))
        start.ended("first batch")
    assert start.parts == {"imports": 1.75, "compile": 2.5, "first step": 2.75}
    assert lines == ["start-up 7.0 s: imports 1.8 s, compile 2.5 s (compiling 2.2 s), first step 2.8 s"]
