"""The processes of a run find each other by what a cluster tells them, and by nothing else."""

import importlib.machinery
import importlib.util
import json
import os
import socket
import subprocess
import sys

import jax
import pytest

from t5g2.core import distributed
from t5g2.core.errors import UserError

# what srun gives task 3 of 4 on two nodes
SLURM = {
    "SLURM_JOB_ID": "184467",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
# what sbatch gives the script itself, which is no task of a step
BATCH = {
    **{name: value for name, value in SLURM.items() if "STEP" not in name},
    "SLURM_JOB_NAME": "train",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
# of host 1 of two of a slice of GKE
GKE_TPU = {
    "KUBERNETES_SERVICE_HOST": "10.8.0.1",
    "JOB_COMPLETION_INDEX": "1",
    "TPU_WORKER_ID": "1",
    "TPU_WORKER_HOSTNAMES": "train-slice-0-0.train,train-slice-0-1.train",
    "TPU_ACCELERATOR_TYPE": "v5p-16",
    "TPU_TOPOLOGY": "2x2x2",
}
# of the only host of the second slice of two
SLICES = {
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "train-slice-0-0.train",
}
CPU = {"JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    ("environ", "joins"),
    [
        (CPU, False),
        ({"JAX_COORDINATOR_ADDRESS": "host:1234"}, True),
        (CPU | SLURM, True),
        (CPU | BATCH, False),
        (CPU | SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        (CPU | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, True),
        (GKE_TPU, True),
        (SLICES, True),
        (CPU | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, False),
        (CPU | {"KUBERNETES_SERVICE_HOST": "10.8.0.1", "JOB_COMPLETION_INDEX": "1"}, True),
        (CPU | {"KUBERNETES_SERVICE_HOST": "10.8.0.1"}, False),
    ],
    ids=[
        "alone",
        "coordinator",
        "a task of srun",
        "a batch script",
        "the only task",
        "Open MPI",
        "GKE, TPU",
        "two slices",
        "one TPU host",
        "a pod of others",
        "a pod",
    ],
)
def test_auto_joins_only_where_there_are_others(environ, joins):
    assert distributed._has_other_processes(environ) == joins


def test_the_first_pod_joins_where_the_cluster_can_be_asked_for_the_others(monkeypatch):
    """Without the package it would wait for nothing, and the others end: they cannot join."""
    first = CPU | {"KUBERNETES_SERVICE_HOST": "10.8.0.1", "JOB_COMPLETION_INDEX": "0"}
    for installed in (False, True):
        spec = importlib.machinery.ModuleSpec("kubernetes", None) if installed else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert distributed._has_other_processes(first) == installed


def join(choice: str, environ: dict[str, str]) -> subprocess.Popen:
    code = "import jax, json; from t5g2.core.distributed import initialize; "
    code += f"initialize({choice!r}); "
    code += "gpus = jax.config.values['jax_cuda_visible_devices']; "
    code += "print(json.dumps([jax.process_index(), jax.process_count(), gpus]))"
    theirs = ("SLURM", "OMPI", "KUBERNETES", "XLA_FLAGS")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=clean | environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def by_coordinator(port: int, process: int) -> dict[str, str]:
    return {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(process),
    }


def by_slurm(port: int, process: int) -> dict[str, str]:
    """The port is made of the job's number: the upper 4096 of all ports, in turn."""
    return SLURM | {
        "SLURM_JOB_ID": str(4096 * 45 + port - 61_440),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
    }


def by_slurm_on_two_nodes(port: int, process: int) -> dict[str, str]:
    """One task on each; both "nodes" are this machine."""
    alone = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
    return by_slurm(port, process) | alone | {"SLURM_NODEID": str(process)}


def free_port() -> int:
    """One of the upper 4096."""
    for port in range(61_440 + os.getpid() % 2000, 65_536):
        with socket.socket() as free:
            if free.connect_ex(("localhost", port)):
                return port
    raise AssertionError("no port is free")


@pytest.mark.parametrize(
    ("environ", "gpus"),
    [(by_coordinator, ["all", "all"]), (by_slurm, ["0", "1"]), (by_slurm_on_two_nodes, ["all", "all"])],
)
def test_two_processes_become_one_run(environ, gpus):
    """A task of Slurm that shares its node has the GPU of its number; one that does not has all of them."""
    port = free_port()
    processes = [join("auto", environ(port, i)) for i in range(2)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [json.loads(output) for output, _ in results] == [[0, 2, gpus[0]], [1, 2, gpus[1]]], results


@pytest.mark.parametrize(
    ("environ", "alone"),
    [
        (SLURM, False),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_NODEID": "3"}, True),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_NODEID": "1"}, True),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_NODEID": "0"}, False),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "JAX_LOCAL_DEVICE_IDS": "4,5"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, False),
        ({"JAX_COORDINATOR_ADDRESS": "host:1234"}, False),
    ],
)
def test_a_process_that_is_alone_on_its_host_has_all_its_gpus(environ, alone):
    assert distributed._is_alone_on_its_host(environ) == alone


def test_joining_when_nobody_is_there():
    alone = join("on", {})
    assert "UserError: this process cannot join the others: " in alone.communicate(timeout=60)[1]
    assert json.loads(join("auto", {}).communicate(timeout=60)[0]) == [0, 1, "all"]
    with pytest.raises(UserError, match=r"unknown value 'of' of --distributed; did you mean 'off'"):
        distributed.initialize("of")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            "JAX_NUM_PROCESSES=2 and JAX_PROCESS_ID=1 in the environment without JAX_COORDINATOR_ADDRESS, so this "
            "process cannot join the others; set all three, or use --distributed=off for a process that is alone",
        ),
        (
            {"JAX_PROCESS_ID": "0"},
            "JAX_PROCESS_ID=0 in the environment without JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES, so",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "127.0.0.1"},
            "JAX_COORDINATOR_ADDRESS=127.0.0.1 in the environment is no host:port, with a port of 1 to 65535, such as "
            "10.0.0.1:8476; correct or unset it, or use --distributed=off",
        ),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "JAX_COORDINATOR_ADDRESS= in the environment is no host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "a:65536"}, "JAX_COORDINATOR_ADDRESS=a:65536 in the environment is no host:port"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_COORDINATOR_BIND_ADDRESS": "[::]:²"},
            "JAX_COORDINATOR_BIND_ADDRESS=[::]:² in the environment is no host:port",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two"},
            "JAX_NUM_PROCESSES=two in the environment is no whole number; correct or unset it, or use "
            "--distributed=off",
        ),
        (
            SLURM | {"JAX_LOCAL_DEVICE_IDS": "0;1"},
            "JAX_LOCAL_DEVICE_IDS=0;1 in the environment is no list of numbers, such as 0,1; correct or unset it, "
            "or use --distributed=off",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE=x in the environment is no whole number"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS= in the environment is no whole number"),
        (SLURM | {"SLURM_NODEID": "n1"}, "SLURM_NODEID=n1 in the environment is no whole number"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID=2 with JAX_NUM_PROCESSES=2 in the environment: the processes are numbered from 0 to 2 - 1; "
            "correct them, or use --distributed=off",
        ),
    ],
)
def test_a_wrong_environment_is_named(monkeypatch, environ, message):
    monkeypatch.setattr(os, "environ", CPU | environ)
    with pytest.raises(UserError) as raised:
        distributed.initialize("auto")
    assert str(raised.value).startswith(message)
    distributed.initialize("off")


def test_one_process_needs_no_coordinator(monkeypatch):
    monkeypatch.setattr(os, "environ", CPU | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"})
    distributed.initialize("auto")
    assert not jax.distributed.is_initialized()
