"""Comparisons of runs whose curves are drawn here."""

from dataclasses import replace
from pathlib import Path

import pytest

from t5g2.report import comparison, deltas
from t5g2.report.comparison import Comparison, catch_up
from t5g2.report.contents import Report
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


PREFIX = {"kind": "prefix_lm", "prefix": 0.5, "eos": True, "split_at": "token"}
SUFFIX = {"kind": "ul2", "eos": True, "tasks": [{"name": "half", "rate": 0.5, "mean_span": None}]}


def asking(group, objective, *, examples=128, path="a.jsonl", encoder=None, **data):
    """The group, with experiment.json of a held-out task."""
    text = {"kind": "jsonl", "path": path}
    task = {"kind": "heldout_loss", "name": "heldout", "text": text, "objective": objective, "examples": examples}
    task |= {"encoder": encoder} if encoder else {}  # earlier versions had none
    record = {"eval": {"tasks": [{"name": "other", "objective": {"kind": "causal"}}, task]}, "data": data}
    return RunGroup(group.name, "#000", [replace(run, experiment=record) for run in group.runs])


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (asking(SCRATCH, PREFIX), True),
        (SCRATCH, True),  # nothing recorded
        # the end of the same chunk, whatever the model that predicts it
        (asking(SCRATCH, {"kind": "causal", "context": 0.5, "eos": True}), True),
        (asking(SCRATCH, SUFFIX), True),
        (asking(SCRATCH, {"kind": "prefix_lm", "prefix": 0.5, "eos": True}), True),  # of an earlier version
        (asking(SCRATCH, {"kind": "causal", "context": 0.0, "eos": True}), False),
        (asking(SCRATCH, {"kind": "causal", "context": 0.5, "eos": False}), False),
        (asking(SCRATCH, PREFIX | {"split_at": "text"}), False),
        (asking(SCRATCH, SUFFIX | {"tasks": [{"name": "spans", "rate": 0.5, "mean_span": 3.0}]}), False),
        (asking(SCRATCH, PREFIX, examples=64), False),
        (asking(SCRATCH, PREFIX, path="b.jsonl"), False),
        (asking(SCRATCH, PREFIX, chunk_tokens=255), False),
        (asking(SCRATCH, PREFIX | {"kind": "multimodal_prefix_lm"}), False),
        (asking(SCRATCH, PREFIX, encoder="visible"), True),
        (asking(SCRATCH, PREFIX, encoder="hidden"), False),
    ],
)
def test_losses_are_subtracted_only_of_equal_tasks(other, same):
    """A task of one name may be another one in another run: texts, which of their tokens, how many of them."""
    first = asking(ADAPTED, PREFIX, chunk_tokens=127)
    both = Comparison("", {"adapted": first, "scratch": other}, chosen=True)
    rows = dict(comparison.results([both], ["heldout"]).rows)
    sentences = comparison.findings([both], ["heldout"])
    report = Report("", Path(), both.groups, [both])
    [_, delta] = deltas.deltas(report)
    assert both.asking_another(LOSS) == ([] if same else ["scratch"])
    assert ("scratch − adapted, step 1" in rows) == same
    assert any(row.startswith("tokens until") for row in rows) == same
    assert (delta.difference is not None) == same
    if not same:
        assert rows["scratch − adapted"] == delta.direction == "another task"
        assert sentences == [
            "The held-out loss of scratch is of another task than that of adapted, so they are not compared."
        ]
    assert rows["scratch: loss at end"].startswith("1.667 ± "), "each arm's own loss stands there"


def test_shares_that_add_up_to_one_are_of_one_end():
    suffix = {"kind": "ul2", "tasks": [{"rate": 0.3, "mean_span": None}]}
    assert asking(SCRATCH, {"kind": "causal", "context": 0.7}).asks_as(asking(ADAPTED, suffix), LOSS)


def test_scores_of_files_of_tasks_are_compared_whatever_the_runs_own_tasks_are():
    groups = [asking(ADAPTED, PREFIX), asking(SCRATCH, {"kind": "causal", "context": 0.0})]
    assert groups[1].asks_as(groups[0], "eval/arc/accuracy")
    assert groups[1].asks_as(groups[0], "train/loss")
    assert not groups[1].asks_as(groups[0], "eval/heldout/bits_per_byte")


def test_a_curve_that_begins_late_was_there_at_some_time_before():
    """The first evaluation of a resumed run, or its only one, says when at the latest, and not when."""
    late = RunGroup(
        "late",
        "#000",
        [
            RunRecord("late", "#000", [{"step": 2, LOSS: loss, "train/tokens": 100}], None, None, [], True, seed=seed)
            for seed, loss in enumerate((2.5, 2.9, 3.5))
        ],
    )
    assert catch_up(late, ADAPTED, metric=LOSS, step=0).text() == (
        "2 of 3 seeds, after at most 200 and 200, the others not within 200"
    )
    late = RunGroup("late", "#000", late.runs[:2])
    assert catch_up(late, ADAPTED, metric=LOSS, step=0).text() == "at most 200"
