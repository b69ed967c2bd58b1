"""The report of a run or of a sweep: one self-contained page, the numbers as csv, one table.

It reads files only, whatever is there of them: sweep.json; of each run metrics.jsonl, experiment.json, provenance.json
(of the run or of its model folder), samples/*.jsonl and done.json. What is missing is said on the page.
"""

import csv
import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from t5g2.core import logs, settings
from t5g2.core.errors import UserError

NONE = "–"
COLORS = ("#3b78b8", "#d9773c", "#4d9a6c", "#9469a8", "#b19a35", "#4fa3b5", "#c2607c", "#7d8794")


@dataclass(frozen=True, eq=False)
class Run:
    """What the workdir of one run holds; None or empty = the file is not there (yet).

    Attributes:
      name: how it is called in tables and plots.
      color: of its curves, everywhere.
      rows: of metrics.jsonl.
      experiment: of experiment.json.
      provenance: of provenance.json.
      samples: of the newest file under samples/.
      done: whether the trainer has finished.
    """

    name: str
    color: str
    rows: list[dict]
    experiment: dict | None
    provenance: Any
    samples: list[dict]
    done: bool

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric, in the order of the steps; the last row of a step counts, null is left out."""
        points = {row["step"]: row[metric] for row in self.rows if row.get(metric) is not None}
        steps = sorted(points)
        return steps, [points[step] for step in steps]

    def at_start(self, metric: str) -> float | None:
        """The value at step 0, before the first update; None = it was not measured then, but later if at all."""
        return dict(zip(*self.series(metric), strict=True)).get(0)

    def last(self, metric: str) -> float | None:
        """The value at the last step that has one."""
        return next(reversed(self.series(metric)[1]), None)

    def median(self, metric: str) -> float | None:
        """The median over the steps, which the compilation at the first one does not move."""
        values = self.series(metric)[1]
        return statistics.median(values) if values else None

    @property
    def step(self) -> int | None:
        """The last step that anything was recorded at."""
        return max((row["step"] for row in self.rows), default=None)

    @property
    def seconds(self) -> float | None:
        """From the first row to the last, leaving out gaps of over ten minutes: there the run was stopped."""
        walls = [row["wall"] for row in self.rows if "wall" in row]
        gaps = [b - a for a, b in pairwise(walls)]
        return sum(gap for gap in gaps if 0 <= gap < 600) if gaps else None


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that the page shows.

    Attributes:
      title: heading.
      folder: the workdir.
      runs: all runs.
      compare: the names of those drawn together.
      sweep: sweep.json, None for a single run.
    """

    title: str
    folder: Path
    runs: list[Run]
    compare: list[str]
    sweep: dict | None = None

    @property
    def compared(self) -> list[Run]:
        """The runs that are drawn together."""
        return [run for run in self.runs if run.name in self.compare]

    def tasks(self, runs: Iterable[Run] | None = None) -> dict[str, list[str]]:
        """{task: its denoisers} of the held-out losses that the runs recorded, eval/<task>/loss[/<denoiser>]."""
        found: dict[str, list[str]] = {}
        for run in self.runs if runs is None else runs:
            for metric in dict.fromkeys(name for row in run.rows for name in row):
                parts = metric.split("/")
                if parts[0] == "eval" and len(parts) in (3, 4) and parts[2] == "loss":
                    denoisers = found.setdefault(parts[1], [])
                    if len(parts) == 4 and parts[3] not in denoisers:
                        denoisers.append(parts[3])
        return found


class Table(NamedTuple):
    """Text in columns; the first holds names, the others numbers."""

    columns: list[str]
    rows: list[list[str]]

    def lines(self) -> list[str]:
        """The table as Markdown that is also aligned for a terminal."""
        cells = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        return [
            "| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |"
            for row in (self.columns, rule, *self.rows)
        ]


def write(workdir: str | os.PathLike) -> Path:
    """Writes report/index.html, report/metrics.csv and report/table.md; prints the table and the page's path.

    Raises:
      UserError: the folder holds neither a run nor a sweep.
    """
    from t5g2 import report_page

    report = read(Path(workdir))
    out = report.folder / "report"
    out.mkdir(exist_ok=True)
    table = summary(report)
    _replace(out / "index.html", report_page.render(report, table))
    _replace(out / "table.md", "\n".join(table.lines()) + "\n")
    with open(out / "metrics.csv.part", "w", newline="") as file:
        csv.writer(file).writerows([("run", "step", "wall", "metric", "value"), *_points(report.runs)])
    os.replace(out / "metrics.csv.part", out / "metrics.csv")
    print("\n".join(["", *table.lines(), "", f"report: {out / 'index.html'}"]), flush=True)
    return out / "index.html"


