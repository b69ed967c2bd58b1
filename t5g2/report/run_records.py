"""Runs as the report reads them: one run, and the runs of one variant under several seeds."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from statistics import median as median_of
from typing import Any

from t5g2.report import heldout_tasks, record_files, statistics
from t5g2.report.statistics import Estimate, estimate

COLORS = ("#3b78b8", "#d9773c", "#4d9a6c", "#9469a8", "#b19a35", "#4fa3b5", "#c2607c", "#7d8794")


@dataclass(frozen=True, eq=False)
class RunRecord:
    """The files of one run's workdir; None or empty = the file does not exist (yet), or cannot be read.

    Attributes:
      name: name in tables and plots.
      color: colour of the curves, in every plot.
      rows: lines of metrics.jsonl.
      experiment: content of experiment.json.
      provenance: content of provenance.json.
      samples: lines of the newest file under samples/.
      done: True if the trainer has finished.
      seed: seed of the run, if there are several under different seeds.
      claimed: True if a trainer holds its folder, or held it when it was killed.
      first: the run whose whole state it took over (init.resume), if its records are there and end where this begins.
      problems: a line for each thing that cannot be read.
    """

    name: str
    color: str
    rows: list[dict]
    experiment: dict | None
    provenance: Any
    samples: list[dict]
    done: bool
    seed: int | None = None
    claimed: bool = False
    first: "RunRecord | None" = None
    problems: tuple[str, ...] = ()

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Returns (steps, values) of a metric in the order of steps; a step's last row counts, null is left out."""
        points = self.points(metric)
        return list(points), list(points.values())

    def points(self, metric: str) -> dict[int, float]:
        """Returns {step: value} of a metric."""
        # of several rows of a step, the last that has the metric counts
        points = {row["step"]: row[metric] for row in self.rows if record_files.is_number(row.get(metric))}
        return {step: points[step] for step in sorted(points)}

    def at_start(self, metric: str) -> float | None:
        """Returns the value at step 0, before the first update; None = it was not measured then."""
        return self.points(metric).get(0)

    def last(self, metric: str) -> float | None:
        """Returns the value at the last step that has one."""
        return next(reversed(self.series(metric)[1]), None)

    def median(self, metric: str) -> float | None:
        """Returns the median over the steps, on which the compilation at the first step has no influence."""
        values = self.series(metric)[1]
        return median_of(values) if values else None

    def tokens(self, steps: Iterable[int]) -> list[float] | None:
        """Returns trained tokens, encoder and decoder together, after each of these steps; None = none were logged.

        Those of `first` are among them. A resumed run without it begins to count at the first step that it logged.
        """
        return self._totals(steps, lambda run: run.points("train/tokens"))

    def flops(self, steps: Iterable[int]) -> list[float] | None:
        """Returns the FLOPs of training, forward and backward, after each of these steps, counted as `tokens` are."""

        def of_a_step(run: RunRecord) -> dict[int, float]:
            rates, per_second = run.points("flops_per_s"), run.points("steps_per_s")
            return {step: rate / per_second[step] for step, rate in rates.items() if per_second.get(step)}

        return self._totals(steps, of_a_step)

    def _totals(self, steps: Iterable[int], logged: "Callable[[RunRecord], dict[int, float]]") -> list[float] | None:
        own = logged(self)
        start, before = 0, None
        if self.first is not None and self.first.step is not None:
            start, before = self.first.step, self.first._totals([self.first.step], logged)
        if own and self.resumed is not None and before is None:
            # how many steps it took before this one, and how large, is not known
            start = min(own) - 1
        totals = statistics.totals_at(list(steps), own, start=start)
        return None if totals is None else [total + (before[0] if before else 0.0) for total in totals]

    @property
    def resumed(self) -> str | None:
        """The workdir of the run whose state it took over; None = it began by itself."""
        init = (self.experiment or {}).get("init")
        workdir = init.get("resume") if isinstance(init, dict) else None
        return workdir if isinstance(workdir, str) and workdir else None

    @property
    def counted_from(self) -> str:
        """Says what its tokens are counted from, where that is not its own first update: "since step 114"."""
        if self.resumed is None:
            return ""
        if self.first is not None and self.first.points("train/tokens"):
            # of several seeds, each has taken over the run of its own
            return f"with those of {Path(self.resumed).name.removesuffix(f'-s{self.seed}')}"
        logged = self.points("train/tokens")
        return f"since step {min(logged)}" if logged else ""

    @property
    def batches(self) -> dict[int, str]:
        """{step: hash of the examples of its batch}; empty for runs of versions that did not write it."""
        return {row["step"]: row["data/batch"] for row in self.rows if isinstance(row.get("data/batch"), str)}

    @property
    def metrics(self) -> list[str]:
        """The names of all recorded metrics."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name not in ("step", "wall")))

    @property
    def step(self) -> int | None:
        """The last step with a recorded metric."""
        return max((row["step"] for row in self.rows), default=None)

    @property
    def seconds(self) -> float | None:
        """Time from the first row to the last, without gaps of over ten minutes, in which the run was not running."""
        walls = [row["wall"] for row in self.rows if "wall" in row]
        gaps = [b - a for a, b in pairwise(walls)]
        return sum(gap for gap in gaps if 0 <= gap < 600) if gaps else None


# what a run has used up after steps, such as RunRecord.tokens
Amount = Callable[[RunRecord, list[int]], list[float] | None]


@dataclass(frozen=True, eq=False)
class RunGroup:
    """The runs of one variant, under several seeds or a single one.

    Attributes:
      name: name of the variant.
      color: colour of the runs.
      runs: one per seed, complete or not.
    """

    name: str
    color: str
    runs: list[RunRecord]

    @property
    def has_seeds(self) -> bool:
        """True if the runs have seeds."""
        return any(run.seed is not None for run in self.runs)

    @property
    def counted(self) -> list[RunRecord]:
        """The runs that means are taken over: those that are done, or, while none is, those that have started."""
        return [run for run in self.runs if run.done] or [run for run in self.runs if run.rows]

    @property
    def metrics(self) -> list[str]:
        """The names of all recorded metrics."""
        return list(dict.fromkeys(name for run in self.runs for name in run.metrics))

    def asks_as(self, other: "RunGroup", metric: str) -> bool:
        """True if a metric is of the same held-out task in both groups, or one has recorded no settings of it."""
        own, others = (
            next((task for run in group.runs if (task := heldout_tasks.asked(run.experiment, metric))), None)
            for group in (self, other)
        )
        return heldout_tasks.equal(own, others)

    def by_seed(self, metric: str, step: int) -> dict[int | None, float]:
        """Returns {seed: value at a step} of the counted runs."""
        values = {run.seed: run.points(metric).get(step) for run in self.counted}
        return {seed: value for seed, value in values.items() if value is not None}

    def steps(self, metric: str) -> list[int]:
        """Returns the steps at which every counted run has the metric."""
        # a mean over fewer runs would jump where a run starts or ends
        every = [set(run.points(metric)) for run in self.counted]
        return sorted(set.intersection(*every)) if every else []

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Returns (steps, means) of a metric, at the steps at which every counted run has it."""
        steps = self.steps(metric)
        points = [run.points(metric) for run in self.counted]
        return steps, [fmean(values[step] for values in points) for step in steps]

    def total(self, amount: Amount, steps: Iterable[int]) -> list[float] | None:
        """Returns the means of an amount after each of these steps; None where a counted run has not logged it."""
        of_runs = [amount(run, list(steps)) for run in self.counted]
        totals = [values for values in of_runs if values is not None]
        return None if not totals or len(totals) < len(of_runs) else [fmean(values) for values in zip(*totals)]

    def ends(self, metric: str) -> dict[int | None, float]:
        """Returns {seed: last value} of the counted runs."""
        values = {run.seed: run.last(metric) for run in self.counted}
        return {seed: value for seed, value in values.items() if value is not None}

    def at(self, metric: str, step: int | None) -> Estimate | None:
        """Returns mean and interval at a step; None = no counted run has it there."""
        return None if step is None else estimate(list(self.by_seed(metric, step).values()))

    def last_step(self, metric: str) -> int | None:
        """Returns the last step at which every counted run has the metric."""
        return next(reversed(self.steps(metric)), None)


