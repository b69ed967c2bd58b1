"""The report as one HTML page that needs nothing else: style and plots are inside, nothing is loaded from anywhere.

Text becomes HTML through `tag` alone, which escapes it; so nothing that a run wrote can be read as markup.
"""

import html
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

from t5g2.core.ranges import format_ranges
from t5g2.report import comparison, plots
from t5g2.report.comparison import NONE, Table
from t5g2.report.contents import MEANS, Report, different_settings, over_seeds, state, summary
from t5g2.report.run_records import Group, Run

STYLE = """
:root { color-scheme: light dark; --text: #23272e; --quiet: #6a7280; --line: #e3e6ea; --back: #fcfcfb;
  --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --text: #d9dde3; --quiet: #949ca8; --line: #2f343c; --back: #16181c; --card: #1d2025; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
h1 { font-size: 2rem; font-weight: 650; letter-spacing: -0.015em; margin: 0 0 0.3rem; line-height: 1.2; }
h2 { font-size: 1.2rem; font-weight: 620; margin: 3.2rem 0 0.4rem; letter-spacing: -0.005em; }
h3 { font-size: 0.95rem; font-weight: 600; margin: 1.6rem 0 0.4rem; }
p { margin: 0.3rem 0 0.9rem; max-width: 46rem; }
.quiet, figcaption { color: var(--quiet); font-size: 0.9rem; }
.finding { font-size: 1.12rem; margin-top: 1.2rem; }
code, pre, .text { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 0.82rem; }
figure { margin: 1rem 0 0; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: inherit !important; }
.key { display: flex; flex-wrap: wrap; gap: 0.2rem 1.4rem; font-size: 0.9rem; margin: 0.8rem 0 0; }
.dot { display: inline-block; width: 0.7rem; height: 0.7rem; border-radius: 50%; margin-right: 0.45rem; }
.beside { display: flex; flex-wrap: wrap; gap: 0 2.5rem; }
.beside > div { flex: 1 1 0; min-width: min(100%, 28rem); }
.beside th, .beside td { padding-right: 0.55rem; }
.beside td:first-child { white-space: normal; padding-right: 1rem; }
.beside .printed td:first-child { white-space: nowrap; }
.wide { overflow-x: auto; margin: 0.9rem 0; }
table { border-collapse: collapse; font-size: 0.86rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.42rem 0.95rem 0.42rem 0; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 550; color: var(--quiet); vertical-align: bottom; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
td:first-child { font-weight: 550; white-space: nowrap; padding-right: 2.2rem; }
.words td { font-weight: 400; }
.numbers td { white-space: nowrap; }
details { margin: 0.8rem 0; }
summary { cursor: pointer; color: var(--quiet); font-size: 0.9rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0.9rem 1.1rem;
  overflow-x: auto; margin: 0.6rem 0; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 0.95rem 1.15rem;
  margin: 0.9rem 0; display: grid; grid-template-columns: 7.5rem 1fr; gap: 0.5rem 1rem; }
.sample .who { font-size: 0.84rem; color: var(--quiet); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.45; }
mark { background: none; color: #b0703a; font-weight: 600; }
.tiles { display: flex; flex-wrap: wrap; gap: 0.6rem 2.4rem; margin: 0.9rem 0 0.4rem; }
.tiles b { display: block; font-size: 1.5rem; font-weight: 620; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--quiet); font-size: 0.86rem; }
@media (max-width: 640px) { .sample { grid-template-columns: 1fr; } main { padding-top: 2rem; } }
"""


NOTHING = "-"  # in provenance.json: the source of a leaf that is initialised, the target of one that is dropped


class Html(str):
    """Text that is markup already."""


def tag(name: str, *children: str | None, **attributes: str) -> Html:
    """An element; children that are not Html are escaped, None is left out. `kind` becomes the class.

    >>> tag("p", "a < b", tag("b", "!"), kind="quiet")
    '<p class="quiet">a &lt; b<b>!</b></p>'
    """
    inner = "".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children if c is not None)
    names = {"kind": "class"}
    given = "".join(f' {names.get(k, k)}="{html.escape(v)}"' for k, v in attributes.items())
    return Html(f"<{name}{given}>{inner}</{name}>")


