"""Joining of several processes into one run, and the process that writes."""

import faulthandler
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

import jax
import numpy as np

from t5g2.core.errors import MachineError, UserError, unknown
from t5g2.core.terminal import escaped

Result = TypeVar("Result")
Default = TypeVar("Default")


def is_primary() -> bool:
    """True in process 0, the only one that writes files and prints."""
    return jax.process_index() == 0


def any_process(flags: Sequence[bool]) -> np.ndarray:
    """Returns bool[n], the flags that are set in any process, so that all processes take the same branch."""
    if jax.process_count() == 1:
        return np.asarray(flags)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.asarray(flags)).any(axis=0)


def on_primary(function: Callable[[], Result]) -> Result | None:
    """Returns what the function returns in process 0, None in the others, where it is not called.

    All processes call this. If process 0 has a UserError, all have one, where the others would wait for it.
    """
    result, failure = None, None
    if is_primary():
        try:
            result = function()
        except UserError as error:
            failure = error
    if any_process([failure is not None])[0]:
        raise failure or UserError("process 0 cannot go on; its message says why")
    return result


LEAVE_SECS = 5
JOIN_SECS = 300
# JAX ends a process that learns of the death of another with SIGABRT, status 134 in a shell: of process 0, to which all
# are connected, at once, of another after so long without a heartbeat. train.hang_timeout_secs is longer by default,
# and is for those that live and are held up. Not longer here: nothing else finds the dead of an evaluation or a start.
HEARTBEAT_SECS = 100
_OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_REMEDY = (
    f"JAX detects the processes of Cloud TPU, Slurm, Open MPI 4 and, with the package kubernetes, Kubernetes; "
    f"elsewhere set {', '.join(_OURS[:-1])} and {_OURS[-1]}, or use --distributed=off"
)


def initialize(distributed: Literal["auto", "on", "off"] = "auto") -> None:
    """Joins the processes of a run on several hosts into one; call it before anything asks for devices.

    JAX finds the coordinator and the process's number by itself on Cloud TPU, Slurm, Open MPI 4 and, with the package
    kubernetes, Kubernetes; elsewhere set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    From then on, if another process dies, this one ends within HEARTBEAT_SECS, with the stacks of its threads. If not
    all have joined after JOIN_SECS, it ends too.

    Args:
      distributed: "auto" joins if the environment describes several processes, "on" always, "off" never.

    Raises:
      UserError: the other processes cannot be joined, for example because nothing describes them.
      MachineError: the coordinator cannot be started, for example because its port is in use.
    """
    if distributed not in ("auto", "on", "off"):
        raise unknown("value", distributed, ("auto", "on", "off"), where="of --distributed")
    if distributed == "off" or jax.distributed.is_initialized():
        return
    if distributed == "auto" and not _has_other_processes(os.environ):
        _check_that_none_is_missing(os.environ)
        return
    # JAX reads JAX_COORDINATOR_ADDRESS by itself, but not these two
    processes, process = (_number(os.environ, name, None) for name in _OURS[1:])
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(
            f"JAX_PROCESS_ID={process} with JAX_NUM_PROCESSES={processes} in the environment: the processes are "
            f"numbered from 0 to {processes} - 1; correct them, or use --distributed=off"
        )
    address = _coordinator(os.environ)
    _check_devices(os.environ)
    print(
        escaped(f"joining the processes of this run{f' at {address}' if address else ''}, for at most {JOIN_SECS} s"),
        file=sys.stderr,
        flush=True,
    )
    devices = [] if _is_alone_on_its_host(os.environ) else None
    # JAX ends a process by SIGABRT, of which else only the stack of its own thread in C++ would be seen
    faulthandler.enable(file=sys.__stderr__ or 2)
    try:
        jax.distributed.initialize(
            num_processes=processes,
            process_id=process,
            local_device_ids=devices,
            initialization_timeout=JOIN_SECS,
            heartbeat_timeout_seconds=HEARTBEAT_SECS,
        )
    except ValueError as error:
        raise UserError(f"this process cannot join the others: {error} {_REMEDY}") from None
    except jax.errors.JaxRuntimeError as error:
        raise MachineError(
            f"this process cannot join the others: {error}; if the coordinator's port is in use, give another"
        ) from None
    sys.excepthook = _print_and_leave


