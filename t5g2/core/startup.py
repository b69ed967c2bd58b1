"""The time of a process from its command to its first training step, by part."""

import time
from collections.abc import Callable
from typing import Any

from t5g2.core.logs import log


class StartUp:
    """Times of parts that follow each other.

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

    def ended(self, part: str, result: Any = None) -> None:
        """Adds the time since the last part, until `result` is computed, to this one; nothing after the first step."""
        if self._over:
            return
        if result is not None:
            import jax  # its import is one of the parts

            jax.block_until_ready(result)
        now = self._clock()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now

    def first_step(self, result: Any) -> None:
        """Waits for the first step, once, and logs: start-up 31.2 s: imports 4.1 s, …, first step 0.3 s."""
        if self._over:
            return
        self.ended("first step", result)
        self._over = True
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.parts.items())
        log.info("start-up %.1f s: %s", sum(self.parts.values()), parts)


# of this process, which begins where this file is imported
START_UP = StartUp()
