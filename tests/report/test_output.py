"""The report of what is there: numbers, page, csv; nothing loaded, everything escaped, gaps named."""

import csv
import html
import json
import re
import xml.dom.minidom
from html.parser import HTMLParser

import pytest

from t5g2.core.errors import UserError
from t5g2.report import contents, markup, output, plots, tables
from t5g2.report.run_records import RunGroup, RunRecord
from t5g2.report.text_table import TextTable

DENOISERS = {"mu3_r15": 1.0, "suffix_r75": 4.0}


def write_run(folder, *, end, steps=20, sample="of the text", tokens=None, **files):
    """A run as the trainer leaves it; the held-out loss falls from end + 3 to end. `tokens` of each step, if given."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(0, steps + 1, 5):
        if step % 10 == 0:
            loss = end + 3 * (1 - step / steps)
            rows.append({"step": step, "wall": 100.0 + step, "eval/heldout/loss": loss})
            rows[-1] |= {f"eval/heldout/loss/{name}": loss + 0.1 * i for i, name in enumerate(DENOISERS)}
        if step:
            rows.append({"step": step, "wall": 101.0 + step, "train/loss": end + 1, "tokens_per_s": 1000.0 * step})
            rows[-1] |= {} if tokens is None else {"train/tokens": tokens}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "experiment.json").write_text(json.dumps({"train": {"steps": steps}, "init": {"adapt": folder.name}}))
    (folder / "samples").mkdir()
    rows = [{"kind": "completion", "prompt": "The for <b>statement</b>", "output": sample, "reference": "is"}]
    rows += [{"kind": "filling", "prompt": "a <sentinel_0> c", "output": "<sentinel_0>b", "reference": None}]
    (folder / "samples" / "5.jsonl").write_text('{"prompt": "old"}\n')
    (folder / "samples" / "20.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut')
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


@pytest.fixture
def sweep(tmp_path):
    folder = tmp_path / "sweep"
    write_run(folder / "adapted", end=2.0, done={"step": 20}, provenance=ACCOUNT)
    write_run(folder / "scratch", end=2.5, sample="<script>alert(1)</script>")
    parts = [
        {"name": name, "kind": "variant", "command": f"t5g2 train --workdir={name}", "result": f"{name}/done.json"}
        for name in ("adapted", "scratch", "later")
    ]
    paper = {"source": "arXiv 1 & 2", "columns": ["model", "score"], "rows": [["1B-1B", 66.6]], "note": "as printed"}
    record = {"title": "A < B", "parts": parts, "compare": ["adapted", "scratch"], "paper": paper}
    (folder / "sweep.json").write_text(json.dumps(record))
    return folder


def leaf(how, source, target, shape, note=""):
    return {"target": target, "how": how, "source": source, "shape": shape, "note": note}


ACCOUNT = {
    "recipe": "merged",
    "source": "runs/source",
    "settings": ["window: 4 -> 5"],
    "notes": ["weights were quantised: 3 tensors are Q8_0, of 9"],
    "leaves": [
        *(
            leaf("copied", f"layers.q.{i}", f"{s}.layers.q.{i}", "[8]")
            for i in (0, 1, 3)
            for s in ("encoder", "decoder")
        ),
        leaf("initialised", "-", "embedder.eoi", "[9]", "zeros"),
        leaf("initialised", "-", "decoder.gate.2", "[7]"),
        leaf("dropped", "head.bias", "-", "[5]"),
    ],
}


def test_a_sweep_becomes_a_page_a_table_and_a_csv(sweep, capsys):
    page = output.write(sweep)
    assert page == sweep / "report" / "index.html"
    printed = capsys.readouterr().out
    table = (sweep / "report" / "table.md").read_text()
    assert table in printed
    assert printed.endswith(f"\nreport: {page}\n")
    assert table.splitlines() == [
        "|                        | adapted |    scratch |       later |",
        "| ---------------------- | ------: | ---------: | ----------: |",
        "| state                  |    done | unfinished | not started |",
        "| step                   |      20 |         20 |           – |",
        "| held-out loss at start |   5.000 |      5.500 |           – |",
        "| held-out loss at end   |   2.000 |      2.500 |           – |",
        "| · mu3_r15              |   2.000 |      2.500 |           – |",
        "| · suffix_r75           |   2.100 |      2.600 |           – |",
        "| train loss at end      |   3.000 |      3.500 |           – |",
        "| tokens/s               |   12.5k |      12.5k |           – |",
        "| time                   |    0:21 |       0:21 |           – |",
    ]
    with open(sweep / "report" / "metrics.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["run", "step", "wall", "metric", "value"]
    assert ["scratch", "10", "110.0", "eval/heldout/loss/suffix_r75", "4.1"] in rows
    assert len(rows) == 1 + 2 * (3 * 3 + 4 * 2)


def test_the_page_loads_nothing_and_escapes_everything(sweep):
    text = output.write(sweep).read_text()
    assert not re.search(r"(src|href|action)=[\"'](?!#)", text)  # references within the page only
    assert not re.search(r"@import|<script|<iframe|<link|javascript:", text)
    assert not [url for url in re.findall(r"url\(([^)]*)\)", text) if not url.startswith("#")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "The for &lt;b&gt;statement&lt;/b&gt;" in text
    assert "<h1>A &lt; B</h1>" in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        xml.dom.minidom.parseString(svg)


class Nesting(HTMLParser):
    """Fails if tags are not closed in the order in which they were opened."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_shows_each_part(sweep):
    text = output.write(sweep).read_text()
    parser = Nesting()
    parser.feed(text)
    assert parser.open == []
    found = re.sub(r"<style>.*?</style>|<[^>]+>", " ", text, flags=re.DOTALL)
    found = re.sub(r"\s+", " ", found)
    for part in (
        "At step 20 the held-out loss of adapted is 2.000 and that of scratch 2.500 nats per token",
        "adapted is below scratch at 3 of 3 evaluations",
        "By denoiser",
        "Numbers printed in the paper arXiv 1 &amp; 2",
        "66.6",
        "Training loss",
        "Span fillings",
        "reference",
        "leaves by operation: 6 copied 2 initialised 1 dropped Changed: window: 4 -&gt; 5 "
        "Source: weights were quantised: 3 tensors are Q8_0, of 9",
        "copied layers.q encoder.layers.q, decoder.layers.q 0-1, 3 [8]",
        "initialised – embedder.eoi (zeros) – [9]",
        "initialised – decoder.gate 2 [7]",
        "dropped head.bias - – [5]",
        "init.adapt adapted scratch",  # the setting that differs
        "t5g2 train --workdir=adapted",
    ):
        assert part in found, part
    assert "<mark>&lt;sentinel_0&gt;</mark>" in text
    assert "old" not in found.split()  # only the newest samples


