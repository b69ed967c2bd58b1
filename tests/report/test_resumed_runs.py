"""Tokens and FLOPs of runs that took over the state of another (init.resume)."""

import json

import pytest

from t5g2.report import comparison
from t5g2.report.comparison import Comparison
from t5g2.report.run_records import RunGroup, read_run

LOSS = "eval/heldout/loss"


def write(folder, steps, tokens, *, resume=None, done=True):
    """Writes the records of a run with one row a step: tokens, and twice as many FLOPs."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"step": s, LOSS: 2.0, "train/tokens": tokens, "flops_per_s": 2.0 * tokens, "steps_per_s": 1.0} for s in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "experiment.json").write_text(json.dumps({"init": {"resume": resume and str(resume)}}))
    if done:
        (folder / "done.json").write_text(json.dumps({"step": steps[-1]}))
    return folder


def test_a_second_stage_has_the_tokens_of_the_first(tmp_path):
    """113 updates of 2048 tokens, then 12 of 1400; not 125 of 1400."""
    first = write(tmp_path / "first", range(1, 114), 2048)
    run = read_run(write(tmp_path / "second", range(114, 126), 1400, resume=first), "second")
    assert run.tokens([114, 125]) == [113 * 2048 + 1400, 113 * 2048 + 12 * 1400]
    assert run.flops([125]) == [2 * (113 * 2048 + 12 * 1400)]
    assert run.counted_from == "with those of first"
    third = read_run(write(tmp_path / "third", [127], 10, resume=tmp_path / "second"), "third")
    assert third.tokens([127]) == [113 * 2048 + 12 * 1400 + 20]


def test_the_first_run_of_a_sweep_that_was_moved_is_beside_the_second(tmp_path):
    write(tmp_path / "first", range(1, 4), 10)
    run = read_run(write(tmp_path / "second", [4, 5], 1, resume="/gone/sweep/first"), "second")
    assert run.tokens([5]) == [32]


@pytest.mark.parametrize(
    "before",
    [
        lambda folder: folder / "first",  # its records are elsewhere
        lambda folder: write(folder / "first", range(1, 4), 10, done=False),  # its state may be one of before its end
        lambda folder: write(folder / "first", range(1, 9), 10),  # it went on after its state was taken over
        lambda folder: folder / "second",  # damaged
    ],
    ids=["missing", "unfinished", "longer", "itself"],
)
def test_without_records_of_the_first_run_counting_begins_at_the_first_logged_step(tmp_path, before):
    run = read_run(write(tmp_path / "second", range(4, 6), 1, resume=before(tmp_path)), "second")
    assert run.first is None
    assert run.tokens([3, 4, 5]) == [0, 1, 2]
    assert run.counted_from == "since step 4"


def test_a_run_that_was_resumed_in_its_own_folder_counts_from_its_beginning(tmp_path):
    run = read_run(write(tmp_path / "run", [2, 4], 10), "run")
    assert run.tokens([4]) == [40]
    assert run.counted_from == ""


def test_runs_that_took_over_each_others_state_are_read(tmp_path):
    write(tmp_path / "a", [1, 2], 10, resume=tmp_path / "b")
    write(tmp_path / "b", [2, 3], 10, resume=tmp_path / "a")
    assert read_run(tmp_path / "b", "b").tokens([3]) is not None


def test_the_table_says_what_tokens_are_counted_from(tmp_path):
    names = {"whole": None, "joined": tmp_path / "whole-s0", "cut": "/gone/other-s0"}
    folders = {
        name: write(tmp_path / f"{name}-s0", [3] if resume else [1, 2], 10, resume=resume)
        for name, resume in names.items()
    }
    groups = {name: RunGroup(name, "#000", [read_run(folder, name, seed=0)]) for name, folder in folders.items()}
    rows = dict(comparison.results([Comparison("", groups, chosen=True)], ["heldout"]).rows)
    assert rows["whole: tokens"] == "20"
    assert rows["joined: tokens"] == "30, with those of whole"
    assert rows["cut: tokens"] == "10, since step 3"
