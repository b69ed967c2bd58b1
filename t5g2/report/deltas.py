"""The results of a sweep as numbers: each arm at its end, its difference from the first arm, and that of a paper."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from t5g2.report.comparison import Comparison, format_number
from t5g2.report.contents import Report
from t5g2.report.heldout_tasks import ANOTHER_TASK
from t5g2.report.statistics import Estimate, estimate, paired
from t5g2.report.text_table import NONE, TextTable, score

ONE_SEED = "one seed"


class Delta(NamedTuple):
    """One arm and metric of a comparison.

    Attributes:
      comparison: its title; "" if the sweep has only one.
      arm, metric: names; the metric as in metrics.csv.
      ours: mean over seeds at the end.
      difference: from the first arm, paired by seed; None for the first arm itself, where no seed has both, or where
        the two metrics are of different held-out tasks.
      paper, paper_difference: the number printed, and its difference from the first arm's; None = none is printed.
      direction: of the paper's difference against ours: "agrees", "disagrees", or "within noise" where our interval
        contains 0; "one seed" = there is no interval, so neither; "another task" = the metric is of another held-out
        task than the first arm's; "" = nothing is printed, or no difference.
      size: the same: "agrees" where our interval contains the paper's difference, else "larger" or "smaller" than the
        paper's, or "one seed"; "" = the paper has another metric.
    """

    comparison: str
    arm: str
    metric: str
    ours: Estimate
    difference: Estimate | None
    paper: float | None = None
    paper_difference: float | None = None
    direction: str = ""
    size: str = ""


def deltas(report: Report) -> list[Delta]:
    """Returns the losses and scores of all arms, each at its end."""
    paper = report.paper
    printed = paper.get("printed")
    metrics = [f"eval/{task}/loss" for task in report.tasks(report.compared)]
    metrics += [f"eval/{score}" for score in report.scores()]
    metrics += [paper["metric"]] if printed and paper["metric"] not in metrics else []
    rows = []
    for metric, compared in itertools.product(metrics, report.comparisons):
        beside = bool(printed) and metric == paper["metric"]
        first = compared.reference[0]
        rows += [_beside(row, first, paper) if beside else row for row in _rows(compared, metric)]
    return rows


def _rows(compared: Comparison, metric: str) -> Iterable[Delta]:
    if not compared.others:
        return
    first = compared.reference[1].ends(metric)
    for arm, group in compared.arms.items():
        ends = group.ends(metric)
        ours = estimate(list(ends.values()))
        if ours is not None:
            if not group.asks_as(compared.reference[1], metric):
                yield Delta(compared.title, arm, metric, ours, None, direction=ANOTHER_TASK)
                continue
            difference = None if group is compared.reference[1] else paired(ends, first)
            yield Delta(compared.title, arm, metric, ours, difference)


def _beside(row: Delta, first: str, paper: Mapping[str, Any]) -> Delta:
    """Returns a row with the paper's numbers of its arm and of the first one."""
    printed = paper["printed"]
    if row.arm not in printed:
        return row
    row, difference = row._replace(paper=printed[row.arm]), row.difference
    if difference is None or first not in printed:
        return row
    gap = printed[row.arm] - printed[first]
    row = row._replace(paper_difference=gap)
    if gap == 0:
        return row
    if difference.half is None:
        return row._replace(direction=ONE_SEED, size=ONE_SEED if paper.get("same_metric") else "")
    same_sign = paper.get("higher_is_better", True) == paper.get("ours_higher_is_better", False)
    noise = abs(difference.mean) <= difference.half
    agrees = (difference.mean * gap > 0) == same_sign
    direction = "within noise" if noise else "agrees" if agrees else "disagrees"
    return row._replace(
        direction=direction, size=_size(difference.mean, difference.half, gap) if paper.get("same_metric") else ""
    )


def _size(mean: float, half: float, gap: float) -> str:
    if abs(mean - gap) <= half:
        return "agrees"
    return "larger" if abs(mean) > abs(gap) else "smaller"


def against_paper(rows: Sequence[Delta]) -> TextTable | None:
    """Returns the arms that have a number in the paper, beside ours; None if none has."""
    shown = [row for row in rows if row.paper is not None]
    if not shown:
        return None
    titled = any(row.comparison for row in shown)
    lines = [
        [
            (f"{row.comparison}, " if titled else "") + row.arm,
            format_number(row.ours),
            f"{row.paper:g}",
            format_number(row.difference, signed=True),
            NONE if row.paper_difference is None else f"{row.paper_difference:+.4g}",
            row.direction or NONE,
            row.size or NONE,
        ]
        for row in shown
    ]
    columns = ["", "ours", "paper", "ours − first", "paper − first", "direction", "size"]
    return TextTable(columns, lines)


def csv_rows(rows: Iterable[Delta]) -> Iterable[tuple]:
    """Yields a heading and a line for each row; what there is not is empty."""
    yield (
        *("comparison", "arm", "metric", "seeds", "mean", "half_width", "difference", "difference_half_width"),
        *("paper", "paper_difference", "direction", "size"),
    )
    for row in rows:
        ours, gap = row.ours, row.difference
        differences = (None, None) if gap is None else (gap.mean, gap.half)
        yield (
            *(row.comparison, row.arm, row.metric, ours.n, ours.mean, ours.half, *differences),
            *(row.paper, row.paper_difference, row.direction, row.size),
        )


def score_table(rows: Sequence[Delta]) -> TextTable | None:
    """Returns the scores of all arms and their differences from the first one; None if there are none."""
    shown = [row for row in rows if not row.metric.endswith("/loss")]
    titles = list(dict.fromkeys(row.comparison for row in shown))
    cells: dict[str, dict[str, str]] = {}
    for row in shown:
        label = f"{row.metric.removeprefix('eval/')}, {row.arm}"
        cells.setdefault(label, {})[row.comparison] = format_number(row.ours, text=score)
        if row.direction == ANOTHER_TASK:
            cells.setdefault(f"{label} − first", {})[row.comparison] = ANOTHER_TASK
        if row.difference is not None:
            difference = format_number(row.difference, signed=True, text=score)
            cells.setdefault(f"{label} − first", {})[row.comparison] = difference
    lines = [[label, *(texts.get(title, NONE) for title in titles)] for label, texts in cells.items()]
    return TextTable(["", *(title or "all" for title in titles)], lines) if lines else None
