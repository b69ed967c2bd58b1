"""The tables of a report: runs, means over seeds, different settings."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from t5g2.core import logs, settings
from t5g2.report.contents import Report
from t5g2.report.run_records import RunGroup, RunRecord
from t5g2.report.statistics import estimate
from t5g2.report.text_table import NONE, TextTable, amount, score

MEANS = "mean ± half of its 95 % interval over seeds, t(n - 1) s / sqrt(n); differences by seed"


@dataclass(frozen=True)
class TableRow:
    """One row of the tables of runs and of groups.

    Attributes:
      title: title of the row.
      read: run -> value; None = not recorded.
      format: value -> text.
      interval: True for results, which have an interval over seeds.
    """

    title: str
    read: Callable[[RunRecord], float | None]
    format: Callable[[float | None], str]
    interval: bool = False

    def group_text(self, group: RunGroup) -> str:
        """Returns the mean over a group's seeds as text."""
        mean = estimate([value for run in group.counted if (value := self.read(run)) is not None])
        if mean is None:
            return NONE
        return mean.text(self.format) if self.interval else self.format(mean.mean)


def summary(report: Report) -> TextTable:
    """Returns held-out losses at start and end, over all and per denoiser, speed and memory of every run.

    One column per run while they fit a terminal, otherwise one row per run.
    """
    cells = [
        ["state", *map(state, report.runs)],
        ["step", *(NONE if run.step is None else str(run.step) for run in report.runs)],
        *([row.title, *(row.format(row.read(run)) for run in report.runs)] for row in table_rows(report)),
    ]
    return _layout("run", [run.name for run in report.runs], cells)


def over_seeds(report: Report) -> TextTable:
    """Returns the rows of `summary` for each variant: means over its seeds, results with 95 % intervals."""
    groups = report.groups
    cells = [
        ["seeds", *(f"{len(group.counted)} of {len(group.runs)}" for group in groups)],
        *([row.title, *(row.group_text(group) for group in groups)] for row in table_rows(report)),
    ]
    return _layout("variant", [group.name for group in groups], cells)


def table_rows(report: Report) -> list[TableRow]:
    """Returns the rows of the tables; those without a value in any run are removed by the layout."""
    rows = []
    for task, denoisers in report.tasks().items():
        label = "held-out loss" if task == "heldout" else f"{task} loss"
        metric = f"eval/{task}/loss"
        rows.append(TableRow(f"{label} at start", lambda run, m=metric: run.at_start(m), number, interval=True))
        rows.append(TableRow(f"{label} at end", lambda run, m=metric: run.last(m), number, interval=True))
        single = all(len(names) < 2 for group in report.groups for names in report.tasks([group]).values())
        for name in () if single else denoisers:  # a single denoiser is the mean itself
            rows.append(TableRow(f"· {name}", lambda run, m=f"{metric}/{name}": run.last(m), number, interval=True))
    for name in report.scores():
        rows.append(TableRow(f"{name} at end", lambda run, m=f"eval/{name}": run.last(m), score_text, interval=True))
    # medians for speed, because compiling and evaluating slow single steps; last values for memory, a peak
    return [
        *rows,
        TableRow("train loss at end", lambda run: run.last("train/loss"), number, interval=True),
        TableRow("tokens/s", lambda run: run.median("tokens_per_s"), large),
        TableRow("MFU", lambda run: run.median("mfu"), percent),
        TableRow("padding, encoder", lambda run: run.median("padding/encoder"), percent),
        TableRow("padding, decoder", lambda run: run.median("padding/decoder"), percent),
        TableRow("memory of a device, GiB", lambda run: run.last("memory/device_gib"), lambda value: number(value, 2)),
        TableRow("memory of the process, GiB", lambda run: run.last("memory/host_gib"), lambda value: number(value, 2)),
        TableRow("time", lambda run: run.seconds, lambda value: NONE if value is None else logs.duration(value)),
    ]


def _layout(corner: str, names: list[str], cells: list[list[str]]) -> TextTable:
    """Returns a table with one column per name, or one row if there are many.

    Rows without a value are left out, except final losses.
    """
    cells = [row for row in cells if set(row[1:]) != {NONE} or row[0].endswith("end")]
    # more columns would not fit a terminal
    if len(names) > 5:
        first, *rest = zip([corner, *names], *cells, strict=True)
        return TextTable(list(first), [list(row) for row in rest])
    return TextTable(["", *names], cells)


def state(run: RunRecord) -> str:
    """Returns the state of a run: done, unfinished (stopped or running: the files do not tell), starting (it has no
    step yet), or not started.
    """
    if run.done or run.step is not None:
        return "done" if run.done else "unfinished"
    return "starting" if run.claimed else "not started"


def number(value: float | None, digits: int = 3) -> str:
    """Formats a number with that many digits after the point."""
    return NONE if value is None else f"{value:.{digits}f}"


def score_text(value: float | None) -> str:
    """Formats a score of any size."""
    return NONE if value is None else score(value)


def large(value: float | None) -> str:
    """Formats a large number to three digits: 12.3k."""
    return NONE if value is None else amount(value)


def percent(share: float | None) -> str:
    """Formats a share (1 = all) in percent."""
    return NONE if share is None else f"{100 * share:.1f} %"


def different_settings(runs: Sequence[RunRecord]) -> TextTable:
    """Returns the settings in which the runs differ, one column per run."""
    flat = [settings.flatten(run.experiment) if run.experiment else {} for run in runs]
    paths = sorted({path for node in flat for path in node})
    # a setting that a run lacks counts as a value of its own
    differ = [path for path in paths if len({json.dumps(node.get(path, NONE)) for node in flat}) > 1]
    rows = [[path, *(_as_text(node[path]) if path in node else NONE for node in flat)] for path in differ]
    return TextTable(["setting", *(run.name for run in runs)], rows)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
