"""A report of damaged files: what can be read is shown, and every problem is said in the page and in the text."""

import json
import shutil
from itertools import chain

import pytest

from t5g2.core.errors import UserError
from t5g2.report import contents, output, page, plots, tables
from tests.report.test_output import ACCOUNT, write_run

FILES = [
    "sweep.json",
    "a/metrics.jsonl",
    "a/experiment.json",
    "a/provenance.json",
    "a/done.json",
    "a/samples/20.jsonl",
    "a-eval/scores.json",
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sweep of two runs."""
    folder = tmp_path_factory.mktemp("sound") / "sweep"
    for name in ("a", "b"):
        write_run(folder / name, end=2.0, tokens=100, done={"step": 20}, provenance=ACCOUNT)
    parts = [{"name": n, "kind": "variant", "command": f"t5g2 train {n}", "group": n, "seed": 0} for n in ("a", "b")]
    step = {"kind": "step", "command": "t5g2 evaluate", "scores_of": "a", "seed": 0}
    parts.append(step | {"name": "a-eval", "result": "a-eval"})
    (folder / "a-eval").mkdir()
    scores = {"arc/accuracy": {"value": 0.5, "examples": 8}, "arc/query_flops": {"value": 1e9}}
    (folder / "a-eval" / "scores.json").write_text(json.dumps({"model": "m", "scores": scores}))
    paper = {"source": "a paper", "columns": ["model", "score"], "rows": [["1B", 66.6]], "note": ""}
    paper |= {"printed": {"first": 1.0, "second": 2.0}, "metric": "eval/heldout/loss", "same_metric": True}
    record = {"title": "two", "parts": parts, "compare": {"all": {"first": "a", "second": "b"}}, "paper": paper}
    (folder / "sweep.json").write_text(json.dumps(record))
    return folder


WHOLE = {
    "empty": b"",
    "blank": b" \n\n",
    "list": b"[]\n",
    "object": b"{}\n",
    "null": b"null\n",
    "number": b"7\n",
    "text": b'"text"\n',
    "nan": b"NaN\n",
    "long number": b"1" * 5000 + b"\n",
    "deep list": b"[" * 100_000 + b"\n",
    "deep object": b'{"a":' * 100_000 + b"\n",
    "closed and deep": b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}\n",
    "binary": bytes(range(256)) + b"\n",
    "zeros": bytes(64) + b"\n",
    "twice": b'{"step": 1, "step": 2}\n',
    "surrogate": b'{"step": 1, "prompt": "\\ud800", "title": "\\udc00"}\n',
    "utf-16": '{"step": 1}\n'.encode("utf-16"),
}
VALUES = [None, True, -1, 2**62, 1e300, "", "text", "\0", "../..", [], {}, [[]], [None], {"a": {}}]


def places(node, path=()):
    """Paths of everything inside; of a list, of the first two entries."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node[:2]) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def replaced(node, path, value):
    """A copy with another value at a path; with Ellipsis, without the entry."""
    node = json.loads(json.dumps(node))
    inner = node
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return node


def damages(data):
    """(label, bytes): other contents, cut off, and each value of its first record replaced by each of VALUES."""
    yield from WHOLE.items()
    for share in range(1, 10):
        yield f"{share} tenths", data[: len(data) * share // 10]
    first, *rest = data.split(b"\n") if data.count(b"\n{") else [data]
    record = json.loads(first)
    for path in places(record):
        for value in (..., *VALUES):
            line = json.dumps(replaced(record, path, value)).encode()
            yield f"{path} = {value}", b"\n".join([line, *rest])


@pytest.fixture
def no_drawing(monkeypatch):
    """Curves are read as for a plot, and not drawn, which takes a second."""

    def read(groups, metrics):
        for group in groups:
            for metric in metrics:
                assert all(type(value) in (int, float) for value in group.series(metric)[1])
        return "<svg></svg>"

    monkeypatch.setattr(
        plots, "compare", lambda sets, metric, unit: read([*chain.from_iterable(sets.values())], [metric])
    )
    monkeypatch.setattr(plots, "panels", lambda groups, metrics, **_: read(groups, metrics.values()))
    monkeypatch.setattr(
        plots, "along", lambda sets, metric, amounts, unit: read([*chain.from_iterable(sets.values())], [metric])
    )
    monkeypatch.setattr(plots, "frontier", lambda points, unit, higher_is_better: read((), ()))
    monkeypatch.setattr(plots, "training", lambda sets: read([*chain.from_iterable(sets.values())], ["train/loss"]))


@pytest.mark.parametrize("name", FILES)
def test_no_damage_ends_a_report(sound, tmp_path, name, no_drawing):
    folder = tmp_path / "sweep"
    shutil.copytree(sound, folder)
    data = (folder / name).read_bytes()
    for _label, content in damages(data):
        (folder / name).write_bytes(content)
        report = contents.read(folder)
        text = page.render(report)
        text.encode()
        tables.summary(report).lines()
        assert report.runs
        assert name == "sweep.json" or report.runs[-1].last("eval/heldout/loss") == 2.0
        assert all(problem.partition(":")[0].split(" ")[0] in text for problem in report.problems)


@pytest.mark.parametrize("name", FILES)
def test_what_is_damaged_is_left_out_and_named(sound, tmp_path, name, no_drawing, capsys):
    folder = tmp_path / "sweep"
    shutil.copytree(sound, folder)
    (folder / name).write_bytes(b'{"step": "?"\n[]\n')
    text = output.write(folder).read_text()
    assert f"Not read: {folder / name}" in text
    assert f"Not read: {folder / name}" in capsys.readouterr().out
    assert f"Not read: {folder / name}" in (folder / "report" / "table.md").read_text()
    assert "2.000" in text, "the other run is there"


def test_sound_files_have_no_problem(sound, no_drawing):
    report = contents.read(sound)
    assert report.problems == []
    assert [run.done for run in report.runs] == [True, True]
    assert "Not read" not in page.render(report)


def test_a_part_of_a_sweep_that_cannot_be_read_leaves_the_others(sound, tmp_path, no_drawing):
    folder = tmp_path / "sweep"
    shutil.copytree(sound, folder)
    record = json.loads((folder / "sweep.json").read_text())
    record["parts"][0]["seed"] = "0"
    (folder / "sweep.json").write_text(json.dumps(record))
    report = contents.read(folder)
    assert [run.name for run in report.runs] == ["b"]
    assert report.problems == [
        "sweep.json, part 0: 'seed' is not a number; it is left out",
        "sweep.json: 'compare' does not name variants, alone or as {title: {arm: variant}}; left out",
    ]


def test_a_line_of_metrics_that_cannot_be_read_leaves_the_others(tmp_path):
    """Of three damaged lines one is said in full; the last line, which is being written, is no damage."""
    lines = [
        '{"step": 1, "train/loss": 3.0}',
        '{"step": 2, "train/loss": [3]}',
        "{",
        '{"step": -1}',
        '{"step": 3, "tra',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    report = contents.read(tmp_path)
    assert report.runs[0].points("train/loss") == {1: 3.0}
    assert report.problems == [
        f"{tmp_path / 'metrics.jsonl'}: 3 lines are left out, the first of them line 2 (train/loss is not a number "
        f"up to 1e+30)"
    ]


def test_a_run_counts_as_done_only_by_a_sound_mark(sound, tmp_path):
    shutil.copytree(sound / "a", tmp_path / "a")
    (tmp_path / "a" / "done.json").write_text("")
    [run] = contents.read(tmp_path / "a").runs
    assert not run.done
    assert "done.json is not JSON (Expecting value at column 1); its content is left out" in run.problems[0]


def test_a_file_that_is_a_folder_or_a_dangling_link(sound, tmp_path, no_drawing):
    folder = tmp_path / "a"
    shutil.copytree(sound / "a", folder)
    for name in ("experiment.json", "provenance.json"):
        (folder / name).unlink()
    (folder / "experiment.json").mkdir()
    (folder / "provenance.json").symlink_to("nothing")
    report = contents.read(folder)
    assert [str(folder / "experiment.json") in p or str(folder / "provenance.json") in p for p in report.problems] == [
        True,
        True,
    ]
    page.render(report)


def test_a_sweep_whose_record_and_runs_are_lost_is_refused(tmp_path):
    (tmp_path / "sweep.json").write_text("null")
    with pytest.raises(UserError, match=r"sweep\.json holds NoneType, not an object.* has no runs; remove it, and run"):
        contents.read(tmp_path)
