"""What a run says and records: log lines, metrics.jsonl and TensorBoard events, the progress bar, rates, MFU.

Only process 0 writes; the others keep quiet but for warnings. Everything heavy is imported where it is used.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from t5g2.core.errors import UserError

log = logging.getLogger("t5g2")

# bf16 matmul peak of one device in FLOP/s, dense. TPUs: the numbers MaxText divides by (MaxText README and
# configs/tpu); GPUs: NVIDIA's data sheets, without sparsity. Keys are beginnings of jax's `device_kind`.
NAMED_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def setup(*, process: int = 0) -> None:
    """Sends our log lines to stderr as `12:34:56 text`; other processes than 0 say warnings only, and who they are."""
    handler = _AboveTheBar()
    who = f"[process {process}] " if process else ""
    handler.setFormatter(_Format(f"%(asctime)s {who}%(message)s", datefmt="%H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.WARNING if process else logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax and grain warn of what is none of a user's concern


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


class _AboveTheBar(logging.Handler):
    """Writes lines to the stderr of the moment, and above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(self.format(record), file=sys.stderr)
        else:
            print(self.format(record), file=sys.stderr, flush=True)


class MetricsWriter:
    """Numbers by step: in metrics.jsonl always, in TensorBoard events unless told not to, in Weights & Biases if asked.

    A line of metrics.jsonl is one JSON object: `{"step": 20, "wall": 1714650000.1, "train/loss": 2.5}`; `wall` is in
    seconds since 1970, and a value that is not finite is null. Several lines may hold one step (training, evaluation).

    A run that is resumed at step S leaves the file as if it had never stopped: lines after S are cut off, what was
    written at S stays, and a name that is already there at S is not written a second time. (An evaluation at S comes
    before the checkpoint of S and is repeated after it, a training loss at S is not: both end up there once.)
    A line is one write to the file, so a process that is killed leaves at most one partial line at the end, which is
    dropped here.

    Args:
      folder: the workdir.
      step: the step the run starts from or resumes at.
      tensorboard: also write an event file.
      wandb_project: also log there; the run's id is kept in the workdir, so that a resumed run goes on.
      config: the resolved experiment, for Weights & Biases.

    Raises:
      UserError: a project is named and wandb is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        step: int = 0,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self._resumed_at, self._at_resume = step, set()
        self._sinks: list[Any] = []
        if not is_primary():
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = _cut(folder / "metrics.jsonl", step)
        self._at_resume = {name for row in kept if row["step"] == step for name in row}
        self._sinks = [_Lines(folder / "metrics.jsonl")]
        if tensorboard:
            self._sinks.append(_Events(folder, step))
        if wandb_project is not None:
            self._sinks.append(_WeightsAndBiases(folder, wandb_project, config))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Records scalars at `step`; JAX and NumPy scalars are fetched here."""
        if not self._sinks:
            return
        new = {k: float(v) for k, v in values.items() if step != self._resumed_at or k not in self._at_resume}
        if new:
            wall = round(time.time(), 3)
            for sink in self._sinks:
                sink.write(int(step), wall, new)

    def close(self) -> None:
        """Closes everything; what is written afterwards is dropped."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []


class _Lines:
    """metrics.jsonl, one unbuffered write a line."""

    def __init__(self, path: Path):
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run is

    def write(self, step: int, wall: float, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "wall": wall, **finite}, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


class _Events:
    """A TensorBoard event file. tensorboardX's own writer has a thread and a queue that its flush does not empty."""

    def __init__(self, folder: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._proto: Any = {**vars(event_pb2), **vars(summary_pb2)}  # classes that protobuf makes at import
        # the process id, because a file is named by the second and a rerun may come within it
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
        # TensorBoard forgets what earlier event files hold from this step on
        start = self._proto["SessionLog"](status=self._proto["SessionLog"].START)
        self._writer.write_event(self._proto["Event"](step=step + 1, wall_time=time.time(), session_log=start))

    def write(self, step: int, wall: float, values: Mapping[str, float]) -> None:
        scalars = [self._proto["Summary"].Value(tag=name, simple_value=value) for name, value in values.items()]
        summary = self._proto["Summary"](value=scalars)
        self._writer.write_event(self._proto["Event"](step=step, wall_time=wall, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases; its id is kept in the workdir, so that a resumed run goes on."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any] | None):
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"metrics are to go to the Weights & Biases project {project!r}, but wandb is not installed; "
                f"run `pip install 't5g2[wandb]'`, or name no project"
            ) from None
        file = folder / "wandb_id"
        if not file.exists():
            file.write_text(os.urandom(4).hex())
        settings: dict[str, Any] = {"name": folder.name, "dir": str(folder), "config": config}
        self._run = wandb.init(project=project, id=file.read_text(), resume="allow", **settings)

    def write(self, step: int, wall: float, values: Mapping[str, float]) -> None:
        del wall  # it keeps its own
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def is_primary() -> bool:
    """Whether this process is the one that writes files and speaks."""
    import jax

    return jax.process_index() == 0


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The rows of a metrics.jsonl; lines that are no rows, such as one that is just being written, are left out."""
    return [row for row in map(_parse, Path(path).read_bytes().split(b"\n")) if row is not None]


def _parse(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _cut(path: Path, step: int) -> list[dict]:
    """Leaves in the file only whole rows up to `step`, and returns them; the file is replaced in one go."""
    if not path.exists():
        return []
    data = path.read_bytes()
    lines = [line for line in data.split(b"\n") if line]
    rows = [_parse(line) for line in lines]
    keep = [i for i, row in enumerate(rows) if row is not None and row["step"] <= step]
    text = b"".join(lines[i] + b"\n" for i in keep)
    if text != data:
        if later := sum(row is not None for row in rows) - len(keep):
            log.info("%s: %d lines after step %d are cut off; those steps are run again", path, later, step)
        part = path.with_name(path.name + ".part")
        part.write_bytes(text)
        os.replace(part, path)
    return [row for row in map(_parse, text.split(b"\n")) if row is not None]


class Throughput:
    """Rates between two log points: counts per second of the time that was spent on training.

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
        """Counts per second since the last read, pauses left out; starts anew."""
        totals = {name: sum(float(c) for c in counts) for name, counts in self._counts.items()}
        now = self._clock()
        seconds, self._start, self._counts = max(now - self._start, 1e-9), now, {}
        return {name: total / seconds for name, total in totals.items()}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of the block (an evaluation, a save) is not training time."""
        before = self._clock()
        try:
            yield
        finally:
            self._start += self._clock() - before


class Progress:
    """How far a run is: a bar on a terminal, plain log lines otherwise.

        step 40/250 · loss 2.512 · 12.3k tokens/s · MFU 14.2 % · 1:05 left

    Args:
      total: steps of the whole run.
      step: the step it starts from.
      stream: where the bar goes; it is a bar only if this is a terminal.
    """

    def __init__(self, total: int, *, step: int = 0, stream: TextIO | None = None):
        screen: TextIO = stream or sys.stderr
        self._total, self._first, self._start, self._bar = total, step, time.perf_counter(), None
        if screen.isatty() and is_primary():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=step, unit="step", file=screen, dynamic_ncols=True, leave=True)

    def advance(self, step: int) -> None:
        """Moves the bar to `step`; costs nothing, fetches nothing."""
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
            taken = time.perf_counter() - self._start
            left = taken / max(step - self._first, 1) * (self._total - step)
            log.info("%s", " · ".join([f"step {step}/{self._total}", *parts, f"{duration(left)} left"]))

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def short(number: float) -> str:
    """A number to three digits, as a person reads it: 0.52, 950, 12.3k, 4.2M, 1.1T, 65.9E."""
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}Z"


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss.

    >>> duration(65), duration(3723)
    ('1:05', '1:02:03')
    """
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


class Peak(NamedTuple):
    """What MFU is a share of: FLOP/s of all devices together, and where the number comes from."""

    flops_per_s: float
    source: str


def peak() -> Peak:
    """The peak of all devices of the run: the named bf16 peak where the device is known, otherwise measured."""
    import jax

    devices = jax.devices()
    kind = devices[0].device_kind
    # the longest name first: "TPU v5 lite" also begins with "TPU v5"
    for name in sorted(NAMED_PEAKS, key=len, reverse=True):
        if kind.startswith(name):
            return Peak(NAMED_PEAKS[name] * len(devices), f"named bf16 peak of {len(devices)} x {kind}")
    # the simulated devices of a CPU share its cores: one of them is measured, per process
    count = jax.process_count() if devices[0].platform == "cpu" else len(devices)
    rate = measure_matmul(1024 if devices[0].platform == "cpu" else 8192)
    return Peak(rate * count, f"measured float32 matmul on {count} x {kind}")


def measure_matmul(size: int, repeats: int = 5) -> float:
    """FLOP/s of the fastest of several [size, size] float32 matrix products on the first local device."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