ENDS = {"adapted": (2.0, 2.1, 2.2), "scratch": (2.5, 2.6, 2.7)}


@pytest.fixture
def seeded(tmp_path):
    """Two arms under three seeds, each 20 steps of 100 tokens; the last seed of scratch has only begun."""
    folder, parts = tmp_path / "seeds", []
    for arm, ends in ENDS.items():
        for seed, end in enumerate(ends):
            name = f"{arm}-s{seed}"
            done = {} if name == "scratch-s2" else {"done": {"step": 20}}
            write_run(folder / name, end=end, steps=20 if done else 5, tokens=100, provenance=ACCOUNT, **done)
            command = f"t5g2 train --workdir={name}"
            parts.append({"name": name, "kind": "variant", "command": command, "result": f"{name}/done.json"})
            parts[-1] |= {"group": arm, "seed": seed}
    record = {"title": "Seeds", "parts": parts, "compare": list(ENDS), "paper": None}
    (folder / "sweep.json").write_text(json.dumps(record))
    return folder


def test_a_sweep_of_seeds_has_means_with_intervals_and_the_single_runs(seeded, capsys):
    """Half widths: 2.0, 2.1, 2.2 have 4.3027 * 0.1 / sqrt(3), and 2.5, 2.6 have 12.7062 * sqrt(0.005) / sqrt(2)."""
    output.write(seeded)
    text = (seeded / "report" / "table.md").read_text()
    assert text in capsys.readouterr().out
    results, means, runs = text.split("|\n\n")
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in results.splitlines() if line.startswith("| ")]
    rows = dict(cells)
    assert results.startswith("Results, mean ± half of its 95 % interval over seeds, t(n - 1) s / sqrt(n)")
    assert rows["adapted: loss at end"] == "2.100 ± 0.248"
    assert rows["scratch: loss at end"] == "2.550 ± 0.635"
    assert rows["scratch − adapted, step 20"] == "+0.500 ± 0.000"  # both go up by as much with the seed
    assert rows["tokens until scratch is at adapted's start"] == "333 ± 0"  # 3 nats in 2000 tokens
    assert rows["tokens until scratch is at adapted's end"] == "not within 2k"
    assert "| seeds                  |        3 of 3 |        2 of 3 |" in means
    assert "| held-out loss at end   | 2.100 ± 0.248 | 2.550 ± 0.635 |" in means
    assert "| scratch-s2 | unfinished |" in runs