def render(report: Report) -> str:
    """The page."""
    sections: Sequence[Callable[[Report], list[Html]]] = (
        header,
        held_out,
        results,
        runs,
        denoisers,
        training,
        samples,
        provenance,
        throughput,
        configuration,
        commands,
    )
    body = tag("main", *chain.from_iterable(section(report) for section in sections))
    head = tag(
        "head",
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'),
        tag("title", report.title),
        tag("style", Html(STYLE)),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", body), lang="en") + "\n"


def header(report: Report) -> list[Html]:
    """Title, what stands where, and the findings in words if runs are compared."""
    kind = f"A sweep of {len(report.runs)} runs" if report.sweep else "A run"
    states = ", ".join(_states(group) for group in report.groups)
    sentences = comparison.findings(report.comparisons, list(report.tasks(report.compared)))
    return [
        tag("h1", report.title),
        tag("p", f"{kind} in {report.folder}: {states}.", kind="quiet"),
        *(tag("p", text, kind="finding") for text in sentences),
    ]


def _states(group: Group) -> str:
    if not group.seeded:
        return f"{group.name} {state(group.runs[0])}"
    states = Counter(map(state, group.runs))
    return f"{group.name} {' and '.join(f'{count} {what}' for what, count in states.items())}"


def held_out(report: Report) -> list[Html]:
    """The curves over all denoisers."""
    made = []
    tasks = list(report.tasks(report.compared))
    # what was measured once is no curve, and the table has it
    curves = [t for t in tasks if any(len(run.series(f"eval/{t}/loss")[0]) > 1 for run in report.compared)]
    for task in curves or tasks:
        metric = f"eval/{task}/loss"
        begun = {title: of for title, of in _sets(report).items() if any(group.steps(metric) for group in of)}
        plot = plots.compare(begun, metric, "nats per token")
        thin = " Thin: single seeds; strong: their mean." if report.seeded else ""
        made += [
            tag("h2", _of(task, "Held-out loss")),
            key(_arms(report)),
            figure(
                plot,
                "Mean over the denoisers, weighted with their shares of the mixture; sentinels are not counted. "
                f"Lower is better; step 0 is before the first update.{thin}",
            ),
        ]
    return made or [
        tag("h2", "Held-out loss"),
        missing("No evaluation has been recorded yet (eval/…/loss in metrics.jsonl)."),
    ]


def results(report: Report) -> list[Html]:
    """What the comparison gave, and beside it what a paper printed."""
    made, printed = [], report.sweep and report.sweep["paper"]
    table = comparison.results(report.comparisons, list(report.tasks(report.compared)))
    if table is not None:
        about = [tag("p", f"Held-out loss in nats per token. {_means(report)}", kind="quiet")]
        until = "Tokens are the trained ones of encoder and decoder; the loss between evaluations is a straight line."
        made.append(tag("div", tag("h2", "Results"), *about, table_of(table), tag("p", until, kind="quiet")))
    if printed:
        rows = [[str(c) for c in row] for row in printed["rows"]]
        note = tag("p", printed["note"], kind="quiet") if printed["note"] else None
        source = tag("p", printed["source"], kind="quiet")
        theirs = table_of(Table(list(printed["columns"]), rows), kind="numbers printed")
        made.append(tag("div", tag("h2", "What the paper printed"), source, theirs, note))
    return [tag("div", *made, kind="beside")] if made else []


def _means(report: Report) -> str:
    return f"{MEANS[0].upper()}{MEANS[1:]}." if report.seeded else ""


def runs(report: Report) -> list[Html]:
    """Every run, and the means over seeds before them."""
    made = []
    if report.seeded:
        made = [tag("h2", "Over seeds"), tag("p", _means(report), kind="quiet"), table_of(over_seeds(report))]
    return [*made, tag("h2", "Runs"), table_of(summary(report))]


def denoisers(report: Report) -> list[Html]:
    """The same, one small plot a denoiser."""
    made = []
    for task, names in report.tasks(report.compared).items():
        if len(names) > 1:
            metrics = {name: f"eval/{task}/loss/{name}" for name in names}
            made.append(tag("h2", _of(task, "By denoiser")))
            for of in report.comparisons:
                made += [tag("h3", of.title)] if of.title else []
                made += [key(of.arms), figure(plots.panels(of.groups, metrics), "Nats per token, each its own scale.")]
    return made


def training(report: Report) -> list[Html]:
    """Training losses: the compared groups together, each other group alone."""
    sets = _sets(report, "compared")
    sets |= {group.name: [group] for group in report.groups if group not in report.compared}
    sets = {name: groups for name, groups in sets.items() if any(g.series("train/loss")[0] for g in groups)}
    if not sets:
        return [tag("h2", "Training loss"), missing("No training loss has been recorded yet (train/loss).")]
    caption = "Pale: every logged step; strong: a running median. Held-out losses are dots."
    return [tag("h2", "Training loss"), key(_arms(report, others=True)), figure(plots.training(sets), caption)]


def _sets(report: Report, title: str = "") -> dict[str, list[Group]]:
    """{title: groups} of the comparisons; `title` for the one that has none, if it has several groups."""
    return {
        of.title or (title if len(of.arms) > 1 else next(iter(of.arms)) if title else ""): of.groups
        for of in report.comparisons
        if of.arms
    }


def _arms(report: Report, *, others: bool = False) -> dict[str, Group]:
    """{name: a group of that colour} of the arms of all comparisons, and of the other groups if wanted."""
    arms = {arm: group for of in reversed(report.comparisons) for arm, group in of.arms.items()}
    rest = [group for group in report.groups if others and group not in report.compared]
    return arms | {group.name: group for group in rest}


def samples(report: Report) -> list[Html]:
    """What the runs made of the same prompts; of several seeds, the first."""
    first = (next((run for run in group.runs if run.samples), None) for group in report.groups)
    runs = [run for run in first if run is not None]
    if not runs:
        return [tag("h2", "Samples"), missing("No samples have been written yet (samples/*.jsonl).")]
    prompts: dict[tuple[str, str], list[tuple[Run, dict]]] = {}
    for run in runs:
        for row in run.samples:
            prompts.setdefault((str(row.get("kind", "sample")), str(row.get("prompt", ""))), []).append((run, row))
    made, before = [tag("h2", "Samples"), tag("p", "From held-out text, as they came.", kind="quiet")], None
    headings = {"completion": "Completions", "filling": "Span fillings"}
    for (kind, prompt), answers in sorted(prompts.items(), key=lambda item: item[0][0]):
        if kind != before:
            made.append(tag("h3", headings.get(kind, kind)))
            before = kind
        lines = [("prompt", prompt), *((run, row.get("output", "")) for run, row in answers)]
        reference = next((row["reference"] for _, row in answers if row.get("reference")), None)
        if reference is not None:
            lines.append(("the text itself", reference))
        cells = [
            (tag("div", who if isinstance(who, str) else name_of(who), kind="who"), spoken(text)) for who, text in lines
        ]
        made.append(tag("div", *chain.from_iterable(cells), kind="sample"))
    return made


def provenance(report: Report) -> list[Html]:
    """Where every weight of the adapted runs comes from; of several seeds, the first."""
    made = [tag("h2", "Where the weights come from")]
    for run in (next((run for run in group.runs if run.provenance is not None), None) for group in report.groups):
        if run is None:
            continue
        account = run.provenance
        if not isinstance(account, dict) or "leaves" not in account:
            made += [tag("h3", name_of(run)), tag("pre", json.dumps(account, indent=2))]
            continue
        counts = Counter(leaf["how"] for leaf in account["leaves"])
        tiles = [tag("div", tag("b", str(count)), tag("span", how)) for how, count in counts.items()]
        about = f"Recipe {account['recipe']}, from {account['source']}; target leaves by what became of them:"
        changed = [tag("p", f"Changed: {line}", kind="quiet") for line in account["settings"]]
        made += [tag("h3", name_of(run)), tag("p", about, kind="quiet"), tag("div", *tiles, kind="tiles"), *changed]
        made.append(table_of(weights(account["leaves"]), kind="words"))
    return (
        made if len(made) > 1 else [*made, missing("No provenance.json: no run here was adapted from another model.")]
    )


def weights(leaves: Sequence[dict]) -> Table:
    """The account of an adaptation, a line a source leaf; those that differ in the layer alone are one line."""
    by_source: dict[tuple[str, str], list[dict]] = {}
    for leaf in leaves:
        alone = leaf["target"] if leaf["source"] == NOTHING else ""  # every initialised leaf is a line of its own
        by_source.setdefault((leaf["source"], alone), []).append(leaf)
    grouped: dict[tuple, list[int]] = {}
    for (source, _), uses in by_source.items():
        path, layer = _layer(source if source != NOTHING else uses[0]["target"])
        how = ", ".join(dict.fromkeys(use["how"] for use in uses))
        targets = [(_layer(use["target"])[0], use["note"]) for use in uses]
        into = ", ".join(target + (f" ({note})" if note else "") for target, note in targets)
        key = (how, path if source != NOTHING else NONE, into, uses[0]["shape"])
        grouped.setdefault(key, []).extend([] if layer is None else [layer])
    lines = [
        [how, path, into, format_ranges(sorted(layers)) or NONE, shape]
        for (how, path, into, shape), layers in grouped.items()
    ]
    return Table(["how", "source leaf", "target leaves", "layers", "shape of one"], lines)


def _layer(name: str) -> tuple[str, int | None]:
    """("layers.attention.q", 7) of "layers.attention.q.7"."""
    path, _, last = name.rpartition(".")
    return (path, int(last)) if last.isdigit() else (name, None)


def throughput(report: Report) -> list[Html]:
    """Tokens a second, MFU, padding and memory by step."""
    wanted = {
        "tokens/s": "tokens_per_s",
        "MFU": "mfu",
        "padding, encoder": "padding/encoder",
        "padding, decoder": "padding/decoder",
        "memory of a device, GiB": "memory/device_gib",
        "memory of the process, GiB": "memory/host_gib",
    }
    found = {title: m for title, m in wanted.items() if any(group.series(m)[0] for group in report.groups)}
    if not found:
        return [
            tag("h2", "Speed, padding, memory"),
            missing("None of tokens_per_s, padding/… and memory/… is recorded yet."),
        ]
    text = "Tokens are those that are no padding, encoder and decoder together; padding is a share of all slots."
    return [
        tag("h2", "Speed, padding, memory"),
        key(_arms(report, others=True)),
        figure(plots.panels(report.groups, found, from_zero=True), text),
    ]


def configuration(report: Report) -> list[Html]:
    """What differs between the runs, and every resolved config."""
    runs = [run for run in report.runs if run.experiment is not None]
    if not runs:
        return [tag("h2", "Configuration"), missing("No experiment.json has been written yet.")]
    made = [tag("h2", "Configuration")]
    first = [of[0] for group in report.groups if (of := [run for run in group.runs if run in runs])]
    differing = different_settings(first) if len(first) > 1 else Table([], [])
    if differing.rows:
        of_seeds = " (of several seeds, the first)" if report.seeded else ""
        made += [tag("p", f"The settings in which the runs differ{of_seeds}:", kind="quiet")]
        made.append(table_of(differing, kind="words"))
    for run in runs:
        text = json.dumps(run.experiment, indent=2)
        made.append(tag("details", tag("summary", f"{run.name}: every setting"), tag("pre", text)))
    return made


def commands(report: Report) -> list[Html]:
    """The ordinary commands that a sweep ran."""
    if report.sweep is None:
        return []
    lines = "\n".join(part["command"] for part in report.sweep["parts"])
    return [
        tag("h2", "Commands"),
        tag("p", "Each of them can be run alone, in this order.", kind="quiet"),
        tag("pre", lines),
    ]


def table_of(table: Table, *, kind: str = "numbers") -> Html:
    """A table; wide ones scroll by themselves."""
    head = tag("tr", *(tag("th", column) for column in table.columns))
    rows = [tag("tr", *(tag("td", cell) for cell in row)) for row in table.rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows), kind=kind), kind="wide")


def figure(svg: str, caption: str) -> Html:
    """A plot and what it shows."""
    return tag("figure", Html(svg), tag("figcaption", caption))


def key(groups: Mapping[str, Group]) -> Html:
    """Which colour is which."""
    return tag("div", *(tag("span", _dot(group.color), name) for name, group in groups.items()), kind="key")


def name_of(run: Run) -> Html:
    """The run's name with its colour."""
    return tag("span", _dot(run.color), run.name)


def spoken(text: str) -> Html:
    """Text as a model read or said it, sentinels set apart."""
    parts = re.split(r"(<sentinel_\d+>)", str(text))
    marked = [tag("mark", part) if re.fullmatch(r"<sentinel_\d+>", part) else part for part in parts]
    return tag("div", *marked, kind="text")


def missing(text: str) -> Html:
    """What is not there."""
    return tag("p", text, kind="quiet")


def _of(task: str, what: str) -> str:
    """A heading that names the task unless it is the one that everybody has."""
    return what if task == "heldout" else f"{what} ({task})"


def _dot(color: str) -> Html:
    return tag("i", kind="dot", style=f"background:{color}")
