"""The report as one HTML page: style and plots are inside, and no other file is loaded."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

from t5g2.core.ranges import format_ranges
from t5g2.report import comparison, plots, result_tables
from t5g2.report.contents import Report
from t5g2.report.cost_sections import by_amount, frontier
from t5g2.report.markup import Html, document, figure, html_table, tag
from t5g2.report.page_parts import (
    UNIT,
    arms_of,
    asking_another,
    groups_by_title,
    heading,
    legend,
    note_missing,
    run_label,
    sample_text,
)
from t5g2.report.result_tables import ResultTable
from t5g2.report.run_records import RunGroup, RunRecord
from t5g2.report.tables import MEANS, different_settings, state
from t5g2.report.text_table import NONE, TextTable

NOTHING = "-"  # in provenance.json: the source of a leaf that is initialised, the target of one that is dropped


def render(report: Report) -> str:
    """Returns the page."""
    sections: Sequence[Callable[[Report], list[Html]]] = (
        header,
        held_out,
        by_amount,
        results,
        frontier,
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
    """Returns the title, the state of the runs, the findings in words if runs are compared, and what cannot be read."""
    kind = f"A sweep of {len(report.runs)} runs" if report.sweep else "A run"
    states = ", ".join(_states(group) for group in report.groups)
    sentences = comparison.findings(report.comparisons, list(report.tasks(report.compared)))
    return [
        tag("h1", report.title),
        tag("p", f"{kind} in {report.folder}: {states}.", kind="quiet"),
        *(tag("p", text, kind="finding") for text in sentences),
        *(tag("p", f"Not read: {problem}", kind="finding") for problem in report.problems),
    ]


def _states(group: RunGroup) -> str:
    if not group.has_seeds:
        return f"{group.name} {state(group.runs[0])}"
    states = Counter(map(state, group.runs))
    return f"{group.name} {' and '.join(f'{count} {name}' for name, count in states.items())}"


def held_out(report: Report) -> list[Html]:
    """Returns the curves of held-out losses over all denoisers."""
    parts = []
    tasks = list(report.tasks(report.compared))
    # a loss that was measured once is no curve, and is in the table anyway
    curves = [t for t in tasks if any(len(run.series(f"eval/{t}/loss")[0]) > 1 for run in report.compared)]
    for task in curves or tasks:
        metric = f"eval/{task}/loss"
        by_title = groups_by_title(report).items()
        started = {title: groups for title, groups in by_title if any(group.steps(metric) for group in groups)}
        plot = plots.compare(started, metric, UNIT)
        parts += [
            tag("h2", heading(task, "Held-out loss")),
            legend(arms_of(report)),
            figure(
                plot,
                "Mean over the denoisers, weighted with their shares of the mixture; sentinels are not counted. "
                f"Lower is better; step 0 is before the first update.{_thin(report)}"
                f"{asking_another(report, metric)}",
            ),
        ]
    return parts or [
        tag("h2", "Held-out loss"),
        note_missing("No evaluation has been recorded yet (eval/…/loss in metrics.jsonl)."),
    ]


def results(report: Report) -> list[Html]:
    """Returns the results of the comparison, beside the numbers printed in a paper."""
    parts, printed = [_result(result) for result in result_tables.of_results(report)], report.paper
    if printed:
        rows = [[str(c) for c in row] for row in printed["rows"]]
        note = tag("p", printed["note"], kind="quiet") if printed["note"] else None
        source = tag("p", printed["source"], kind="quiet")
        paper_table = html_table(TextTable(list(printed["columns"]), rows), kind="numbers printed")
        parts.append(tag("div", tag("h2", "Numbers printed in the paper"), source, paper_table, note))
    return [tag("div", *parts, kind="beside")] if parts else []


def _result(result: ResultTable) -> Html:
    table = html_table(result.table) if result.table else None
    return tag("div", tag("h2", result.title), tag("p", result.about, kind="quiet"), table)


def _thin(report: Report) -> str:
    """Returns the end of a caption about curves of single seeds, if there are any."""
    return " Thin: single seeds; strong: their mean." if report.has_seeds else ""


def runs(report: Report) -> list[Html]:
    """Returns the table of runs, after the means over seeds if there are several."""
    return [
        part
        for result in result_tables.of_runs(report)
        for part in (
            tag("h2", result.title),
            *([tag("p", f"{MEANS[0].upper()}{MEANS[1:]}.", kind="quiet")] if result.means else []),
            *([html_table(result.table)] if result.table else []),
        )
    ]


def denoisers(report: Report) -> list[Html]:
    """Returns held-out losses by denoiser, one small plot each."""
    parts = []
    for task, names in report.tasks(report.compared).items():
        if len(names) > 1:
            metrics = {name: f"eval/{task}/loss/{name}" for name in names}
            parts.append(tag("h2", heading(task, "By denoiser")))
            for compared in report.comparisons:
                parts += [tag("h3", compared.title)] if compared.title else []
                plot = plots.panels(compared.groups, metrics)
                parts += [legend(compared.arms), figure(plot, "Nats per token, each its own scale.")]
    return parts


def training(report: Report) -> list[Html]:
    """Returns training losses: the compared groups together, each other group alone."""
    sets = groups_by_title(report, "compared")
    # a run that no comparison has, such as the source of an adaptation, gets a plot of its own
    sets |= {group.name: [group] for group in report.groups if group not in report.compared}
    sets = {name: groups for name, groups in sets.items() if any(g.series("train/loss")[0] for g in groups)}
    if not sets:
        return [tag("h2", "Training loss"), note_missing("No training loss has been recorded yet (train/loss).")]
    caption = "Pale: every logged step; strong: a running median. Held-out losses are dots."
    return [tag("h2", "Training loss"), legend(arms_of(report, others=True)), figure(plots.training(sets), caption)]


def samples(report: Report) -> list[Html]:
    """Returns outputs of the runs for the same prompts; of several seeds, the first that has samples."""
    first = (next((run for run in group.runs if run.samples), None) for group in report.groups)
    runs = [run for run in first if run is not None]
    if not runs:
        return [tag("h2", "Samples"), note_missing("No samples have been written yet (samples/*.jsonl).")]
    prompts: dict[tuple[str, str], list[tuple[RunRecord, dict]]] = {}
    for run in runs:
        for row in run.samples:
            prompts.setdefault((str(row.get("kind", "sample")), str(row.get("prompt", ""))), []).append((run, row))
    parts, previous_kind = [tag("h2", "Samples"), tag("p", "From held-out text, not selected.", kind="quiet")], None
    headings = {"completion": "Completions", "filling": "Span fillings"}
    # sorted by kind alone: prompts stay in the order of the file
    for (kind, prompt), outputs in sorted(prompts.items(), key=lambda item: item[0][0]):
        if kind != previous_kind:
            parts.append(tag("h3", headings.get(kind, kind)))
            previous_kind = kind
        lines = [("prompt", prompt), *((run, row.get("output", "")) for run, row in outputs)]
        reference = next((row["reference"] for _, row in outputs if row.get("reference")), None)
        if reference is not None:
            lines.append(("reference", reference))
        cells = [
            (tag("div", label if isinstance(label, str) else run_label(label), kind="who"), sample_text(text))
            for label, text in lines
        ]
        parts.append(tag("div", *chain.from_iterable(cells), kind="sample"))
    return parts


def provenance(report: Report) -> list[Html]:
    """Returns the origin of every weight of the adapted runs; of several seeds, the first that has one."""
    parts = [tag("h2", "Origin of the weights")]
    for run in (next((run for run in group.runs if run.provenance is not None), None) for group in report.groups):
        if run is None:
            continue
        record = run.provenance
        # other commands, such as import and average, write a provenance without leaves
        if not isinstance(record, dict) or "leaves" not in record:
            parts += [tag("h3", run_label(run)), tag("pre", json.dumps(record, indent=2))]
            continue
        counts = Counter(leaf["how"] for leaf in record["leaves"])
        tiles = [tag("div", tag("b", str(count)), tag("span", how)) for how, count in counts.items()]
        about = f"Recipe {record['recipe']}, from {record['source']}; leaves by operation:"
        changed = [tag("p", f"Changed: {line}", kind="quiet") for line in record["settings"]]
        changed += [tag("p", f"Source: {line}", kind="quiet") for line in record.get("notes", ())]
        parts += [tag("h3", run_label(run)), tag("p", about, kind="quiet"), tag("div", *tiles, kind="tiles"), *changed]
        parts.append(html_table(weights(record["leaves"]), kind="words"))
    return (
        parts
        if len(parts) > 1
        else [*parts, note_missing("No provenance.json: no run here was adapted from another model.")]
    )


def weights(leaves: Sequence[dict]) -> TextTable:
    """Returns the provenance of an adaptation, one line per source leaf; equal leaves of several layers share it."""
    by_source: dict[tuple[str, str], list[dict]] = {}
    for leaf in leaves:
        alone = leaf["target"] if leaf["source"] == NOTHING else ""  # every initialised leaf is a line of its own
        by_source.setdefault((leaf["source"], alone), []).append(leaf)
    # a layer number is not part of a group's key, so that equal layers meet in one line
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
    """Returns (path, layer) of a leaf's name: ("layers.attention.q", 7) for "layers.attention.q.7"."""
    path, _, last = name.rpartition(".")
    return (path, int(last)) if last.isdigit() else (name, None)


