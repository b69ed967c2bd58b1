"""The report of a run or of a sweep: one self-contained page, the numbers as csv, one table.

It reads files only, whatever is there of them: sweep.json; of each run metrics.jsonl, experiment.json, provenance.json
(of the run or of its model folder), samples/*.jsonl and done.json. What is missing is said on the page.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from t5g2.core import logs, settings
from t5g2.core.errors import UserError
from t5g2.report import comparison
from t5g2.report.comparison import NONE, Comparison, Table, amount
from t5g2.report.run_records import COLORS, Group, Run, read_json, read_run
from t5g2.report.statistics import estimate

MEANS = "mean ± half of its 95 % interval over seeds, t(n - 1) s / sqrt(n); differences by seed"


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that the page shows.

    Attributes:
      title: heading.
      folder: the workdir.
      groups: all runs, by variant.
      comparisons: which of them are drawn together.
      sweep: sweep.json, None for a single run.
    """

    title: str
    folder: Path
    groups: list[Group]
    comparisons: list[Comparison]
    sweep: dict | None = None

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for group in self.groups for run in group.runs]

    @property
    def compared(self) -> list[Group]:
        """The groups that are drawn together with others, each once."""
        named = {group.name for of in self.comparisons for group in of.groups}
        return [group for group in self.groups if group.name in named]

    @property
    def seeded(self) -> bool:
        """Whether any variant ran under several seeds."""
        return any(group.seeded for group in self.groups)

    def tasks(self, groups: Iterable[Group] | None = None) -> dict[str, list[str]]:
        """{task: its denoisers} of the held-out losses that the runs recorded, eval/<task>/loss[/<denoiser>]."""
        found: dict[str, list[str]] = {}
        for group in self.groups if groups is None else groups:
            for metric in group.metrics:
                parts = metric.split("/")
                if parts[0] == "eval" and len(parts) in (3, 4) and parts[2] == "loss":
                    denoisers = found.setdefault(parts[1], [])
                    if len(parts) == 4 and parts[3] not in denoisers:
                        denoisers.append(parts[3])
        return found


@dataclass(frozen=True)
class Fact:
    """A row of the tables of runs and of groups.

    Attributes:
      title: of the row.
      read: the value of a run.
      spell: the value as text.
      interval: whether it is a result, whose interval over seeds is shown.
    """

    title: str
    read: Callable[[Run], float | None]
    spell: Callable[[float | None], str]
    interval: bool = False

    def of_group(self, group: Group) -> str:
        """The mean over seeds."""
        mean = estimate([value for run in group.counted if (value := self.read(run)) is not None])
        if mean is None:
            return NONE
        return mean.text(self.spell) if self.interval else self.spell(mean.mean)


def write(workdir: str | os.PathLike) -> Path:
    """Writes report/index.html, report/metrics.csv and report/table.md; prints the table and the page's path.

    Raises:
      UserError: the folder holds neither a run nor a sweep.
    """
    from t5g2.report import page

    report = read(Path(workdir))
    out = report.folder / "report"
    out.mkdir(exist_ok=True)
    table = "\n\n".join("\n".join([*heading, *of.lines()]) for heading, of in _printed(report))
    _replace(out / "index.html", page.render(report))
    _replace(out / "table.md", table + "\n")
    with open(out / "metrics.csv.part", "w", newline="") as file:
        csv.writer(file).writerows([("run", "step", "wall", "metric", "value"), *_points(report.runs)])
    os.replace(out / "metrics.csv.part", out / "metrics.csv")
    print("\n".join(["", table, "", f"report: {out / 'index.html'}"]), flush=True)
    return out / "index.html"


def _printed(report: Report) -> list[tuple[list[str], Table]]:
    """(heading, table): the runs alone, or the results over seeds before them."""
    results = comparison.results(report.comparisons, list(report.tasks(report.compared)))
    if results is None and not report.seeded:
        return [([], summary(report))]
    about = f"Over seeds: {MEANS}"
    return [
        *([(["Results" + (f", {MEANS}" if report.seeded else ""), ""], results)] if results else []),
        *([([about, ""], over_seeds(report))] if report.seeded else []),
        (["Runs", ""], summary(report)),
    ]


