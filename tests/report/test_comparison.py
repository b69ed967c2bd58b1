"""Comparisons of runs whose curves are drawn here."""

import pytest

from t5g2.report import comparison
from t5g2.report.comparison import Comparison, catch_up
from t5g2.report.run_records import RunGroup, RunRecord

LOSS = "eval/heldout/loss"


def run(name, losses, *, seed=None, tokens=100, done=True):
    """Losses at steps 0, 1, 2, …; every step has trained on `tokens`."""
    rows = [{"step": step, LOSS: loss} | ({"train/tokens": tokens} if step else {}) for step, loss in enumerate(losses)]
    return RunRecord(name, "#000", rows, None, None, [], done, seed=seed)


def group(name, *curves, seeds=True):
    return RunGroup(name, "#000", [run(name, c, seed=i if seeds else None) for i, c in enumerate(curves)])


ADAPTED = group("adapted", [3.0, 2.0], [3.2, 2.2], [3.4, 2.0])
SCRATCH = group("scratch", [5.0, 4.0, 2.0, 1.9], [5.0, 3.2, 2.2, 2.1], [5.0, 4.4, 2.4, 1.0])


def test_catching_up_is_by_seed_and_in_tokens():
    start = catch_up(SCRATCH, ADAPTED, metric=LOSS, step=0)
    assert start.tokens == pytest.approx([150.0, 100.0, 150.0])
    assert start.within == 300.0
    end = catch_up(SCRATCH, ADAPTED, metric=LOSS, step=1)
    assert end.tokens == pytest.approx([200.0, 200.0, 200.0 + 100 * 0.4 / 1.4])
    assert start.text().startswith("133 ± ")


def test_catching_up_at_once_never_and_sometimes():
    slow = group("slow", [5.0, 4.0], [5.0, 3.1], [5.0, 4.9])
    caught = catch_up(slow, ADAPTED, metric=LOSS, step=0)
    assert caught.tokens == [None, pytest.approx(100 * 1.8 / 1.9), None]
    assert caught.text() == "1 of 3 seeds, after 94.7, the others not within 100"
    never = catch_up(slow, ADAPTED, metric=LOSS, step=1)
    assert never.text() == "not within 100"
    fast = group("fast", [1.0], [1.0], [1.0])
    assert catch_up(fast, ADAPTED, metric=LOSS, step=0) is None, "no step has logged its tokens"
    fast = group("fast", [1.0, 1.0], [1.0, 0.5], [1.0, 2.0])
    assert catch_up(fast, ADAPTED, metric=LOSS, step=0).text() == "at once"
    assert catch_up(SCRATCH, ADAPTED, metric="eval/other/loss", step=0) is None


def test_a_run_without_a_seed_is_compared_with_the_mean():
    alone = group("alone", [4.0, 3.1, 3.0], seeds=False)
    assert catch_up(alone, ADAPTED, metric=LOSS, step=0).tokens == pytest.approx([88.8889])


def test_the_table_of_results():
    """A column a comparison; differences are paired, so what all seeds share has no width."""
    both = Comparison("width 9", {"adapted": ADAPTED, "scratch": SCRATCH}, chosen=True)
    table = comparison.results([both], ["heldout"])
    rows = dict(table.rows)
    assert table.columns == ["", "width 9"]
    assert rows["seeds"] == "3"
    assert rows["adapted: loss at start"] == "3.200 ± 0.497"
    assert rows["scratch: loss at end"].startswith("1.667 ± ")
    assert rows["adapted: tokens"] == "100"
    assert rows["scratch − adapted, step 1"].startswith("+1.800 ± ")
    assert rows["scratch − adapted, each at its end"].startswith("-0.400 ± ")
    assert rows["tokens until scratch is at adapted's start"].startswith("133 ± ")
    first, second = comparison.findings([both], ["heldout"])
    assert first.startswith("width 9: At step 1 the held-out loss of adapted is 2.067 ± ")
    assert "adapted is below scratch at 2 of 2 evaluations" in first
    assert second.startswith("width 9: Trained tokens until scratch is at adapted's start (3.200 ± 0.497): 133 ± ")


def test_arms_that_have_not_read_the_same_batches_are_named():
    """By seed, at the steps that both have; runs that wrote no hashes are not spoken of."""

    def reads(name, *batches):
        rows = [
            [{"step": step, LOSS: 1.0, "data/batch": batch} for step, batch in enumerate(of_seed, 1)]
            for of_seed in batches
        ]
        return RunGroup(
            name, "#000", [RunRecord(name, "#000", r, None, None, [], True, seed=i) for i, r in enumerate(rows)]
        )

    arms = {
        "first": reads("first", "abc", "def"),
        "same": reads("same", "abcd", "de"),
        "other": reads("other", "abc", "dxf"),
        "former": ADAPTED,
    }
    rows = dict(comparison.results([Comparison("", arms, chosen=True)], ["heldout"]).rows)
    assert rows["same: batches"] == "those of first"
    assert rows["other: batches"] == "others than first's from step 2 on"
    assert "former: batches" not in rows


def test_runs_that_are_not_done_do_not_count_beside_those_that_are():
    runs = [run("a", [3.0, 2.0], seed=0), run("a", [9.0], seed=1, done=False)]
    assert RunGroup("a", "#000", runs).at(LOSS, 0).n == 1
    begun = RunGroup("a", "#000", [run("a", [9.0], seed=1, done=False)])
    assert begun.at(LOSS, 0).mean == 9.0


def test_without_seeds_and_tokens_there_is_no_table_of_results():
    plain = [
        RunGroup(name, "#000", [RunRecord(name, "#000", [{"step": 0, LOSS: 1.0}], None, None, [], True)])
        for name in "ab"
    ]
    both = Comparison("", dict(zip("ab", plain, strict=True)), chosen=True)
    assert comparison.results([both], ["heldout"]) is None


def test_without_a_held_out_loss_there_is_no_table_of_results():
    groups = {
        name: RunGroup(name, "#000", [RunRecord(name, "#000", [], None, None, [], True, seed=0)]) for name in "ab"
    }
    assert comparison.results([Comparison("", groups, chosen=True)], []) is None
    assert comparison.results([Comparison("", groups, chosen=True)], ["heldout"]) is None
