"""The tables of a report in their order: the page, table.md and docs/experiments show the same."""

from typing import NamedTuple

from t5g2.report import comparison, deltas, tables
from t5g2.report.contents import Report
from t5g2.report.text_table import TextTable


class ResultTable(NamedTuple):
    """A table with what a reader must know of it.

    Attributes:
      title: heading.
      table: None = there is nothing to show, and `about` says why.
      about: sentences.
      means: True if its numbers are means over seeds with intervals.
    """

    title: str
    table: TextTable | None
    about: str = ""
    means: bool = False

    @property
    def heading(self) -> str:
        """The title, and what means are."""
        return f"{self.title}, {tables.MEANS}" if self.means else self.title


def of_results(report: Report) -> list[ResultTable]:
    """Returns the tables of what is compared."""
    losses = comparison.results(report.comparisons, list(report.tasks(report.compared)))
    rows = deltas.deltas(report)
    scores, against = deltas.score_table(rows), deltas.against_paper(rows)
    missing = missing_metric(report)
    shown = []
    if losses is not None:
        means = f"{tables.MEANS[0].upper()}{tables.MEANS[1:]}. " if report.has_seeds else ""
        about = (
            f"Held-out loss in nats per token. {means}Tokens are the trained ones of encoder and decoder; the loss "
            f"between evaluations is a straight line."
        )
        shown.append(ResultTable("Results", losses, about, report.has_seeds))
    if scores is not None:
        shown.append(ResultTable("Scores", scores, "Each arm at its end, and its difference from the first one."))
    if against is not None or missing:
        shown.append(ResultTable("Against the paper", against, missing or _agreement(report)))
    return shown


def of_runs(report: Report) -> list[ResultTable]:
    """Returns the tables of all runs, first their means over seeds if there are several."""
    runs = ResultTable("Runs", tables.summary(report))
    return [ResultTable("Over seeds", tables.over_seeds(report), means=True), runs] if report.has_seeds else [runs]


def missing_metric(report: Report) -> str:
    """Returns a sentence if no arm with a number in the paper has the metric that stands beside it; "" = one has."""
    printed, metric = report.paper.get("printed") or {}, report.paper.get("metric")
    arms = [group for compared in report.comparisons for arm, group in compared.arms.items() if arm in printed]
    if not printed or any(metric in group.metrics for group in arms):
        return ""
    recorded = [f"eval/{task}/loss" for task in report.tasks()] + [f"eval/{score}" for score in report.scores()]
    return (
        f"No arm with a number in the paper has the metric {metric}, so nothing is compared; recorded "
        f"{'are ' + ', '.join(recorded) if recorded else 'is none yet'}."
    )


def _agreement(report: Report) -> str:
    sizes = (
        "Sizes are those of one metric."
        if report.paper.get("same_metric")
        else "Sizes are not compared, because the paper has another metric."
    )
    return (
        f"Ours is {report.paper['metric']}, each arm at its end. A direction is within noise where the interval of our "
        f"difference, by seed, contains 0; one seed has no interval, so it decides nothing. {sizes}"
    )
