"""Parts that several sections of the page share."""

import re
from collections.abc import Mapping

from t5g2.report.contents import Report
from t5g2.report.heldout_tasks import ANOTHER_TASK
from t5g2.report.markup import Html, tag
from t5g2.report.run_records import RunGroup, RunRecord

UNIT = "nats per token"


def groups_by_title(report: Report, title: str = "") -> dict[str, list[RunGroup]]:
    """Returns {title: groups} of the comparisons.

    A comparison without a title gets `title`; if that is set and it has a single arm, the name of the arm.
    """
    return {
        c.title or (title if len(c.arms) > 1 else next(iter(c.arms)) if title else ""): c.groups
        for c in report.comparisons
        if c.arms
    }


def arms_of(report: Report, *, others: bool = False) -> dict[str, RunGroup]:
    """Returns {name: a group of that colour} for the arms of all comparisons and, with `others`, the other groups."""
    # reversed, so that an arm of several comparisons is shown by its group in the first
    arms = {arm: group for c in reversed(report.comparisons) for arm, group in c.arms.items()}
    rest = [group for group in report.groups if others and group not in report.compared]
    return arms | {group.name: group for group in rest}


def legend(groups: Mapping[str, RunGroup]) -> Html:
    """Returns the colours of groups."""
    return tag("div", *(tag("span", _dot(group.color), name) for name, group in groups.items()), kind="key")


def run_label(run: RunRecord) -> Html:
    """Returns the run's name with its colour."""
    return tag("span", _dot(run.color), run.name)


def sample_text(text: str) -> Html:
    """Returns the text of a model's input or output, sentinels marked."""
    parts = re.split(r"(<sentinel_\d+>)", str(text))
    marked = [tag("mark", part) if re.fullmatch(r"<sentinel_\d+>", part) else part for part in parts]
    return tag("div", *marked, kind="text")


def note_missing(text: str) -> Html:
    """Returns a note on missing data."""
    return tag("p", text, kind="quiet")


def asking_another(report: Report, metric: str) -> str:
    """Returns a sentence that names the arms in which a metric is of another held-out task; "" = in none."""
    names = list(dict.fromkeys(arm for compared in report.comparisons for arm in compared.asking_another(metric)))
    return f" Of {ANOTHER_TASK} of this name, and not to be compared: {', '.join(names)}." if names else ""


def heading(task: str, title: str) -> str:
    """Returns a heading that names the task, unless it is the usual one, heldout."""
    return title if task == "heldout" else f"{title} ({task})"


def _dot(color: str) -> Html:
    return tag("i", kind="dot", style=f"background:{color}")
