"""The report as one HTML page that needs nothing else: style and plots are inside, nothing is loaded from anywhere.

Text becomes HTML through `tag` alone, which escapes it; so nothing that a run wrote can be read as markup.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

from t5g2.core.ranges import format_ranges
from t5g2.report import comparison, plots
from t5g2.report.contents import Report
from t5g2.report.markup import Html, document, figure, html_table, tag
from t5g2.report.run_records import RunGroup, RunRecord
from t5g2.report.tables import MEANS, different_settings, over_seeds, state, summary
from t5g2.report.text_table import NONE, TextTable

NOTHING = "-"  # in provenance.json: the source of a leaf that is initialised, the target of one that is dropped


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
    return document(report.title, body)


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


def _states(group: RunGroup) -> str:
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
        made.append(tag("div", tag("h2", "Results"), *about, html_table(table), tag("p", until, kind="quiet")))
    if printed:
        rows = [[str(c) for c in row] for row in printed["rows"]]
        note = tag("p", printed["note"], kind="quiet") if printed["note"] else None
        source = tag("p", printed["source"], kind="quiet")
        theirs = html_table(TextTable(list(printed["columns"]), rows), kind="numbers printed")
        made.append(tag("div", tag("h2", "What the paper printed"), source, theirs, note))
    return [tag("div", *made, kind="beside")] if made else []


def _means(report: Report) -> str:
    return f"{MEANS[0].upper()}{MEANS[1:]}." if report.seeded else ""


def runs(report: Report) -> list[Html]:
    """Every run, and the means over seeds before them."""
    made = []
    if report.seeded:
        made = [tag("h2", "Over seeds"), tag("p", _means(report), kind="quiet"), html_table(over_seeds(report))]
    return [*made, tag("h2", "Runs"), html_table(summary(report))]


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


def _sets(report: Report, title: str = "") -> dict[str, list[RunGroup]]:
    """{title: groups} of the comparisons; `title` for the one that has none, if it has several groups."""
    return {
        of.title or (title if len(of.arms) > 1 else next(iter(of.arms)) if title else ""): of.groups
        for of in report.comparisons
        if of.arms
    }


def _arms(report: Report, *, others: bool = False) -> dict[str, RunGroup]:
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
    prompts: dict[tuple[str, str], list[tuple[RunRecord, dict]]] = {}
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
        made.append(html_table(weights(account["leaves"]), kind="words"))
    return (
        made if len(made) > 1 else [*made, missing("No provenance.json: no run here was adapted from another model.")]
    )


def weights(leaves: Sequence[dict]) -> TextTable:
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
    return TextTable(["how", "source leaf", "target leaves", "layers", "shape of one"], lines)


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
    differing = different_settings(first) if len(first) > 1 else TextTable([], [])
    if differing.rows:
        of_seeds = " (of several seeds, the first)" if report.seeded else ""
        made += [tag("p", f"The settings in which the runs differ{of_seeds}:", kind="quiet")]
        made.append(html_table(differing, kind="words"))
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


def key(groups: Mapping[str, RunGroup]) -> Html:
    """Which colour is which."""
    return tag("div", *(tag("span", _dot(group.color), name) for name, group in groups.items()), kind="key")


def name_of(run: RunRecord) -> Html:
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
