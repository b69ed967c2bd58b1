"""Metrics by step: metrics.jsonl, TensorBoard events and Weights & Biases."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from t5g2.core import files
from t5g2.core.logs import log
from t5g2.core.optional import require


def check_outputs(wandb_project: str | None) -> None:
    """Raises UserError if metrics are to go to Weights & Biases and it is not installed; asked before a run begins."""
    if wandb_project is not None:
        _wandb(wandb_project)


def _wandb(project: str) -> Any:
    return require("wandb", "wandb", otherwise=f"name no project (log.wandb = {project!r})")


class MetricsWriter:
    """Writes scalars by step: always to metrics.jsonl, optionally to TensorBoard events and Weights & Biases.

    A line of metrics.jsonl is one JSON object: `{"step": 20, "wall": 1714650000.1, "train/loss": 2.5}`; `wall` is in
    seconds since 1970, a value that is not finite is null, and labels, which are words, are in this file alone. Several
    lines may hold one step (training, evaluation).

    A run that is resumed at step S leaves the file as if it had never stopped: lines after S are cut off, lines of S
    stay, and a name that has a value at S is not written a second time. (An evaluation at S is repeated on a resume,
    the training loss of S is not: the file has both once.) A line is a single write, so a process that is killed leaves
    at most one partial line at the end, which is dropped on the next start.

    Args:
      folder: the workdir.
      step: the step the run starts from or resumes at.
      tensorboard: also write an event file.
      wandb_project: Weights & Biases project to log to as well; its run id is kept in the workdir, so that a resumed
        run continues the same one.
      config: the resolved experiment, for Weights & Biases.

    Raises:
      UserError: `wandb_project` is set and wandb is not installed.
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
        from t5g2.core.distributed import is_primary  # imports jax, which reading metrics does not need

        self._resumed_at, self._at_resume = step, set()
        self._sinks: list[Any] = []
        if not is_primary():
            return
        self._folder = folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept_rows = _cut(folder / "metrics.jsonl", step)
        self._at_resume = {name for row in kept_rows if row["step"] == step for name in row}
        self._sinks = [_Lines(folder / "metrics.jsonl")]
        if tensorboard:
            self._sinks.append(_Events(folder, step))
        if wandb_project is not None:
            self._sinks.append(_WeightsAndBiases(folder, wandb_project, config))

    def write(self, step: int, values: Mapping[str, Any], labels: Mapping[str, str] = MappingProxyType({})) -> None:
        """Records scalars at `step`; JAX and NumPy scalars are fetched here."""
        if not self._sinks:
            return
        unwritten = {k: float(v) for k, v in values.items() if step != self._resumed_at or k not in self._at_resume}
        if unwritten:
            wall = round(time.time(), 3)
            for sink in self._sinks:
                with files.naming(self._folder):
                    words = labels if isinstance(sink, _Lines) else {}
                    sink.write(int(step), wall, {**unwritten, **words})

    def close(self) -> None:
        """Closes all outputs; later writes are dropped."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
    """Lets a library that can do without a module be imported as if that were not installed; one in use stays."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment] - how Python is told that there is none
    try:
        yield
    finally:
        del sys.modules[module]


class _Lines:
    """metrics.jsonl, one unbuffered write per line."""

    def __init__(self, path: Path):
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - stays open during the run

    def write(self, step: int, wall: float, values: Mapping[str, float | str]) -> None:
        finite = {name: x if isinstance(x, str) or math.isfinite(x) else None for name, x in values.items()}
        self._file.write(json.dumps({"step": step, "wall": wall, **finite}, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


class _Events:
    """A TensorBoard event file. tensorboardX's own writer has a thread and a queue that its flush does not empty."""

    def __init__(self, folder: Path, step: int):
        # it would import torch, which takes seconds of every start, to draw what is not drawn here
        with hidden("torch"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2

        self._proto: Any = {**vars(event_pb2), **vars(summary_pb2)}  # classes that protobuf makes at import
        # the process id, because a file is named by the second and a rerun may come within it
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
        # TensorBoard then drops the events of earlier files from this step on
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
    """A run of Weights & Biases; its id is kept in the workdir, so that a resumed run continues it."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any] | None):
        wandb = _wandb(project)
        file = folder / "wandb_id"
        if not file.exists():
            files.write_text(file, os.urandom(4).hex())
        settings: dict[str, Any] = {"name": folder.name, "dir": str(folder), "config": config}
        self._run = wandb.init(project=project, id=file.read_text(), resume="allow", **settings)

    def write(self, step: int, wall: float, values: Mapping[str, float]) -> None:
        del wall  # wandb has its own clock
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """Returns the rows of a metrics.jsonl; lines that are not rows, such as an incomplete last one, are left out."""
    return [row for row in map(_parse, Path(path).read_bytes().split(b"\n")) if row is not None]


def _parse(line: bytes) -> dict | None:
    try:
        row = files.parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None  # True is an int too


def _cut(path: Path, step: int) -> list[dict]:
    """Removes all rows after `step` from the file, atomically; returns the rows that are kept."""
    if not path.exists():
        return []
    data = path.read_bytes()
    lines = [line for line in data.split(b"\n") if line]
    rows = [_parse(line) for line in lines]
    kept = [i for i, row in enumerate(rows) if row is not None and row["step"] <= step]
    text = b"".join(lines[i] + b"\n" for i in kept)
    # an unchanged file is not written, so that starting a run twice at a step does nothing
    if text != data:
        if later := sum(row is not None for row in rows) - len(kept):
            log.info("%s: %d lines after step %d are cut off; those steps are run again", path, later, step)
        with files.replacing(path) as part:
            part.write_bytes(text)
    return [row for row in map(_parse, text.split(b"\n")) if row is not None]
