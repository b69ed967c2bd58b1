"""The time of a process from its command to its first training step, by part."""

import time
from collections.abc import Callable
from typing import Any

from t5g2.core.logs import log

COMPILED = "/jax/core/compile/backend_compile_duration"  # jax's event, with the seconds of a compilation


class StartUp:
    """Times of parts that follow each other, and in each the time of the compiler, once it is watched.

    >>> seconds = iter([0.0, 1.5, 4.0, 4.25])
    >>> start = StartUp(clock=lambda: next(seconds))
    >>> start.ended("imports"), start.ended("data"), start.ended("imports")
    (None, None, None)
    >>> start.parts
    {'imports': 1.75, 'data': 2.5}
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._last, self._over = clock, clock(), False
        self.parts: dict[str, float] = {}
        self.compiling: dict[str, float] = {}
        self._compiled = 0.0  # seconds since the last part

    def watch_compiler(self) -> None:
        """Counts compilations from now on; imports jax."""
        import jax

        jax.monitoring.register_event_duration_secs_listener(self.event)

    def event(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Takes an event of jax, by its names of the arguments."""
        if event == COMPILED:
            self._compiled += duration_secs

    def ended(self, part: str, result: Any = None) -> None:
        """Adds the time since the last part, until `result` is computed, to this one; nothing after the first step."""
        if self._over:
            return
        if result is not None:
            import jax  # its import is one of the parts

            jax.block_until_ready(result)
        now = self._clock()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self.compiling[part] = self.compiling.get(part, 0.0) + self._compiled
        self._last, self._compiled = now, 0.0

    def first_step(self, result: Any) -> None:
        """Waits for the first step, once, and logs the parts.

        start-up 31.2 s: imports 4.1 s, weights 9.7 s (compiling 5.2 s), …, first step 0.3 s
        """
        if self._over:
            return
        self.ended("first step", result)
        self._over = True
        parts = ", ".join(map(self._in_words, self.parts))
        log.info("start-up %.1f s: %s", sum(self.parts.values()), parts)

    def _in_words(self, part: str) -> str:
        compiling = self.compiling[part]
        return f"{part} {self.parts[part]:.1f} s" + (f" (compiling {compiling:.1f} s)" if compiling >= 0.05 else "")


# of this process, which begins where this file is imported
START_UP = StartUp()
