"""What compared runs say, in a table and in words: losses, differences by seed, tokens until one has caught up.

The first arm of a comparison is what the others are compared with. Means and intervals: t5g2/report/statistics.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from t5g2.report.run_records import RunGroup
from t5g2.report.statistics import Estimate, estimate, paired, reached
from t5g2.report.text_table import NONE, TextTable, amount


@dataclass(frozen=True, eq=False)
class Comparison:
    """Groups that are drawn together.

    Attributes:
      title: heading; "" if the sweep has only one.
      arms: {name: group}.
      chosen: whether the sweep's file chose them, instead of taking all.
    """

    title: str
    arms: dict[str, RunGroup]
    chosen: bool

    @property
    def groups(self) -> list[RunGroup]:
        """The groups alone."""
        return list(self.arms.values())

    @property
    def seeded(self) -> bool:
        """Whether any of them speaks of seeds."""
        return any(group.seeded for group in self.groups)

    @property
    def reference(self) -> tuple[str, RunGroup]:
        """The first arm."""
        return next(iter(self.arms.items()))

    @property
    def others(self) -> list[tuple[str, RunGroup]]:
        """The arms after it; none if nobody chose what is compared with what."""
        return list(self.arms.items())[1:] if self.chosen or len(self.arms) == 2 else []


class CatchUp(NamedTuple):
    """After how many trained tokens runs reached a loss, one entry a seed, None = not; and how many each has had."""

    tokens: list[float | None]
    within: float

    def text(self) -> str:
        """ "1.2M ± 0.1M", "at once", "not within 3M", "2 of 3 seeds, after 1.2M and 1.5M, the others not within 3M"."""
        found = [tokens for tokens in self.tokens if tokens is not None]
        limit = f"not within {amount(self.within)}"
        if not found:
            return limit
        if len(found) < len(self.tokens):
            after = " and ".join(amount(tokens) for tokens in sorted(found))
            return f"{len(found)} of {len(self.tokens)} seeds, after {after}, the others {limit}"
        mean = estimate(found)
        return "at once" if mean is None or not any(found) else mean.text(amount)


def catch_up(group: RunGroup, reference: RunGroup, *, metric: str, step: int | None) -> CatchUp | None:
    """The tokens that `group` needs to be where `reference` is at a step; None where a loss or tokens are not recorded.

    Each run is compared with the reference's run of the same seed, or with their mean if there is none. Between two
    evaluations the loss is a straight line in tokens.
    """
    targets = {} if step is None else reference.by_seed(metric, step)
    mean = estimate(list(targets.values()))
    if mean is None:
        return None
    found, within = [], []
    for run in group.counted:
        steps, values = run.series(metric)
        tokens = run.tokens(steps)
        if tokens:
            found.append(reached(tokens, values, targets.get(run.seed, mean.mean)))
            within.append(tokens[-1])
    return CatchUp(found, min(within)) if found else None


def results(comparisons: Sequence[Comparison], tasks: Sequence[str]) -> TextTable | None:
    """A column a comparison; None if there is nothing in it that the table of the runs does not have."""
    shown = [c for c in comparisons if c.others]
    columns = [dict(fact for task in tasks for fact in _facts(c, task)) for c in shown]
    labels = list(dict.fromkeys(label for facts in columns for label in facts))
    if not any(c.seeded for c in shown) and not any(label.startswith("tokens until") for label in labels):
        return None
    titles = ["", *(c.title or "all" for c in shown)]
    return TextTable(titles, [[label, *(facts.get(label, NONE) for facts in columns)] for label in labels])


def _facts(comparison: Comparison, task: str) -> list[tuple[str, str]]:
    """(label, text) for one comparison and held-out loss."""
    metric, of = f"eval/{task}/loss", "" if task == "heldout" else f"{task}, "
    name, first = comparison.reference
    facts = []
    for arm, group in comparison.arms.items():
        last = group.last_step(metric)
        if last is None:
            continue
        facts += [(f"{of}{arm}: loss at start", spelled(group.at(metric, 0)))]
        facts += [(f"{of}{arm}: loss at end", f"{spelled(group.at(metric, last))}")]
        facts += [(f"{of}{arm}: tokens", _trained(group, last))]
    for arm, group in comparison.others:
        a, b = first.last_step(metric), group.last_step(metric)
        if a is None or b is None:
            continue
        step = max(set(first.steps(metric)) & set(group.steps(metric)), default=None)
        if step is not None:
            here = difference(group, first, metric, steps=(step, step))
            facts.append((f"{of}{arm} − {name}, step {step}", spelled(here, signed=True)))
        if a != b:
            facts.append(
                (f"{of}{arm} − {name}, each at its end", spelled(difference(group, first, metric, (b, a)), signed=True))
            )
        for what, at in (("start", 0), ("end", a)):
            caught = catch_up(group, first, metric=metric, step=at)
            if caught is not None:
                facts.append((f"{of}tokens until {arm} is at {name}'s {what}", caught.text()))
    seeds = {str(len(group.counted)) for group in comparison.groups}
    return [*([("seeds", ", ".join(sorted(seeds)))] if comparison.seeded else []), *facts]


def difference(group: RunGroup, other: RunGroup, metric: str, steps: tuple[int, int]) -> Estimate | None:
    """Mean and interval, paired by seed, of `group` at the first step less `other` at the second."""
    return paired(group.by_seed(metric, steps[0]), other.by_seed(metric, steps[1]))


def findings(comparisons: Sequence[Comparison], tasks: Sequence[str]) -> list[str]:
    """Sentences: for each arm and the first, their last held-out losses, their difference, and the catching up."""
    return [
        (f"{comparison.title}: " if comparison.title else "") + sentence
        for comparison in comparisons
        for arm in comparison.others
        for task in tasks
        for sentence in _sentences(comparison, arm, task)
    ]


def _sentences(comparison: Comparison, arm: tuple[str, RunGroup], task: str) -> list[str]:
    (a, first), (b, group) = comparison.reference, arm
    metric = f"eval/{task}/loss"
    loss = "held-out loss" if task == "heldout" else f"held-out loss ({task})"
    of_a, of_b = (dict(zip(*g.series(metric), strict=True)) for g in (first, group))
    steps = sorted(of_a.keys() & of_b.keys())
    if not steps:
        return []
    step, below = steps[-1], sum(of_a[at] < of_b[at] for at in steps)
    text = (
        f"At step {step} the {loss} of {a} is {spelled(first.at(metric, step))} and that of {b} "
        f"{spelled(group.at(metric, step))} nats per token"
    )
    between = difference(group, first, metric, (step, step))
    if comparison.seeded and between is not None:
        text += f", a difference of {spelled(between)} over {between.n} seeds"
    made = [f"{text}; {a} is below {b} at {below} of {len(steps)} evaluations."]
    caught = [catch_up(group, first, metric=metric, step=at) for at in (0, max(of_a))]
    if caught[0] is not None and caught[1] is not None:
        levels = [f"{a}'s {what} ({spelled(first.at(metric, at))})" for what, at in (("start", 0), ("end", max(of_a)))]
        made.append(
            f"Trained tokens until {b} is at {levels[0]}: {caught[0].text()}; at {levels[1]}: {caught[1].text()}."
        )
    return made


def _trained(group: RunGroup, step: int) -> str:
    totals = [total[0] for run in group.counted if (total := run.tokens([step]))]
    mean = estimate(totals)
    return NONE if mean is None else amount(mean.mean)


def spelled(value: Estimate | None, *, signed: bool = False) -> str:
    """A loss, or a difference of two, to three digits with its interval."""
    if value is None:
        return NONE
    sign = "+" if signed and value.mean > 0 else ""
    return sign + value.text(lambda number: f"{number:.3f}")