def test_the_page_of_a_sweep_of_seeds(seeded):
    text = output.write(seeded).read_text()
    parser = Nesting()
    parser.feed(text)
    assert parser.open == []
    found = re.sub(r"<style>.*?</style>|<[^>]+>", " ", text, flags=re.DOTALL)
    found = re.sub(r"\s+", " ", found)
    for part in (
        "adapted 3 done, scratch 2 done and 1 unfinished",
        "of adapted is 2.100 ± 0.248 and that of scratch 2.550 ± 0.635 nats per token, a difference of 0.500 ± 0.000 "
        "over 2 seeds; adapted is below scratch at 3 of 3 evaluations.",
        "until scratch is at adapted's start (5.100 ± 0.248): 333 ± 0; at adapted's end (2.100 ± 0.248): not within 2k",
        "Thin: single seeds; strong: their mean.",
        "The settings in which the runs differ (of several seeds, the first)",
    ):
        assert part in html.unescape(found), part
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        xml.dom.minidom.parseString(svg)
    weights = text[text.index("Origin of the weights") : text.index("Speed, padding, memory")]
    assert "adapted-s0" in weights
    assert "adapted-s1" not in weights


def test_a_single_run_has_a_report_too(tmp_path, capsys):
    write_run(tmp_path / "run", end=2.0, done={"step": 20})
    text = output.write(tmp_path / "run").read_text()
    assert "| state                  | done |" in capsys.readouterr().out.replace("  done", " done")
    assert "evaluations" not in text  # nothing to compare with


@pytest.mark.parametrize("missing", ["metrics.jsonl", "experiment.json", "samples", "provenance.json"])
def test_what_is_missing_is_named(tmp_path, missing):
    folder = tmp_path / "run"
    write_run(folder, end=2.0, provenance=ACCOUNT)
    if missing == "samples":
        for file in (folder / "samples").iterdir():
            file.unlink()
    else:
        (folder / missing).unlink()
    text = output.write(folder).read_text()
    sentences = {
        "metrics.jsonl": "No training loss has been recorded yet",
        "experiment.json": "No experiment.json has been written yet",
        "samples": "No samples have been written yet",
        "provenance.json": "No provenance.json",
    }
    for name, sentence in sentences.items():
        assert (sentence in text) == (name == missing), name


