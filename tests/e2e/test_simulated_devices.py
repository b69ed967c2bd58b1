"""A CPU that is asked to be several devices: it has threads enough for their collectives."""

import os
import subprocess
import sys

import pytest

from tests.e2e.conftest import CONFIG, command, environment


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({}, "None"),
        ({"JAX_NUM_CPU_DEVICES": "1"}, "None"),
        ({"JAX_NUM_CPU_DEVICES": "many"}, "None"),  # jax says what is wrong with it
        ({"JAX_NUM_CPU_DEVICES": "64"}, "512"),
        ({"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false --xla_force_host_platform_device_count=64"}, "512"),
        ({"XLA_FLAGS": " ".join(f"--xla_force_host_platform_device_count={n}" for n in (2, 64))}, "512"),
        ({"JAX_NUM_CPU_DEVICES": "64", "PJRT_NPROC": "3"}, "3"),
    ],
)
def test_every_command_gives_them_threads(given, threads):
    code = (
        "from t5g2 import cli; from t5g2.commands import report; import os\n"
        "report.run = lambda flags: print(os.environ.get('PJRT_NPROC'))\n"
        "cli.main(['report', '--workdir=x'])"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "PJRT_"))}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=kept | given)
    assert done.stdout == f"{threads}\n"


@pytest.mark.long
def test_a_run_on_them_saves_and_ends(corpus, tmp_path):
    """Without those threads it hangs where it saves, in sums of all leaves at once, and is aborted after 40 seconds."""
    overrides = ("mesh.strategy=zero1", "mesh.data=-1", "optim.ema=0.9", "train.steps=6", "save.every_steps=2")
    done = subprocess.run(
        command(
            "train",
            f"--config={CONFIG}:scratch@{corpus}",
            f"--workdir={tmp_path / 'run'}",
            *(f"--config.{override}" for override in overrides),
        ),
        env=environment() | {"JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "done.json").exists()
