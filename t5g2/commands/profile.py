"""`t5g2 profile`."""

from t5g2.commands.flags import CONFIG, Flag, Parsed

FLAGS = {
    "config": CONFIG,
    "steps": Flag(5, "steps to measure, after one that is not", least=1, most=100),
}


def run(flags: Parsed) -> None:
    """Runs some steps and prints the dearest parts and operations: time, FLOPs, bytes and roofline.

    The weights are new ones, whatever init says, and nothing is written: time does not depend on values.

    Example: t5g2 profile --config=configs/quickstart.py:source
    """
    from t5g2.jobs import step_profile
    from t5g2.train import config_file

    step_profile.profile(config_file.load(flags.config, flags.overrides), steps=flags.steps)
