"""Joining of several processes into one run, and the process that writes."""

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

from t5g2.core.errors import UserError, unknown

Result = TypeVar("Result")


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
_PROCESS_VARIABLES = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(distributed: Literal["auto", "on", "off"] = "auto") -> None:
    """Joins the processes of a run on several hosts into one; call it before anything asks for devices.

    JAX finds the coordinator and the process's number by itself on Cloud TPU, Slurm, Open MPI and, with the package
    kubernetes, Kubernetes; elsewhere set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
      distributed: "auto" joins if the environment describes several processes, "on" always, "off" never.

    Raises:
      UserError: the other processes cannot be joined, for example because nothing describes them.
    """
    if distributed not in ("auto", "on", "off"):
        raise unknown("value", distributed, ("auto", "on", "off"), where="of --distributed")
    if distributed == "off" or jax.distributed.is_initialized():
        return
    if distributed == "auto" and not _has_other_processes(os.environ):
        return
    try:
        # JAX reads JAX_COORDINATOR_ADDRESS by itself, but not these two
        processes, process = (int(os.environ[k]) if k in os.environ else None for k in _PROCESS_VARIABLES)
        devices = [] if _is_alone_on_its_host(os.environ) else None
        jax.distributed.initialize(num_processes=processes, process_id=process, local_device_ids=devices)
        sys.excepthook = _print_and_leave
    except ValueError as error:
        raise UserError(
            f"this process cannot join the others: {error} JAX detects the processes of Cloud TPU, Slurm, Open MPI "
            f"and, with the package kubernetes, Kubernetes by itself; elsewhere set JAX_COORDINATOR_ADDRESS, "
            f"JAX_NUM_PROCESSES and JAX_PROCESS_ID, or use --distributed=off"
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
    node = int(environ.get("SLURM_NODEID", 0))
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
    if "JAX_COORDINATOR_ADDRESS" in environ or int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    # SLURM_STEP_NUM_TASKS counts what one srun started; without srun there is no step and this process is alone
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return True
    if "," in environ.get("TPU_WORKER_HOSTNAMES", "") or int(environ.get("MEGASCALE_NUM_SLICES", 1)) > 1:
        return True
    # a pod of an Indexed Job knows its number; of how many, the package asks the cluster
    if "KUBERNETES_SERVICE_HOST" in environ and (index := environ.get("JOB_COMPLETION_INDEX")) is not None:
        return index != "0" or importlib.util.find_spec("kubernetes") is not None
    # a host of a Cloud TPU may be one of a pod; joining works on a single one too
    chips = any(Path("/dev").glob(pattern) for pattern in ("accel[0-9]*", "vfio/[0-9]*"))
    uses_tpu = "tpu" in environ.get("JAX_PLATFORMS", "tpu").split(",")
    return uses_tpu and chips and importlib.util.find_spec("libtpu") is not None
