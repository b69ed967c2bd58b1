"""Writes a report: the page, the table, the numbers as csv."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path

from t5g2.core import files
from t5g2.report import deltas, page, result_tables
from t5g2.report.contents import Report, read
from t5g2.report.run_records import RunRecord


def write(workdir: str | os.PathLike) -> Path:
    """Writes index.html, metrics.csv, results.csv and table.md to report/; prints the table and the page's path.

    Raises:
      UserError: the folder holds neither a run nor a sweep.
    """
    report = read(Path(workdir))
    out = report.folder / "report"
    out.mkdir(exist_ok=True)
    table = "\n\n".join(_printed_tables(report))
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


def _printed_tables(report: Report) -> list[str]:
    """Returns each table under its heading, or alone if there is one."""
    shown = [*result_tables.of_results(report), *result_tables.of_runs(report)]
    texts = ["\n".join(result.table.lines()) if result.table else result.about for result in shown]
    if len(shown) == 1:
        return texts
    return [f"{result.heading}\n\n{text}" for result, text in zip(shown, texts, strict=True)]


def _write_csv(path: Path, rows: Iterable[tuple]) -> None:
    with files.replacing(path) as part, open(part, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def _points(runs: Iterable[RunRecord]) -> Iterable[tuple]:
    for run in runs:
        for row in run.rows:
            for metric, value in row.items():
                if metric not in ("step", "wall"):
                    yield run.name, row["step"], row.get("wall"), metric, value
