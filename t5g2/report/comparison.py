"""Comparisons of runs as a table and in words: losses, differences by seed, tokens until one arm catches up.

An arm is a group of runs in a comparison; every arm is compared with the first one. Means and intervals:
t5g2/report/statistics.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from t5g2.report.heldout_tasks import ANOTHER_TASK
from t5g2.report.run_records import RunGroup
from t5g2.report.statistics import Estimate, estimate, paired, reached
from t5g2.report.text_table import NONE, TextTable, amount


@dataclass(frozen=True, eq=False)
class Comparison:
    """Groups whose curves share a plot.

    Attributes:
      title: heading; "" if the sweep has only one.
      arms: {name: group}.
      chosen: True if the sweep file names the arms; False = all variants are arms.
    """

    title: str
    arms: dict[str, RunGroup]
    chosen: bool

    @property
    def groups(self) -> list[RunGroup]:
        """The groups, without the arms' names."""
        return list(self.arms.values())

    @property
    def has_seeds(self) -> bool:
        """True if any group has runs under several seeds."""
        return any(group.has_seeds for group in self.groups)

    def asking_another(self, metric: str) -> list[str]:
        """Returns the arms in which a metric is of another held-out task than in the first arm."""
        return [arm for arm, group in self.arms.items() if not group.asks_as(self.reference[1], metric)]

    @property
    def reference(self) -> tuple[str, RunGroup]:
        """The first arm."""
        return next(iter(self.arms.items()))

    @property
    def others(self) -> list[tuple[str, RunGroup]]:
        """The arms after the first; none if the sweep file names no arms, unless there are just two."""
        # two variants can be compared in one way only; of more, the sweep file must name the arms
        return list(self.arms.items())[1:] if self.chosen or len(self.arms) == 2 else []


class CatchUp(NamedTuple):
    """Trained tokens after which runs reached a loss.

    Attributes:
      tokens: one entry per seed; None = not reached.
      within: tokens that every run was trained on.
      at_most: True if a run was there at its first evaluation, and that was not before its first update.
    """

    tokens: list[float | None]
    within: float
    at_most: bool = False

    def text(self) -> str:
        """Returns text such as "1.2M ± 0.1M", "at once", "at most 1.2M" or "not within 3M".

        If only some seeds get there: "2 of 3 seeds, after 1.2M and 1.5M, the others not within 3M".
        """
        reached_after = [tokens for tokens in self.tokens if tokens is not None]
        limit = f"not within {amount(self.within)}"
        if not reached_after:
            return limit
        # a mean over the seeds that got there would hide those that did not
        if len(reached_after) < len(self.tokens):
            after = "at most " * self.at_most + " and ".join(amount(tokens) for tokens in sorted(reached_after))
            return f"{len(reached_after)} of {len(self.tokens)} seeds, after {after}, the others {limit}"
        if self.at_most:
            return f"at most {amount(max(reached_after))}"
        mean = estimate(reached_after)
        return "at once" if mean is None or not any(reached_after) else mean.text(amount)


def catch_up(group: RunGroup, reference: RunGroup, *, metric: str, step: int | None) -> CatchUp | None:
    """Returns the tokens after which `group` has the loss of `reference` at a step; None if one is not recorded.

    Each run is compared with the reference's run of the same seed, or else with the mean of the reference. Between two
    evaluations the loss is a straight line in tokens.
    """
    if not group.asks_as(reference, metric):
        return None
    targets = {} if step is None else reference.by_seed(metric, step)
    mean = estimate(list(targets.values()))
    if mean is None:
        return None
    # by seed, because runs of one seed have read the same batches
    tokens_needed, within, at_most = [], [], False
    for run in group.counted:
        steps, values = run.series(metric)
        tokens = run.tokens(steps)
        if tokens:
            needed = reached(tokens, values, targets.get(run.seed, mean.mean))
            at_most |= needed is not None and needed == tokens[0] > 0
            tokens_needed.append(needed)
            within.append(tokens[-1])
    # "not within" must hold for every run, so the shortest decides
    return CatchUp(tokens_needed, min(within), at_most) if tokens_needed else None


def results(comparisons: Sequence[Comparison], tasks: Sequence[str]) -> TextTable | None:
    """Returns the results, one column per comparison; None if they add nothing to the table of the runs."""
    shown = [c for c in comparisons if c.others]
    # comparisons may have different rows, so the table has the union of their labels
    columns = [dict((*(row for task in tasks for row in _comparison_rows(c, task)), *_batch_rows(c))) for c in shown]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    tells_more = any(c.has_seeds for c in shown) or any(label.startswith("tokens until") for label in labels)
    if not labels or not tells_more:
        return None
    titles = ["", *(c.title or "all" for c in shown)]
    return TextTable(titles, [[label, *(column.get(label, NONE) for column in columns)] for label in labels])


