"""The report's plots, as inline SVG that takes its text colour and font from the page.

A group is the runs of one variant: their mean is a strong curve, and each of several runs a thin one.
"""

import io
import itertools
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from t5g2.core import logs
from t5g2.core.terminal import escaped
from t5g2.report.run_records import Amount, RunGroup


class FrontierPoint(NamedTuple):
    """One arm in a plot of quality against cost; `half` is half of the interval of its quality, 0 = none."""

    name: str
    color: str
    cost: float
    quality: float
    half: float


INK = "#010203"  # stands for the page's own text colour
STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "t5g2",  # the same plot is the same file
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def compare(sets: Mapping[str, Sequence[RunGroup]], metric: str, unit: str) -> str:
    """Returns SVG with a plot for each {title: groups}: one curve per group, and its last value at the end."""
    with _style() as (plt, ticker):
        figure, grid = _grid(plt, len(sets), columns=min(len(sets), 2), height=4.0 if len(sets) == 1 else 3.4)
        for axes, (title, groups) in zip(grid, sets.items(), strict=True):
            ends = []
            for group in groups:
                _curve(axes, group, metric, marker="o", markersize=4)
                steps, values = group.series(metric)
                if steps:
                    ends.append((steps[-1], values[-1], group.color))
            # labels of curves that end close together would cover each other
            low, high = axes.get_ylim()
            for (x, y, ink), at in zip(ends, _apart([y for _, y, _ in ends], 0.055 * (high - low)), strict=True):
                near = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
                axes.annotate(f"{y:.3f}", (x, at), color=ink, **near)
            axes.set_title(escaped(title))
            _finish(axes, ticker, ylabel=unit if axes is grid[0] else None)
        return _svg(figure, plt)


def along(sets: Mapping[str, Sequence[RunGroup]], metric: str, amounts: Mapping[str, Amount], unit: str) -> str:
    """Returns SVG with a plot for each {title: groups} and each {name of an axis: amount that runs have used up}."""
    with _style() as (plt, ticker):
        figure, grid = _grid(plt, len(sets) * len(amounts), columns=len(amounts), height=3.0)
        shown = itertools.product(sets.items(), amounts.items())
        for axes, ((title, groups), (name, amount)) in zip(grid, shown, strict=True):
            for group in groups:
                steps, values = group.series(metric)
                used = group.total(amount, steps)
                if used is not None:
                    axes.plot(used, values, color=group.color, marker="o", markersize=3)
            axes.set_title(escaped(title))
            _finish(axes, ticker, xlabel=name, ylabel=unit)
            axes.xaxis.set_major_formatter(lambda value, _: logs.short(value))
        return _svg(figure, plt)


def frontier(points: Mapping[str, Sequence[FrontierPoint]], unit: str, *, higher_is_better: bool) -> str:
    """Returns SVG with a plot of quality for each {cost: points}; a line joins the points that no other one beats.

    Args:
      points: by the name of the cost.
      unit: name of the quality.
      higher_is_better: of the quality; of a cost less is better.
    """
    with _style() as (plt, ticker):
        figure, grid = _grid(plt, len(points), columns=min(len(points), 2), height=3.4)
        for axes, (cost, of_cost) in zip(grid, points.items(), strict=True):
            best = not_beaten([(p.cost, p.quality) for p in of_cost], higher_is_better=higher_is_better)
            axes.plot(*zip(*best, strict=True), color=INK, alpha=0.35, linewidth=1.0)
            for point in of_cost:
                axes.errorbar(point.cost, point.quality, point.half, color=point.color, marker="o", markersize=5)
                near = {"xytext": (7, 4), "textcoords": "offset points", "fontsize": "small"}
                axes.annotate(escaped(point.name), (point.cost, point.quality), color=point.color, **near)
            _finish(axes, ticker, xlabel=cost, ylabel=unit)
            axes.margins(x=0.2, y=0.15)
            axes.xaxis.set_major_formatter(lambda value, _: logs.short(value))
        return _svg(figure, plt)


def not_beaten(points: Sequence[tuple[float, float]], *, higher_is_better: bool) -> list[tuple[float, float]]:
    """Returns the (cost, quality) that no other point beats: less cost, and better quality, in the order of cost.

    >>> not_beaten([(1, 5.0), (2, 6.0), (3, 4.0), (3, 4.5)], higher_is_better=False)
    [(1, 5.0), (3, 4.0)]
    """
    sign = 1 if higher_is_better else -1
    kept: list[tuple[float, float]] = []
    # of one cost, the best comes first
    for cost, quality in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not kept or sign * quality > sign * kept[-1][1]:
            kept.append((cost, quality))
    return kept


def panels(groups: Sequence[RunGroup], metrics: Mapping[str, str], *, from_zero: bool = False) -> str:
    """Returns SVG with a small plot for each {title: metric}, three in a row.

    Args:
      groups: the curves of each plot.
      metrics: metrics by title.
      from_zero: the axis starts at 0, for amounts and shares.
    """
    with _style() as (plt, ticker):
        figure, grid = _grid(plt, len(metrics))
        for axes, (title, metric) in zip(grid, metrics.items(), strict=True):
            for group in groups:
                few = {"marker": "o", "markersize": 3} if len(group.steps(metric)) < 40 and not from_zero else {}
                _curve(axes, group, metric, linewidth=1.5, **few)
            axes.set_title(escaped(title))
            _finish(axes, ticker)
            # a curve of zeros has no height, and an axis from 0 to 0 cannot be drawn
            if from_zero:
                axes.set_ylim(0, 1.15 * axes.dataLim.y1 or 1)
            if metric.startswith(("padding/", "mfu")):
                axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
        return _svg(figure, plt)


