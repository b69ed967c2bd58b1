"""The loop of a run: steps follow each other without a transfer, a compilation or a wait that is not needed."""

import jax
import pytest

from t5g2 import cli
from t5g2.train.plan import Plan
from t5g2.train.recorder import Recorder
from tests.e2e.conftest import CONFIG

STEPS = 7
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.mark.long
def test_steps_follow_each_other(corpus, one_device, tmp_path, capsys, monkeypatch):
    """From the second step to the last: no implicit transfer, no compilation, metrics one step late; and a trace of two
    steps in the workdir.
    """
    events, inside = [], []
    compile_step, record = Plan.compile, Recorder._record

    def compile_watched(plan):
        compiled, step = compile_step(plan), 0

        def update(*arguments):
            nonlocal step
            step += 1
            events.append(f"step {step}")
            result = compiled(*arguments)
            # the loop's own part between two steps is watched too
            if step == 1:
                jax.config.update("jax_transfer_guard", "disallow")
                inside.append(True)
            if step == STEPS:
                jax.config.update("jax_transfer_guard", "allow")
                inside.clear()
            return result

        return update

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        if inside and event == COMPILED:
            events.append("compiled")

    def record_watched(self, step, *rest):
        events.append(f"recorded {step}")
        record(self, step, *rest)

    def begin(*arguments, start=jax.profiler.start_trace):
        events.append("trace begins")
        start(*arguments)

    def end(stop=jax.profiler.stop_trace):
        events.append("trace ends")
        stop()

    monkeypatch.setattr(jax.profiler, "start_trace", begin)
    monkeypatch.setattr(jax.profiler, "stop_trace", end)
    monkeypatch.setattr(Plan, "compile", compile_watched)
    monkeypatch.setattr(Recorder, "_record", record_watched)
    jax.monitoring.register_event_duration_secs_listener(count)
    settings = [f"train.steps={STEPS}", "train.profile_steps=3:5", "save.every_steps=0", "log.every_steps=1"]
    changes = [f"--config.{setting}" for setting in (*settings, "save.model=False")]
    try:
        arguments = ["train", f"--config={CONFIG}:source@{corpus}", f"--workdir={tmp_path / 'run'}", *changes]
        assert cli.main(arguments) == 0
    finally:
        jax.config.update("jax_transfer_guard", "allow")
        jax.monitoring.unregister_event_duration_listener(count)
    wanted = ["step 1", "step 2", "recorded 1"]
    # beginning and writing the trace is no step's time: the steps before are recorded first
    wanted += ["recorded 2", "trace begins", "step 3", "step 4", "recorded 3", "recorded 4", "trace ends", "step 5"]
    wanted += [event for step in range(6, STEPS + 1) for event in (f"step {step}", f"recorded {step - 1}")]
    assert events == [*wanted, f"recorded {STEPS}"]
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1
    folder = tmp_path / "run" / "profile"
    assert f"profile of the steps 3 to 4: {folder}; to see it: pip install xprof" in capsys.readouterr().err