def read(folder: Path) -> Report:
    """What a workdir holds. Raises UserError if it is neither that of a run nor that of a sweep."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give the --workdir of a run or of a sweep")
    sweep = read_json(folder / "sweep.json")
    if sweep is not None:
        return _read_sweep(folder, sweep)
    if not ((folder / "metrics.jsonl").exists() or (folder / "experiment.json").exists()):
        raise UserError(
            f"{folder} is no workdir: it has neither metrics.jsonl nor experiment.json (a run) nor sweep.json (a "
            f"sweep); give the --workdir of `t5g2 train` or `t5g2 sweep`"
        )
    name = folder.resolve().name
    group = Group(name, COLORS[0], [read_run(folder, name)])
    return Report(name, folder, [group], [Comparison("", {name: group}, chosen=False)])


def _read_sweep(folder: Path, sweep: dict) -> Report:
    members: dict[str, list[dict]] = {}
    for part in sweep["parts"]:
        if part["kind"] == "variant":
            members.setdefault(part.get("group", part["name"]), []).append(part)  # a group only where there are seeds
    chosen = sweep["compare"] or list(members)
    rows = chosen if isinstance(chosen, dict) else {"": {name: name for name in chosen}}
    arms = list(dict.fromkeys(arm for row in rows.values() for arm in row))
    # an arm has one colour in all comparisons
    arm_of = {group: arm for row in reversed(rows.values()) for arm, group in row.items()}
    keys = list(dict.fromkeys([*arms, *(name for name in members if name not in arm_of)]))
    colors = dict(zip(keys, cycle(COLORS), strict=False))
    groups = {}
    for name, parts in members.items():
        color = colors[arm_of.get(name, name)]
        runs = [read_run(folder / part["name"], part["name"], color=color, seed=part.get("seed")) for part in parts]
        groups[name] = Group(name, color, runs)
    comparisons = [
        Comparison(title, {arm: groups[name] for arm, name in row.items()}, chosen=bool(sweep["compare"]))
        for title, row in rows.items()
    ]
    return Report(sweep["title"], folder, list(groups.values()), comparisons, sweep)


def summary(report: Report) -> Table:
    """A run's held-out losses, where they began and ended, over all and per denoiser, and what it took.

    A column a run as long as they fit a terminal, otherwise a row a run.
    """
    cells = [
        ["state", *map(state, report.runs)],
        ["step", *(NONE if run.step is None else str(run.step) for run in report.runs)],
        *([fact.title, *(fact.spell(fact.read(run)) for run in report.runs)] for fact in facts(report)),
    ]
    return _laid_out("run", [run.name for run in report.runs], cells)


def over_seeds(report: Report) -> Table:
    """The same for each variant, as means over its seeds; results with 95 % intervals."""
    groups = report.groups
    cells = [
        ["seeds", *(f"{len(group.counted)} of {len(group.runs)}" for group in groups)],
        *([fact.title, *(fact.of_group(group) for group in groups)] for fact in facts(report)),
    ]
    return _laid_out("variant", [group.name for group in groups], cells)


def facts(report: Report) -> list[Fact]:
    """What the tables show."""
    found = []
    for task, denoisers in report.tasks().items():
        of = "held-out loss" if task == "heldout" else f"{task} loss"
        metric = f"eval/{task}/loss"
        found.append(Fact(f"{of} at start", lambda run, m=metric: run.at_start(m), number, interval=True))
        found.append(Fact(f"{of} at end", lambda run, m=metric: run.last(m), number, interval=True))
        alone = all(len(of) < 2 for group in report.groups for of in report.tasks([group]).values())
        for name in () if alone else denoisers:  # the only one is the mean
            found.append(Fact(f"· {name}", lambda run, m=f"{metric}/{name}": run.last(m), number, interval=True))
    return [
        *found,
        Fact("train loss at end", lambda run: run.last("train/loss"), number, interval=True),
        Fact("tokens/s", lambda run: run.median("tokens_per_s"), large),
        Fact("MFU", lambda run: run.median("mfu"), percent),
        Fact("padding, encoder", lambda run: run.median("padding/encoder"), percent),
        Fact("padding, decoder", lambda run: run.median("padding/decoder"), percent),
        Fact("memory of a device, GiB", lambda run: run.last("memory/device_gib"), lambda value: number(value, 2)),
        Fact("memory of the process, GiB", lambda run: run.last("memory/host_gib"), lambda value: number(value, 2)),
        Fact("time", lambda run: run.seconds, lambda value: NONE if value is None else logs.duration(value)),
    ]


def _laid_out(what: str, names: list[str], cells: list[list[str]]) -> Table:
    """A column a name, or a row if there are many; what nobody has is left out, unless it is what they are run for."""
    cells = [row for row in cells if set(row[1:]) != {NONE} or row[0].endswith("end")]
    if len(names) > 5:
        first, *rest = zip([what, *names], *cells, strict=True)
        return Table(list(first), [list(row) for row in rest])
    return Table(["", *names], cells)


def state(run: Run) -> str:
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


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
