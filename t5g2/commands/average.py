"""`t5g2 average`."""

from t5g2.commands.flags import OUT, WORKDIR, Flag, Parsed

FLAGS = {
    "workdir": WORKDIR,
    "last": Flag(5, "number of checkpoints, counted back from the newest", least=1),
    "out": OUT,
}


def run(flags: Parsed) -> None:
    """Writes the mean, in float32, of the last checkpoints of a run as a model folder.

    Example: t5g2 average --workdir=runs/t5gemma2-270m --last=2 --out=models/trained
    """
    from t5g2.jobs.run_average import average_run

    average_run(flags.workdir, flags.out, last=flags.last)
