"""`t5g2 train`."""

from t5g2.commands.flags import ALLOW_CHANGE, CONFIG, DISTRIBUTED, WORKDIR, Flag, Parsed
from t5g2.core.startup import START_UP

FLAGS = {
    "config": CONFIG,
    "workdir": WORKDIR,
    "distributed": DISTRIBUTED,
    "replay": Flag(
        None, "start from the checkpoint of this step instead of the newest, and write nothing", kind=int, least=0
    ),
    "allow_change": ALLOW_CHANGE,
}


def run(flags: Parsed) -> None:
    """Trains the experiment of a config file; run again, the same command resumes.

    Example: t5g2 train --config=configs/quickstart.py:source --workdir=runs/source --config.train.steps=50
    """
    from pathlib import Path

    from t5g2.core import distributed
    from t5g2.train import config_file, loop, workdir

    START_UP.ended("imports")
    START_UP.watch_compiler()
    distributed.initialize(flags.distributed)
    workdir.recall_commits(Path(flags.workdir))
    experiment = config_file.load(flags.config, flags.overrides)
    START_UP.ended("config")
    loop.train(experiment, flags.workdir, replay=flags.replay, allow_change=flags.names("allow_change"))