def throughput(report: Report) -> list[Html]:
    """Returns plots of tokens per second, MFU, padding and memory by step."""
    metrics = {
        "tokens/s": "tokens_per_s",
        "MFU": "mfu",
        "padding, encoder": "padding/encoder",
        "padding, decoder": "padding/decoder",
        "memory of a device, GiB": "memory/device_gib",
        "memory of the process, GiB": "memory/host_gib",
    }
    recorded = {title: m for title, m in metrics.items() if any(group.series(m)[0] for group in report.groups)}
    if not recorded:
        return [
            tag("h2", "Speed, padding, memory"),
            note_missing("tokens_per_s, padding/… and memory/… have not been recorded yet."),
        ]
    text = "Tokens are those that are no padding, encoder and decoder together; padding is a share of all slots."
    return [
        tag("h2", "Speed, padding, memory"),
        legend(arms_of(report, others=True)),
        figure(plots.panels(report.groups, recorded, from_zero=True), text),
    ]


def configuration(report: Report) -> list[Html]:
    """Returns the settings in which the runs differ, and every resolved config."""
    runs = [run for run in report.runs if run.experiment is not None]
    if not runs:
        return [tag("h2", "Configuration"), note_missing("No experiment.json has been written yet.")]
    parts = [tag("h2", "Configuration")]
    # one run per group: seeds differ in train.seed alone
    first = [members[0] for group in report.groups if (members := [run for run in group.runs if run in runs])]
    differing = different_settings(first) if len(first) > 1 else TextTable([], [])
    if differing.rows:
        of_seeds = " (of several seeds, the first)" if report.has_seeds else ""
        parts += [tag("p", f"The settings in which the runs differ{of_seeds}:", kind="quiet")]
        parts.append(html_table(differing, kind="words"))
    for run in runs:
        text = json.dumps(run.experiment, indent=2)
        parts.append(tag("details", tag("summary", f"{run.name}: every setting"), tag("pre", text)))
    return parts


def commands(report: Report) -> list[Html]:
    """Returns the `t5g2` commands of a sweep."""
    if report.sweep is None:
        return []
    lines = "\n".join(part["command"] for part in report.sweep["parts"])
    return [
        tag("h2", "Commands"),
        tag("p", "Each of them can be run alone, in this order.", kind="quiet"),
        tag("pre", lines),
    ]