def test_a_provenance_of_another_kind_is_shown_as_it_is(tmp_path):
    write_run(tmp_path / "run", end=2.0, provenance={"imported from": "<hub>"})
    text = output.write(tmp_path / "run").read_text()
    assert "{\n  &quot;imported from&quot;: &quot;&lt;hub&gt;&quot;\n}" in text


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    (tmp_path / "experiment.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "wall": 1.0, "train/loss": null}\n{"step": 2, "wa')
    text = output.write(tmp_path).read_text()
    assert "No evaluation has been recorded yet" in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no folder .*; give the --workdir of a run or of a sweep"),
        (lambda folder: folder.mkdir(), "is not a workdir: it has neither metrics.jsonl nor experiment.json"),
        (lambda folder: (folder.mkdir(), (folder / "sweep.json").write_text("{")), "sweep.json is not JSON"),
    ],
)
def test_a_folder_that_is_no_workdir_is_refused(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        output.write(tmp_path / "x")
    assert not (tmp_path / "x" / "report").exists()


def made(folder, *runs):
    """A report of runs of their own."""
    return contents.Report("x", folder, [RunGroup(run.name, run.color, [run]) for run in runs], [])


def test_many_runs_are_rows(tmp_path):
    runs = [RunRecord(f"run{i}", "#000", [{"step": 1, "train/loss": 1.5}], None, None, [], True) for i in range(6)]
    table = tables.summary(made(tmp_path, *runs))
    assert table.columns == ["run", "state", "step", "train loss at end"]
    assert table.rows[5] == ["run5", "done", "1", "1.500"]


def test_a_series_takes_the_last_row_of_a_step_and_leaves_null_out():
    rows = [{"step": 2, "a": 1.0}, {"step": 1, "a": None}, {"step": 2, "a": 3.0}, {"step": 0, "b": 1.0, "a": 5.0}]
    run = RunRecord("x", "#000", rows, None, None, [], False)
    assert run.series("a") == ([0, 2], [5.0, 3.0])
    assert (run.at_start("a"), run.last("a"), run.last("c")) == (5.0, 3.0, None)


def test_what_is_measured_at_the_end_only_has_no_start(tmp_path):
    rows = [{"step": 0, "eval/heldout/loss": 5.0}, {"step": 9, "eval/heldout/loss": 3.0, "eval/suffix/loss": 2.0}]
    run = RunRecord("x", "#000", rows, None, None, [], True)
    table = dict(tables.summary(made(tmp_path, run)).rows)
    assert (table["held-out loss at start"], table["held-out loss at end"]) == ("5.000", "3.000")
    assert table["suffix loss at end"] == "2.000"
    assert "suffix loss at start" not in table


def test_the_time_leaves_out_what_a_stop_lasted():
    rows = [{"step": s, "wall": w} for s, w in ((0, 0.0), (1, 60.0), (1, 90_000.0), (2, 90_030.0))]
    assert RunRecord("x", "#000", rows, None, None, [], False).seconds == 90.0


def test_a_table_is_aligned():
    assert TextTable(["a", "long"], [["name", "1"]]).lines() == [
        "| a    | long |",
        "| ---- | ---: |",
        "| name |    1 |",
    ]


def test_the_running_median_follows_drops_and_ignores_spikes():
    assert plots.smooth([9, 1, 8, 1, 7]) == [5.0, 8, 1, 7, 4.0]
    assert plots.smooth([5.0] * 30 + [50.0] + [1.0] * 30)[28:33] == [5.0, 5.0, 5.0, 1.0, 1.0]
    assert plots.smooth([]) == []


def test_labels_are_moved_apart():
    assert plots._apart([1, 1.02, 5], 0.5) == pytest.approx([0.76, 1.26, 5])


def test_tags_escape_children_and_attributes():
    made = markup.tag("p", "a < b", markup.tag("b", "!"), None, kind='x"y')
    assert made == '<p class="x&quot;y">a &lt; b<b>!</b></p>'


@pytest.mark.parametrize(
    ("points", "higher", "kept"),
    [
        ([(1, 5.0), (2, 6.0), (3, 4.0), (3, 4.5)], False, [(1, 5.0), (3, 4.0)]),
        ([(1, 5.0), (2, 6.0), (3, 4.0)], True, [(1, 5.0), (2, 6.0)]),
        ([(2, 1.0), (1, 1.0)], True, [(1, 1.0)]),
        ([], True, []),
    ],
)
def test_the_points_that_no_other_one_beats(points, higher, kept):
    assert plots.not_beaten(points, higher_is_better=higher) == kept
