"""Facts about devices: their platform, peak FLOP/s, memory in use."""

import functools
import resource
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5g2.core.machine import machine_memory

GIB = 2**30  # bytes

# bf16 matmul peak of one device in FLOP/s, dense. TPUs: the numbers MaxText divides by (MaxText README and
# configs/tpu); GPUs: NVIDIA's data sheets, without sparsity. Keys are beginnings of jax's `device_kind`.
NAMED_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


class Peak(NamedTuple):
    """Peak FLOP/s of all devices together, the denominator of MFU, and the source of the number."""

    flops_per_s: float
    source: str


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": the devices of the current mesh, or the default ones without a mesh.

    A mesh may be of devices that this process only compiles for.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def peak() -> Peak:
    """Returns the peak of all devices of the run: from NAMED_PEAKS if it has the device, else measured."""
    devices = jax.devices()
    kind = devices[0].device_kind
    # the longest name first: "TPU v5 lite" also begins with "TPU v5"
    for name in sorted(NAMED_PEAKS, key=len, reverse=True):
        if kind.startswith(name):
            return Peak(NAMED_PEAKS[name] * len(devices), f"named bf16 peak of {len(devices)} x {kind}")
    # the simulated devices of a CPU share its cores: one of them is measured, per process
    count = jax.process_count() if devices[0].platform == "cpu" else len(devices)
    rate = measure_matmul(1024 if devices[0].platform == "cpu" else 8192)
    return Peak(rate * count, f"measured float32 matmul on {count} x {kind}")


@functools.cache
def measure_matmul(size: int, repeats: int = 5) -> float:
    """Returns the FLOP/s of the fastest of several [size, size] float32 matrix products on the first local device."""
    a = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()  # compiles
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(a).block_until_ready()
        times.append(time.perf_counter() - start)
    # the fastest run is the one that other work on the machine disturbed least
    return 2 * size**3 / min(times)


def memory_gib() -> dict[str, float]:
    """Returns the peak memory so far in GiB: of this process, and of the fullest device if devices report theirs."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes on macOS, KiB on Linux
    host_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    peaks = [stats["peak_bytes_in_use"] for d in jax.local_devices() if (stats := d.memory_stats())]
    return {"memory/host_gib": host_gib} | ({"memory/device_gib": max(peaks) / GIB} if peaks else {})


def device_memory() -> int:
    """Returns the bytes of memory of the first device; on a CPU, those of the machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", 0)) or machine_memory()
