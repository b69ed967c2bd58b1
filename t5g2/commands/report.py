"""`t5g2 report`."""

from t5g2.commands.flags import Flag, Parsed

FLAGS = {"workdir": Flag(None, "folder of a run or of a sweep; the report is written to report/ in it", True)}


def run(flags: Parsed) -> None:
    """Writes index.html, table.md, metrics.csv and results.csv to report/, and prints the tables.

    results.csv has what is compared: of a single run, and of a sweep that compares none, there is none.

    Example: t5g2 report --workdir=runs/quickstart
    """
    from t5g2.report import output

    output.write(flags.workdir)