def _check_that_none_is_missing(environ: Mapping[str, str]) -> None:
    """Raises if the environment names other processes but not where they are: each would run the whole job."""
    set_names = [name for name in _OURS if name in environ]
    if set_names and _number(environ, "JAX_NUM_PROCESSES", None) != 1:
        values = " and ".join(f"{name}={environ[name]}" for name in set_names)
        missing = " and ".join(name for name in _OURS if name not in environ)
        raise UserError(
            f"{values} in the environment without {missing}, so this process cannot join the others; set all three, or "
            f"use --distributed=off for a process that is alone"
        )


def _coordinator(environ: Mapping[str, str]) -> str | None:
    """Returns JAX_COORDINATOR_ADDRESS; None = JAX has to find the coordinator."""
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS"):
        host, _, port = environ.get(name, "host:1").rpartition(":")
        if not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
            raise UserError(
                f"{name}={environ[name]} in the environment is no host:port, with a port of 1 to 65535, such as "
                f"10.0.0.1:8476; correct or unset it, or use --distributed=off"
            )
    return environ.get("JAX_COORDINATOR_ADDRESS")


def _check_devices(environ: Mapping[str, str]) -> None:
    devices = environ.get("JAX_LOCAL_DEVICE_IDS")
    if devices and not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", devices, re.ASCII):
        raise UserError(
            f"JAX_LOCAL_DEVICE_IDS={devices} in the environment is no list of numbers, such as 0,1; correct or unset "
            f"it, or use --distributed=off"
        )


def _number(environ: Mapping[str, str], name: str, default: Default) -> int | Default:
    """Returns the whole number that a variable holds, the default if it is not set."""
    try:
        return int(environ[name]) if name in environ else default
    except ValueError:
        raise UserError(
            f"{name}={environ[name]} in the environment is no whole number; correct or unset it, or use "
            f"--distributed=off"
        ) from None


def _is_alone_on_its_host(environ: Mapping[str, str]) -> bool:
    """True if a process of Slurm or Open MPI is the only one of its host, and has all of the host's GPUs.

    JAX gives a process of theirs the one GPU that has its number on the host, which leaves the others without one. An
    empty list of devices is all; JAX_LOCAL_DEVICE_IDS chooses some.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environ:
        return False
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environ:
        return environ["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    # "2(x3),1" = two tasks on each of three nodes, one on the fourth
    tasks = [
        int(count)
        for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        for _ in range(int(repeats or 1))
    ]
    node = _number(environ, "SLURM_NODEID", 0)
    return node < len(tasks) and tasks[node] == 1


def leave(status: int) -> None:
    """Ends this process with a status if it is one of several, whatever the others do.

    An error of one process may leave the others in a collective operation, which waits for this one, while at the end
    of an interpreter JAX waits for them. So they are waited for LEAVE_SECS: if all have the same error, each says it.
    """
    if not jax.distributed.is_initialized():
        return
    ended = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    ended.start()
    ended.join(LEAVE_SECS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _print_and_leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    leave(1)


def _has_other_processes(environ: Mapping[str, str]) -> bool:
    """True if the environment describes several processes, or this host may be one of several of a Cloud TPU."""
    if "JAX_COORDINATOR_ADDRESS" in environ or _number(environ, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        return True
    # SLURM_STEP_NUM_TASKS counts what one srun started; without srun there is no step and this process is alone
    if _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return True
    if "," in environ.get("TPU_WORKER_HOSTNAMES", "") or _number(environ, "MEGASCALE_NUM_SLICES", 1) > 1:
        return True
    # a pod of an Indexed Job knows its number; of how many, the package asks the cluster
    if "KUBERNETES_SERVICE_HOST" in environ and (index := environ.get("JOB_COMPLETION_INDEX")) is not None:
        return index != "0" or importlib.util.find_spec("kubernetes") is not None
    # a host of a Cloud TPU may be one of a pod; joining works on a single one too
    chips = any(Path("/dev").glob(pattern) for pattern in ("accel[0-9]*", "vfio/[0-9]*"))
    uses_tpu = "tpu" in environ.get("JAX_PLATFORMS", "tpu").split(",")
    return uses_tpu and chips and importlib.util.find_spec("libtpu") is not None
