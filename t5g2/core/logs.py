"""Log lines, progress bar and rates of a run. Process 0 logs everything, the others only warnings."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from t5g2.core.terminal import escaped

log = logging.getLogger("t5g2")


def setup(*, process: int = 0) -> None:
    """Sends log lines to stderr as `12:34:56 text`; processes other than 0 log warnings only, with their number."""
    handler = _AboveTheBar()
    prefix = f"[process {process}] " if process else ""
    handler.setFormatter(_LineFormatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.WARNING if process else logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax and grain warn of internals


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = escaped(super().format(record))
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


class _AboveTheBar(logging.Handler):
    """Writes lines to sys.stderr as it is at the time of the line, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        # if tqdm is not loaded there is no bar, and importing it would cost every command
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(self.format(record), file=sys.stderr)
        else:
            print(self.format(record), file=sys.stderr, flush=True)


class Throughput:
    """Rates between two log points: counts per second of training time.

    >>> seconds = iter([0.0, 4.0])
    >>> throughput = Throughput(clock=lambda: next(seconds))
    >>> throughput.add(tokens=100, steps=1)
    >>> throughput.add(tokens=300, steps=1)
    >>> throughput.read()
    {'tokens': 100.0, 'steps': 0.5}
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._start = clock()
        self._counts: dict[str, list] = {}

    def add(self, **counts: float) -> None:
        """Adds to the counts by name; they may still be on the device and are fetched by `read`."""
        for name, count in counts.items():
            self._counts.setdefault(name, []).append(count)

    def read(self) -> dict[str, float]:
        """Returns counts per second since the last read, pauses left out, and starts anew."""
        totals = {name: sum(float(c) for c in counts) for name, counts in self._counts.items()}
        now = self._clock()
        seconds, self._start, self._counts = max(now - self._start, 1e-9), now, {}
        return {name: total / seconds for name, total in totals.items()}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock during a block, such as an evaluation or a save."""
        before = self._clock()
        try:
            yield
        finally:
            self._start += self._clock() - before


class Progress:
    """The progress of a run: a bar on a terminal, log lines otherwise.

        step 40/250 · loss 2.512 · 12.3k tokens/s · MFU 14.2 % · 1:05 left

    Args:
      total: steps of the whole run.
      step: the step that the run starts from.
      stream: output of the bar; None = stderr. There is a bar only if it is a terminal.
    """

    def __init__(self, total: int, *, step: int = 0, stream: TextIO | None = None):
        screen: TextIO = stream or sys.stderr
        self._total, self._first, self._start, self._bar = total, step, time.perf_counter(), None
        if screen.isatty():
            from tqdm import tqdm

            from t5g2.core.distributed import is_primary  # imports jax, which formatting numbers does not need

            if is_primary():
                self._bar = tqdm(total=total, initial=step, unit="step", file=screen, dynamic_ncols=True, leave=True)

    def advance(self, step: int) -> None:
        """Moves the bar to `step`; fetches nothing from devices."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def report(
        self, step: int, *, loss: float, tokens_per_s: float, divergence: float | None = None, mfu: float | None = None
    ) -> None:
        """Shows the numbers of a log point; `divergence` is from a teacher, `mfu` a share of 1."""
        parts = [f"loss {loss:.3f}"] + ([f"divergence {divergence:.3f}"] if divergence is not None else [])
        parts += [f"{short(tokens_per_s)} tokens/s"]
        parts += [f"MFU {100 * mfu:.1f} %"] if mfu is not None else []
        if self._bar is not None:
            self._bar.set_postfix_str(" · ".join(parts), refresh=False)
            self.advance(step)
        else:
            elapsed = time.perf_counter() - self._start
            # steps before a resume took none of the elapsed time
            left = elapsed / max(step - self._first, 1) * (self._total - step)
            log.info("%s", " · ".join([f"step {step}/{self._total}", *parts, f"{duration(left)} left"]))

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class TaskProgress:
    """The progress of an evaluation task: a bar on a terminal, nothing otherwise.

    Args:
      name: of the task, in front of the bar.
      stream: output of the bar; None = stderr.
    """

    def __init__(self, name: str, *, stream: TextIO | None = None):
        self._name, self._screen, self._bar = name, stream or sys.stderr, None

    def __enter__(self) -> "TaskProgress":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, examples: int, total: int) -> None:
        """Moves the bar by some examples of `total`."""
        if self._bar is None and self._screen.isatty():
            from tqdm import tqdm

            name = escaped(self._name)
            self._bar = tqdm(total=total, desc=name, unit="example", file=self._screen, dynamic_ncols=True, leave=False)
        if self._bar is not None:
            self._bar.update(examples)


def short(number: float) -> str:
    """Returns a number to three digits with a unit prefix: 0.52, 950, 12.3k, 4.2M, 1.1T, 65.9E."""
    # 999.5 would round to 1000, which is 1 of the next unit
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}Z"


def duration(seconds: float) -> str:
    """Returns seconds as m:ss or h:mm:ss.

    >>> duration(65), duration(3723)
    ('1:05', '1:02:03')
    """
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