def read_run(
    folder: Path, name: str, *, color: str = COLORS[0], seed: int | None = None, evaluations: Iterable[Path] = ()
) -> RunRecord:
    """Returns the run in a folder, which may lack any of its files or not exist.

    Args:
      evaluations: folders of `t5g2 evaluate`, whose scores are metrics of the last step.
    """
    run = _read_alone(folder, name, color, seed, evaluations)
    return replace(run, first=_first_run(folder, run, {folder.resolve()}))


def _read_alone(
    folder: Path, name: str, color: str = COLORS[0], seed: int | None = None, evaluations: Iterable[Path] = ()
) -> RunRecord:
    problems: list[str] = []
    rows = record_files.read_lines(folder / "metrics.jsonl", record_files.metrics_row, problems)
    last = max((row["step"] for row in rows), default=0)
    for scores in evaluations:
        values = record_files.read_object(scores / "scores.json", record_files.scores_of_model, problems)
        rows += [] if values is None else [{"step": last, **{f"eval/{name}": value for name, value in values.items()}}]
    experiment = record_files.read_object(folder / "experiment.json", dict, problems)
    samples = sorted((folder / "samples").glob("*.jsonl"), key=lambda path: (len(path.stem), path.stem))  # by step
    provenance = [folder / "provenance.json", folder / "model" / "provenance.json"]
    origins = (record_files.read_object(path, record_files.origin, problems) for path in provenance)
    return RunRecord(
        name=name,
        color=color,
        rows=rows,
        experiment=experiment,
        provenance=next((origin for origin in origins if origin is not None), None),
        samples=record_files.read_lines(samples[-1], dict, problems) if samples else [],
        done=record_files.read_object(folder / "done.json", record_files.done_mark, problems) is not None,
        claimed=(folder / ".lock").exists(),
        seed=seed,
        problems=tuple(problems),
    )


def _first_run(folder: Path, run: RunRecord, passed: set[Path]) -> RunRecord | None:
    """Returns the run whose state another one took over; None if its records do not tell what was done until then."""
    workdir = Path(os.path.expanduser(run.resumed or ""))
    if not workdir.name:
        return None
    # a sweep may have been moved as a whole
    found = next((path for path in (workdir, folder.with_name(workdir.name)) if _is_recorded(path)), None)
    if found is None or found.resolve() in passed:
        return None
    first, begins = _read_alone(found, workdir.name), min((row["step"] for row in run.rows), default=None)
    # one that has not ended, or went on after it was taken over, has rows that this one does not stand on
    if not first.done or first.step is None or begins is None or first.step > begins:
        return None
    return replace(first, first=_first_run(found, first, passed | {found.resolve()}))


def _is_recorded(workdir: Path) -> bool:
    return (workdir / "metrics.jsonl").is_file()