def training(sets: Mapping[str, Sequence[RunGroup]]) -> str:
    """Returns SVG with a plot for each {title: groups}: logged training losses, running median, held-out losses.

    With several seeds, the running median is that of their mean.
    """
    with _style() as (plt, ticker):
        figure, grid = _grid(plt, len(sets), columns=min(len(sets), 3), height=3.0)
        for axes, (title, groups) in zip(grid, sets.items(), strict=True):
            for group in groups:
                ink = group.color
                for run in group.runs:
                    axes.plot(*run.series("train/loss"), color=ink, alpha=0.25 / len(group.runs), linewidth=1.0)
                steps, values = group.series("train/loss")
                axes.plot(steps, smooth(values), color=ink)
                for metric in _overall(group):
                    axes.plot(*group.series(metric), color=ink, linestyle="none", marker="o", markersize=4)
            axes.set_title(escaped(title))
            _finish(axes, ticker, ylabel="nats per token" if axes is grid[0] else None)
        # one key for all plots: colors tell the groups apart, shapes what is drawn
        shapes = {
            "training loss": {"alpha": 0.25, "linewidth": 1.0},
            "its running median": {},
            "held-out loss": {"linestyle": "none", "marker": "o", "markersize": 4},
        }
        key = [plt.Line2D([], [], color="#555", label=label, **style) for label, style in shapes.items()]
        grid[0].legend(handles=key, loc="upper right", frameon=False, fontsize="small")
        return _svg(figure, plt)


def heat_map(values: Sequence[Sequence[float]], *, columns: Sequence[str], rows: Sequence[str]) -> str:
    """Returns SVG with a coloured cell for each value of 0 to 1, its number in it; a cell of nan is empty.

    The axes are depth, downwards, and length.

    Args:
      values: rows of values.
      columns: names of the lengths.
      rows: names of the depths.
    """
    width, height = min(9.6, 1.6 + 0.8 * len(columns)), 0.9 + 0.36 * len(rows)
    with _style() as (plt, _):
        figure, axes = plt.subplots(figsize=(max(width, 3.2), height), layout="constrained")
        axes.grid(visible=False)
        # rectangles, because an image would be pixels; a float, because an int is the number of a colour
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if math.isnan(value):
                    continue
                axes.add_patch(
                    plt.Rectangle((x + 0.02, y + 0.03), 0.96, 0.94, color=plt.cm.cividis(float(value)), linewidth=0)
                )
                ink = "white" if value < 0.5 else "black"
                axes.text(x + 0.5, y + 0.5, f"{value:.2f}", ha="center", va="center", color=ink, fontsize="small")
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), xlabel="length in tokens", ylabel="depth")
        axes.set_xticks([x + 0.5 for x in range(len(columns))], columns)
        axes.set_yticks([y + 0.5 for y in range(len(rows))], rows)
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        return _svg(figure, plt)


def smooth(values: Sequence[float]) -> list[float]:
    """Returns the running median over about a twentieth of the curve to either side; it follows drops, not spikes.

    >>> smooth([9, 1, 8, 1, 7])
    [5.0, 8, 1, 7, 4.0]
    """
    reach = max(1, len(values) // 20)
    return [statistics.median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _curve(axes: Any, group: RunGroup, metric: str, **style: Any) -> None:
    """Draws the mean of a group and, if there are several runs, each of them as a thin curve."""
    if len(group.runs) > 1:
        for run in group.runs:
            axes.plot(*run.series(metric), color=group.color, linewidth=0.8, alpha=0.55)
    axes.plot(*group.series(metric), color=group.color, **style)


def _overall(group: RunGroup) -> list[str]:
    return [name for name in group.metrics if re.fullmatch(r"eval/[^/]+/loss", name)]


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Returns the values, moved so that neighbours are at least `gap` apart, for labels.

    [1, 1.02, 5] with gap 0.5 become [0.76, 1.26, 5].
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    moved = list(values)
    # moving one pair apart can push another together, so the pass is repeated
    for _ in range(50):
        for a, b in itertools.pairwise(order):
            overlap = gap - (moved[b] - moved[a])
            if overlap > 1e-9:
                moved[a] -= overlap / 2
                moved[b] += overlap / 2
    return moved


def _grid(plt: Any, count: int, *, columns: int = 3, height: float = 2.3) -> tuple[Any, list[Any]]:
    """Returns (a figure of the page's width, its `count` axes)."""
    lines = math.ceil(count / columns)
    figure, grid = plt.subplots(lines, columns, figsize=(9.6, height * lines), layout="constrained", squeeze=False)
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _finish(axes: Any, ticker: Any, *, xlabel: str = "step", ylabel: str | None = None) -> None:
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=xlabel == "step", steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
    axes.set_xlabel(xlabel)
    if ylabel:
        axes.set_ylabel(ylabel)


@contextmanager
def _style() -> Iterator[tuple[Any, Any]]:
    """Yields (pyplot, ticker) of a matplotlib that needs no display, in the report's style inside the block."""
    # imported here, because matplotlib takes a second to load
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    with matplotlib.rc_context(dict[Any, Any](STYLE)):
        yield plt, ticker


def _svg(figure: Any, plt: Any) -> str:
    """Returns the figure as an <svg> element, without the file's preamble."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # ids that repeat in every figure of the page and are never referenced
    return re.sub(r' id="(figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick)_\d+"', "", text)
