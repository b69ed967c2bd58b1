"""`t5g2 check`."""

from t5g2.commands.flags import ALLOW_CHANGE, CONFIG, Flag, Parsed

FLAGS = {
    "config": CONFIG,
    "allow_change": ALLOW_CHANGE,
    "target": Flag(None, "CHIP:SIDES, a slice of TPUs such as v5p:4x4x4 to compile for, or mesh.slices of them"),
    "suggest": Flag(False, "search for settings that fit the target, if these do not"),
    "devices": Flag(0, "simulated devices to shard over; 0 = those of this machine", least=0, most=8192),
    "hbm_gib": Flag(
        0.0, "memory of one device in GiB, above which the check fails; 0 = no limit, or the target's", least=0
    ),
}


def run(flags: Parsed) -> None:
    """Checks a config in a dry run: shapes, shardings, memory, FLOPs, one batch, and the time on TPUs.

    No weight is computed. The time is that of a --target, whose compiler is libtpu (pip install 't5g2[tpu-aot]'), which
    takes minutes.

    Example: t5g2 check --config=configs/t5gemma2.py:270m-270m --target=v5p:4x4x4
    Example: t5g2 check --config=configs/quickstart.py:adapted --devices=8 --hbm_gib=16
    """
    from t5g2.jobs import dry_run
    from t5g2.train import config_file

    dry_run.check(
        config_file.load(flags.config, flags.overrides),
        devices=flags.devices,
        hbm_gib=flags.hbm_gib,
        target=flags.target,
        suggest=flags.suggest,
        allow_change=flags.names("allow_change"),
    )
