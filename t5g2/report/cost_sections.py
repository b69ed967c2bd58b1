"""The sections of the page about what quality costs: tokens, FLOPs, seconds."""

from collections.abc import Callable, Mapping
from functools import partial

from t5g2.report import plots
from t5g2.report.contents import Report
from t5g2.report.markup import Html, figure, tag
from t5g2.report.page_parts import UNIT, arms_of, asking_another, groups_by_title, heading, legend, note_missing
from t5g2.report.result_tables import missing_metric
from t5g2.report.run_records import Amount, RunGroup, RunRecord
from t5g2.report.statistics import estimate

AMOUNTS: Mapping[str, Amount] = {"tokens": RunRecord.tokens, "FLOPs": RunRecord.flops}
# of t5g2/eval/generation_cost.py
QUERY_COSTS = {
    "query_flops": "FLOPs of a query",
    "prefill_seconds": "seconds to the first token",
    "token_seconds": "seconds of each further token",
}


def by_amount(report: Report) -> list[Html]:
    """Returns the curves of held-out losses by trained tokens and by FLOPs of training."""
    parts = []
    for task in report.tasks(report.compared):
        metric = f"eval/{task}/loss"
        curves = {
            title: [g for g in groups if len(g.steps(metric)) > 1] for title, groups in groups_by_title(report).items()
        }
        amounts = {
            name: amount
            for name, amount in AMOUNTS.items()
            if any(group.total(amount, group.steps(metric)) for groups in curves.values() for group in groups)
        }
        if amounts:
            plot = plots.along({title: groups for title, groups in curves.items() if groups}, metric, amounts, UNIT)
            text = (
                "Tokens and FLOPs (forward and backward) of the run itself, without its source. A run that took over "
                "the state of another has that one's too, or counts from its first logged step if it has no records. "
                f"Means over seeds.{asking_another(report, metric)}"
            )
            parts += [tag("h2", heading(task, "Held-out loss by tokens and FLOPs")), legend(arms_of(report))]
            parts.append(figure(plot, text))
    return parts


def frontier(report: Report) -> list[Html]:
    """Returns plots of quality against what it costs: to train, and to answer a query."""
    paper = report.paper
    losses = [f"eval/{task}/loss" for task in report.tasks(report.compared)]
    metric = paper["metric"] if paper.get("printed") else next(iter(losses), None)
    if metric is None:
        return []
    if missing := missing_metric(report):
        return [tag("h2", "Quality and cost"), note_missing(missing)]
    points = {name: _points(report, metric, cost) for name, cost in _costs(report).items()}
    # arms of one cost are compared by their quality alone
    points = {name: of_cost for name, of_cost in points.items() if len({point.cost for point in of_cost}) > 1}
    if not points:
        return []
    plot = plots.frontier(
        points,
        UNIT if metric.endswith("/loss") else metric.removeprefix("eval/"),
        higher_is_better=bool(paper.get("printed") and paper.get("ours_higher_is_better")),
    )
    text = (
        "Each arm at its end, with the interval over its seeds; the line joins those that no other one beats in both."
        f"{asking_another(report, metric)}"
    )
    return [tag("h2", "Quality and cost"), figure(plot, text)]


def _costs(report: Report) -> dict[str, Callable[[RunGroup], float | None]]:
    """Returns {name: cost of a group} of training, and of queries where `t5g2 evaluate --cost` has measured them."""

    def trained(group: RunGroup, amount: Amount) -> float | None:
        last = max((run.step or 0 for run in group.counted), default=0)
        totals = group.total(amount, [last])
        return totals[0] if totals else None

    def measured(group: RunGroup, metric: str) -> float | None:
        mean = estimate(list(group.ends(metric).values()))
        return mean and mean.mean

    costs = {f"{name} of training": partial(trained, amount=amount) for name, amount in AMOUNTS.items()}
    for score in report.scores():
        task, _, name = score.rpartition("/")
        if name in QUERY_COSTS:
            costs[f"{QUERY_COSTS[name]} ({task})"] = partial(measured, metric=f"eval/{score}")
    return costs


def _points(report: Report, metric: str, cost: Callable[[RunGroup], float | None]) -> list[plots.FrontierPoint]:
    points = []
    for compared in report.comparisons:
        apart = compared.asking_another(metric)
        for arm, group in ((arm, group) for arm, group in compared.arms.items() if arm not in apart):
            quality, used = estimate(list(group.ends(metric).values())), cost(group)
            if quality is not None and used is not None:
                name = f"{compared.title}, {arm}" if compared.title else arm
                points.append(plots.FrontierPoint(name, group.color, used, quality.mean, quality.half or 0.0))
    return points
