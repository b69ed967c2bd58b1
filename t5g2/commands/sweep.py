"""`t5g2 sweep`."""

from t5g2.commands.flags import Flag, Parsed

FLAGS = {
    "sweep": Flag(None, "file with get_sweep()", True),
    "workdir": Flag(None, "folder of the sweep: a workdir for each run, and the report", True),
    "launcher": Flag("local", "local runs the commands here, one after the other; print only shows them"),
}


def run(flags: Parsed) -> None:
    """Runs every variant of a sweep file, skips finished parts, resumes the others, and writes the report.

    Example: t5g2 sweep --sweep=experiments/quickstart.py --workdir=runs/quickstart
    """
    from t5g2.sweep.launch import run_sweep

    run_sweep(flags.sweep, flags.workdir, launcher=flags.launcher)