def _comparison_rows(comparison: Comparison, task: str) -> list[tuple[str, str]]:
    """Returns (label, text) for each row of one comparison and held-out loss."""
    metric, prefix = f"eval/{task}/loss", "" if task == "heldout" else f"{task}, "
    name, first = comparison.reference
    rows = []
    for arm, group in comparison.arms.items():
        last = group.last_step(metric)
        if last is None:
            continue
        rows += [(f"{prefix}{arm}: loss at start", format_number(group.at(metric, 0)))]
        rows += [(f"{prefix}{arm}: loss at end", format_number(group.at(metric, last)))]
        rows += [(f"{prefix}{arm}: tokens", _trained(group, last))]
    for arm, group in comparison.others:
        first_end, group_end = first.last_step(metric), group.last_step(metric)
        if first_end is None or group_end is None:
            continue
        if not group.asks_as(first, metric):
            rows.append((f"{prefix}{arm} − {name}", ANOTHER_TASK))
            continue
        # arms of different lengths are compared at their last common step, and each at its own end
        step = max(set(first.steps(metric)) & set(group.steps(metric)), default=None)
        if step is not None:
            at_step = difference(group, first, metric, steps=(step, step))
            rows.append((f"{prefix}{arm} − {name}, step {step}", format_number(at_step, signed=True)))
        if first_end != group_end:
            rows.append(
                (
                    f"{prefix}{arm} − {name}, each at its end",
                    format_number(difference(group, first, metric, (group_end, first_end)), signed=True),
                )
            )
        for end_name, at in (("start", 0), ("end", first_end)):
            tokens = catch_up(group, first, metric=metric, step=at)
            if tokens is not None:
                rows.append((f"{prefix}tokens until {arm} is at {name}'s {end_name}", tokens.text()))
    seeds = {str(len(group.counted)) for group in comparison.groups}
    return [*([("seeds", ", ".join(sorted(seeds)))] if comparison.has_seeds and rows else []), *rows]


def _batch_rows(comparison: Comparison) -> list[tuple[str, str]]:
    """Returns (label, text) for each arm after the first: whether it has read the batches of the first, by seed."""
    name, first = comparison.reference
    rows = []
    for arm, group in comparison.others:
        pairs = [(a.batches, b.batches) for a in first.counted for b in group.counted if a.seed == b.seed]
        common = [(a, b, a.keys() & b.keys()) for a, b in pairs]
        differing = [step for a, b, steps in common for step in steps if a[step] != b[step]]
        if any(steps for *_, steps in common):
            text = f"others than {name}'s from step {min(differing)} on" if differing else f"those of {name}"
            rows.append((f"{arm}: batches", text))
    return rows


def difference(group: RunGroup, other: RunGroup, metric: str, steps: tuple[int, int]) -> Estimate | None:
    """Returns mean and interval, paired by seed, of `group` at the first step minus `other` at the second."""
    return paired(group.by_seed(metric, steps[0]), other.by_seed(metric, steps[1]))


def findings(comparisons: Sequence[Comparison], tasks: Sequence[str]) -> list[str]:
    """Returns sentences that compare each arm with the first: held-out losses, differences, tokens to catch up."""
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
    # means over seeds, at the steps that both arms have
    losses_a, losses_b = (dict(zip(*g.series(metric), strict=True)) for g in (first, group))
    steps = sorted(losses_a.keys() & losses_b.keys())
    if not steps:
        return []
    if not group.asks_as(first, metric):
        return [f"The {loss} of {b} is of {ANOTHER_TASK} than that of {a}, so they are not compared."]
    step, below = steps[-1], sum(losses_a[at] < losses_b[at] for at in steps)
    text = (
        f"At step {step} the {loss} of {a} is {format_number(first.at(metric, step))} and that of {b} "
        f"{format_number(group.at(metric, step))} nats per token"
    )
    gap = difference(group, first, metric, (step, step))
    if comparison.has_seeds and gap is not None:
        text += f", a difference of {format_number(gap)} over {gap.n} seeds"
    sentences = [f"{text}; {a} is below {b} at {below} of {len(steps)} evaluations."]
    catch_ups = [catch_up(group, first, metric=metric, step=at) for at in (0, max(losses_a))]
    if catch_ups[0] is not None and catch_ups[1] is not None:
        levels = [
            f"{a}'s {end_name} ({format_number(first.at(metric, at))})"
            for end_name, at in (("start", 0), ("end", max(losses_a)))
        ]
        sentences.append(
            f"Trained tokens until {b} is at {levels[0]}: {catch_ups[0].text()}; at {levels[1]}: {catch_ups[1].text()}."
        )
    return sentences


def _trained(group: RunGroup, step: int) -> str:
    totals = [total[0] for run in group.counted if (total := run.tokens([step]))]
    mean = estimate(totals)
    if mean is None:
        return NONE
    # of several seeds the first speaks for all
    counted_from = group.counted[0].counted_from
    return amount(mean.mean) + (f", {counted_from}" if counted_from else "")


def format_number(
    value: Estimate | None, *, signed: bool = False, text: Callable[[float], str] = "{:.3f}".format
) -> str:
    """Formats a loss, or a difference of two, to three digits with its interval.

    Args:
      signed: a number above 0 gets a sign.
      text: formats numbers of another kind.
    """
    if value is None:
        return NONE
    return ("+" if signed and value.mean > 0 else "") + value.text(text)
