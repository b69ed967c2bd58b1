"""`t5g2 check`."""

from t5g2.commands.flags import ALLOW_CHANGE, CONFIG, Flag, Parsed

FLAGS = {
    "config": CONFIG,
    "allow_change": ALLOW_CHANGE,
    "devices": Flag(0, "simulated devices to shard over; 0 = those of this machine", least=0, most=8192),
    "hbm_gib": Flag(0.0, "memory of one device in GiB, above which the check fails; 0 = no limit", least=0),
}


def run(flags: Parsed) -> None:
    """Checks a config in a dry run: shapes, shardings, memory per device, FLOPs, one batch.

    No weight is computed.

    Example: t5g2 check --config=configs/quickstart.py:adapted --devices=8 --hbm_gib=16
    """
    from t5g2.jobs import dry_run
    from t5g2.train import config_file

    dry_run.check(
        config_file.load(flags.config, flags.overrides),
        devices=flags.devices,
        hbm_gib=flags.hbm_gib,
        allow_change=flags.names("allow_change"),
    )