def read(folder: Path) -> Report:
    """What a workdir holds. Raises UserError if it is neither that of a run nor that of a sweep."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give the --workdir of a run or of a sweep")
    sweep = _read_json(folder / "sweep.json")
    if sweep is not None:
        names = [part["name"] for part in sweep["parts"] if part["kind"] == "variant"]
        compare = sweep["compare"] or names
        colors = dict(zip([*compare, *(name for name in names if name not in compare)], cycle(COLORS), strict=False))
        runs = [read_run(folder / name, name, color=colors[name]) for name in names]
        return Report(sweep["title"], folder, runs, compare, sweep)
    if not ((folder / "metrics.jsonl").exists() or (folder / "experiment.json").exists()):
        raise UserError(
            f"{folder} is no workdir: it has neither metrics.jsonl nor experiment.json (a run) nor sweep.json (a "
            f"sweep); give the --workdir of `t5g2 train` or `t5g2 sweep`"
        )
    name = folder.resolve().name
    return Report(name, folder, [read_run(folder, name)], [name])


def read_run(folder: Path, name: str, *, color: str = COLORS[0]) -> Run:
    """The run in a folder, which may lack any of its files or not exist."""
    metrics, provenance = folder / "metrics.jsonl", _read_json(folder / "provenance.json")
    samples = sorted((folder / "samples").glob("*.jsonl"), key=lambda path: (len(path.stem), path.stem))  # by step
    return Run(
        name=name,
        color=color,
        rows=logs.read_metrics(metrics) if metrics.exists() else [],
        experiment=_read_json(folder / "experiment.json"),
        provenance=provenance if provenance is not None else _read_json(folder / "model" / "provenance.json"),
        samples=_read_lines(samples[-1]) if samples else [],
        done=(folder / "done.json").exists(),
    )


def summary(report: Report) -> Table:
    """Where the held-out loss began and where it ended, over all and per denoiser, and what it took.

    A column a run as long as they fit a terminal, otherwise a row a run.
    """
    facts: list[tuple[str, Callable[[Run], str]]] = [
        ("state", state),
        ("step", lambda run: NONE if run.step is None else str(run.step)),
    ]
    tasks = report.tasks()
    for task, denoisers in tasks.items():
        of = "held-out loss" if task == "heldout" else f"{task} loss"
        metric = f"eval/{task}/loss"
        facts.append((f"{of} at start", lambda run, m=metric: number(run.at_start(m))))
        facts.append((f"{of} at end", lambda run, m=metric: number(run.last(m))))
        for name in denoisers:
            facts.append((f"· {name}", lambda run, m=f"{metric}/{name}": number(run.last(m))))
    facts += [
        ("train loss at end", lambda run: number(run.last("train/loss"))),
        ("tokens/s", lambda run: amount(run.median("tokens_per_s"))),
        ("MFU", lambda run: percent(run.median("mfu"))),
        ("padding, encoder", lambda run: percent(run.median("padding/encoder"))),
        ("padding, decoder", lambda run: percent(run.median("padding/decoder"))),
        ("memory of a device, GiB", lambda run: number(run.last("memory/device_gib"), 2)),
        ("memory of the process, GiB", lambda run: number(run.last("memory/host_gib"), 2)),
        ("time", lambda run: NONE if run.seconds is None else logs.duration(run.seconds)),
    ]
    cells = [[title, *(fact(run) for run in report.runs)] for title, fact in facts]
    cells = [row for row in cells if set(row[1:]) != {NONE} or row[0].endswith("end")]
    if len(report.runs) > 5:
        first, *rest = zip(["run", *(run.name for run in report.runs)], *cells, strict=True)
        return Table(list(first), [list(row) for row in rest])
    return Table(["", *(run.name for run in report.runs)], cells)


def state(run: Run) -> str:
    """Done, stopped or running (nobody can tell which from the files), or not started."""
    return "done" if run.done else "not started" if run.step is None else "unfinished"


def number(value: float | None, digits: int = 3) -> str:
    """A number with that many digits after the point."""
    return NONE if value is None else f"{value:.{digits}f}"


def amount(value: float | None) -> str:
    """A large number to three digits: 12.3k."""
    return NONE if value is None else logs.short(value)


def percent(share: float | None) -> str:
    """A share of 1 in percent."""
    return NONE if share is None else f"{100 * share:.1f} %"


def different_settings(runs: Sequence[Run]) -> Table:
    """The settings in which the runs differ, one column a run."""
    flat = [settings.flatten(run.experiment) if run.experiment else {} for run in runs]
    paths = sorted({path for of in flat for path in of})
    differ = [path for path in paths if len({json.dumps(of.get(path, NONE)) for of in flat}) > 1]
    rows = [[path, *(_plain(of[path]) if path in of else NONE for of in flat)] for path in differ]
    return Table(["setting", *(run.name for run in runs)], rows)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _points(runs: Iterable[Run]) -> Iterable[tuple]:
    for run in runs:
        for row in run.rows:
            for metric, value in row.items():
                if metric not in ("step", "wall"):
                    yield run.name, row["step"], row.get("wall"), metric, value


def _read_json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is no JSON ({error}); it is damaged: remove it and run the command that made it"
        ) from None


def _read_lines(path: Path) -> list[dict]:
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # being written, or cut off
            continue
    return [line for line in lines if isinstance(line, dict)]


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
