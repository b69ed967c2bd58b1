"""A trace of some steps of a run, for xprof and TensorBoard.

Process 0 alone writes one: its devices do what all others do, and the viewer shows one host at a time. The trace has
the programs' operations with their named scopes (core/scopes.py), and what the host did meanwhile.
"""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from t5g2.core.errors import UserError
from t5g2.core.logs import log

FOLDER = "profile"  # in the workdir


def parse(text: str, steps: int) -> range:
    """Returns the steps that `text` names: "10:13" are the updates 10, 11 and 12, the first update being 1.

    Raises:
      UserError: not two whole numbers, none between them, or steps that a run of so many does not have.
    """
    form = "the first step, a colon and the step after the last: 10:13 are the steps 10, 11 and 12"
    match = re.fullmatch(r"(-?\d+):(-?\d+)", text.strip())
    if match is None:
        raise UserError(f"profile_steps = {text!r}; it must be {form}")
    first, end = int(match[1]), int(match[2])
    if first < 1:
        raise UserError(
            f"profile_steps = {text!r} starts at step {first}; the first step is 1, so start there or later"
        )
    if end <= first:
        raise UserError(f"profile_steps = {text!r} has no steps; the second number must be above the first: {form}")
    if end - 1 > steps:
        allowed = f"at most {first}:{steps + 1}" if first <= steps else f"within 1:{steps + 1}"
        raise UserError(
            f"profile_steps = {text!r} ends with step {end - 1} and train.steps = {steps}; it must be {allowed}"
        )
    return range(first, end)


class ProfiledSteps(contextlib.AbstractContextManager):
    """Starts the trace before the first of the steps, and ends it when the last is done, or with the run.

    Args:
      steps: as from `parse`; none = no trace.
      workdir: the trace is written into a folder in it.
      pause: records the step before, and returns a context whose time is not that of a step: what it takes to begin and
        to write a trace.
      write: False = no trace.
    """

    def __init__(
        self, steps: range, workdir: Path, pause: Callable[[], contextlib.AbstractContextManager], *, write: bool = True
    ):
        self._steps = steps if write and jax.process_index() == 0 else range(0)
        self._folder, self._pause, self._tracing = workdir / FOLDER, pause, False

    def __exit__(self, *_: object) -> None:
        self._end()

    def begin(self, step: int, state: Any) -> None:
        """Starts the trace if `step` is the next, once `state`, the steps before, is computed."""
        if step in self._steps and not self._tracing:
            with self._pause():
                jax.block_until_ready(state)
                jax.profiler.start_trace(self._folder)
            self._tracing = True

    def end(self, step: int, state: Any) -> None:
        """Ends the trace after the last step, once `state`, its result, is computed."""
        if self._tracing and step + 1 not in self._steps:
            with self._pause():
                jax.block_until_ready(state)
                self._end()

    def _end(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            log.info(
                "profile of the steps %d to %d: %s; to see it: pip install xprof, then xprof --logdir=%s",
                self._steps[0],
                self._steps[-1],
                self._folder,
                self._folder,
            )
