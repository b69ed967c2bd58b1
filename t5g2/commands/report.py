"""`t5g2 report`."""

from t5g2.commands.flags import Flag, Parsed

FLAGS = {"workdir": Flag(None, "folder of a run or of a sweep; the report is written to report/ in it", True)}


def run(flags: Parsed) -> None:
    """Writes report/index.html, table.md, metrics.csv and, where runs are compared, results.csv; prints the tables.

    Example: t5g2 report --workdir=runs/quickstart
    """
    from t5g2.report import output

    output.write(flags.workdir)
