"""Several processes on this machine that are one run, by jax.distributed over loopback (gloo)."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from t5g2.core import sharding

ROOT = Path(__file__).parents[2]
DEVICES = "--xla_force_host_platform_device_count"
T5G2 = [sys.executable, "-m", "t5g2"]


def calling(function: str, *arguments: object) -> list[str]:
    """The command that calls "module:function" with texts."""
    module, name = function.split(":")
    code = f"import sys; from {module} import {name}; {name}(*sys.argv[1:])"
    return [sys.executable, "-c", code, *map(str, arguments)]


def interleave() -> None:
    """Makes meshes of devices of all processes in turn, as on slices of TPUs, where a process's rows are no range."""
    arranged = sharding._arranged

    def in_turn(sizes, devices):
        rank = {d: sum(o.process_index == d.process_index and o.id < d.id for o in devices) for d in devices}
        return arranged(sizes, sorted(devices, key=lambda device: (rank[device], device.process_index)))

    sharding._arranged = in_turn


def flags(devices: int) -> str:
    """XLA's flags of a process with so many devices; the others stay, with which programs compile in half the time."""
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(DEVICES)]
    return " ".join([*others, f"{DEVICES}={devices}"])


@contextlib.contextmanager
def started(command: list[str], number: int, *, devices: int = 1) -> Iterator[list[subprocess.Popen]]:
    """Processes with the same command, each with so many devices; those that still run at the end are killed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environ = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(number),
        "XLA_FLAGS": flags(devices),
        "PYTHONUNBUFFERED": "1",
    }
    processes = [
        subprocess.Popen(
            command,
            env=environ | {"JAX_PROCESS_ID": str(i)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(number)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def run(command: list[str], number: int, *, devices: int = 1) -> list[str]:
    """Waits for all processes, checks that they succeed, and returns what each wrote to stderr."""
    with started(command, number, devices=devices) as processes:
        written = [process.communicate(timeout=240)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * number, "\n".join(written)
    return written
