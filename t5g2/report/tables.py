"""The tables of a report: runs, means over seeds, different settings."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from t5g2.core import logs, settings
from t5g2.report.contents import Report
from t5g2.report.run_records import RunGroup, RunRecord
from t5g2.report.statistics import estimate
from t5g2.report.text_table import NONE, TextTable, amount

MEANS = "mean ± half of its 95 % interval over seeds, t(n - 1) s / sqrt(n); differences by seed"


@dataclass(frozen=True)
class Metric:
    """A row of the tables of runs and of groups.

    Attributes:
      title: of the row.
      read: the value of a run.
      spell: the value as text.
      interval: whether it is a result, whose interval over seeds is shown.
    """

    title: str
    read: Callable[[RunRecord], float | None]
    spell: Callable[[float | None], str]
    interval: bool = False

    def of_group(self, group: RunGroup) -> str:
        """The mean over seeds."""
        mean = estimate([value for run in group.counted if (value := self.read(run)) is not None])
        if mean is None:
            return NONE
        return mean.text(self.spell) if self.interval else self.spell(mean.mean)


def summary(report: Report) -> TextTable:
    """A run's held-out losses, where they began and ended, over all and per denoiser, and what it took.

    A column a run as long as they fit a terminal, otherwise a row a run.
    """
    cells = [
        ["state", *map(state, report.runs)],
        ["step", *(NONE if run.step is None else str(run.step) for run in report.runs)],
        *([fact.title, *(fact.spell(fact.read(run)) for run in report.runs)] for fact in metrics(report)),
    ]
    return _layout("run", [run.name for run in report.runs], cells)


def over_seeds(report: Report) -> TextTable:
    """The same for each variant, as means over its seeds; results with 95 % intervals."""
    groups = report.groups
    cells = [
        ["seeds", *(f"{len(group.counted)} of {len(group.runs)}" for group in groups)],
        *([fact.title, *(fact.of_group(group) for group in groups)] for fact in metrics(report)),
    ]
    return _layout("variant", [group.name for group in groups], cells)


def metrics(report: Report) -> list[Metric]:
    """What the tables show."""
    found = []
    for task, denoisers in report.tasks().items():
        of = "held-out loss" if task == "heldout" else f"{task} loss"
        metric = f"eval/{task}/loss"
        found.append(Metric(f"{of} at start", lambda run, m=metric: run.at_start(m), number, interval=True))
        found.append(Metric(f"{of} at end", lambda run, m=metric: run.last(m), number, interval=True))
        alone = all(len(of) < 2 for group in report.groups for of in report.tasks([group]).values())
        for name in () if alone else denoisers:  # the only one is the mean
            found.append(Metric(f"· {name}", lambda run, m=f"{metric}/{name}": run.last(m), number, interval=True))
    return [
        *found,
        Metric("train loss at end", lambda run: run.last("train/loss"), number, interval=True),
        Metric("tokens/s", lambda run: run.median("tokens_per_s"), large),
        Metric("MFU", lambda run: run.median("mfu"), percent),
        Metric("padding, encoder", lambda run: run.median("padding/encoder"), percent),
        Metric("padding, decoder", lambda run: run.median("padding/decoder"), percent),
        Metric("memory of a device, GiB", lambda run: run.last("memory/device_gib"), lambda value: number(value, 2)),
        Metric("memory of the process, GiB", lambda run: run.last("memory/host_gib"), lambda value: number(value, 2)),
        Metric("time", lambda run: run.seconds, lambda value: NONE if value is None else logs.duration(value)),
    ]


def _layout(what: str, names: list[str], cells: list[list[str]]) -> TextTable:
    """A column a name, or a row if there are many; what nobody has is left out, unless it is what they are run for."""
    cells = [row for row in cells if set(row[1:]) != {NONE} or row[0].endswith("end")]
    if len(names) > 5:
        first, *rest = zip([what, *names], *cells, strict=True)
        return TextTable(list(first), [list(row) for row in rest])
    return TextTable(["", *names], cells)


def state(run: RunRecord) -> str:
    """Done, stopped or running (nobody can tell which from the files), or not started."""
    return "done" if run.done else "not started" if run.step is None else "unfinished"


def number(value: float | None, digits: int = 3) -> str:
    """A number with that many digits after the point."""
    return NONE if value is None else f"{value:.{digits}f}"


def large(value: float | None) -> str:
    """A large number to three digits: 12.3k."""
    return NONE if value is None else amount(value)


def percent(share: float | None) -> str:
    """A share of 1 in percent."""
    return NONE if share is None else f"{100 * share:.1f} %"


def different_settings(runs: Sequence[RunRecord]) -> TextTable:
    """The settings in which the runs differ, one column a run."""
    flat = [settings.flatten(run.experiment) if run.experiment else {} for run in runs]
    paths = sorted({path for of in flat for path in of})
    differ = [path for path in paths if len({json.dumps(of.get(path, NONE)) for of in flat}) > 1]
    rows = [[path, *(_as_text(of[path]) if path in of else NONE for of in flat)] for path in differ]
    return TextTable(["setting", *(run.name for run in runs)], rows)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
