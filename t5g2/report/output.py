"""Writes a report: the page, the table, the numbers as csv."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path

from t5g2.core import files
from t5g2.report import comparison, deltas, page
from t5g2.report.contents import Report, read
from t5g2.report.run_records import RunRecord
from t5g2.report.tables import MEANS, over_seeds, summary
from t5g2.report.text_table import TextTable


def write(workdir: str | os.PathLike) -> Path:
    """Writes index.html, metrics.csv, results.csv and table.md to report/; prints the table and the page's path.

    Raises:
      UserError: the folder holds neither a run nor a sweep.
    """
    report = read(Path(workdir))
    out = report.folder / "report"
    out.mkdir(exist_ok=True)
    table = "\n\n".join("\n".join([*heading, *text.lines()]) for heading, text in _printed_tables(report))
    if report.problems:
        table += "\n\n" + "\n".join(f"Not read: {problem}" for problem in report.problems)
    files.write_text(out / "index.html", page.render(report))
    files.write_text(out / "table.md", table + "\n")
    # one line per value, because runs have different metrics
    _write_csv(out / "metrics.csv", [("run", "step", "wall", "metric", "value"), *_points(report.runs)])
    if any(compared.others for compared in report.comparisons):
        _write_csv(out / "results.csv", deltas.csv_rows(deltas.deltas(report)))
    print("\n".join(["", table, "", f"report: {out / 'index.html'}"]), flush=True)
    return out / "index.html"


def _printed_tables(report: Report) -> list[tuple[list[str], TextTable]]:
    """Returns (heading, table) for each table: the runs, after the results over seeds if there are several."""
    results = comparison.results(report.comparisons, list(report.tasks(report.compared)))
    rows = deltas.deltas(report)
    scores, printed = deltas.score_table(rows), deltas.against_paper(rows)
    if results is None and printed is None and not report.has_seeds:
        return [([], summary(report))]
    return [
        *([(["Results" + (f", {MEANS}" if report.has_seeds else ""), ""], results)] if results else []),
        *([(["Scores", ""], scores)] if scores else []),
        *([(["Against the paper", ""], printed)] if printed else []),
        *([([f"Over seeds: {MEANS}", ""], over_seeds(report))] if report.has_seeds else []),
        (["Runs", ""], summary(report)),
    ]


def _write_csv(path: Path, rows: Iterable[tuple]) -> None:
    with files.replacing(path) as part, open(part, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def _points(runs: Iterable[RunRecord]) -> Iterable[tuple]:
    for run in runs:
        for row in run.rows:
            for metric, value in row.items():
                if metric not in ("step", "wall"):
                    yield run.name, row["step"], row.get("wall"), metric, value
