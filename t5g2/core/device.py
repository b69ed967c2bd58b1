"""Facts about devices: their platform, peak FLOP/s, bandwidth of memory, memory in use."""

import functools
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5g2.core.machine import machine_memory

GIB = 2**30  # bytes

# bf16 matmul peak of one device in FLOP/s, dense. TPUs: the numbers MaxText divides by (MaxText README and
# configs/tpu; a TPU7x is two devices); GPUs: NVIDIA's data sheets, without sparsity. Keys are beginnings of jax's
# `device_kind`.
NAMED_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
# bandwidth of one device's memory in byte/s, from the same data sheets, and for TPUs the documentation of Google Cloud
NAMED_BANDWIDTHS = {
    "TPU v4": 1228e9,
    "TPU v5 lite": 819e9,
    "TPU v5": 2765e9,
    "TPU v6 lite": 1640e9,
    "TPU7x": 7380e9 / 2,
    "NVIDIA A100": 2039e9,  # of 80 GB; that of 40 GB has 1555e9
    "NVIDIA H100": 3350e9,
    "NVIDIA H200": 4800e9,
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
    if (named := of_kind(NAMED_PEAKS, kind)) is not None:
        return Peak(named * len(devices), f"named bf16 peak of {len(devices)} x {kind}")
    # the simulated devices of a CPU share its cores: one of them is measured, per process
    count = jax.process_count() if devices[0].platform == "cpu" else len(devices)
    rate = measure_matmul(1024 if devices[0].platform == "cpu" else 8192)
    return Peak(rate * count, f"measured float32 matmul on {count} x {kind}")


class Roofline(NamedTuple):
    """The most that one device does: FLOP/s of matrix products, byte/s of its memory, and the source of the numbers."""

    flops_per_s: float
    bytes_per_s: float
    source: str


def roofline() -> Roofline:
    """Returns the peaks of one device, or of the cores that simulated devices share: named, or else measured."""
    device = jax.local_devices()[0]
    flops, memory = (of_kind(table, device.device_kind) for table in (NAMED_PEAKS, NAMED_BANDWIDTHS))
    if flops is not None and memory is not None:
        return Roofline(flops, memory, f"named bf16 peak and bandwidth of {device.device_kind}")
    flops = measure_matmul(1024 if device.platform == "cpu" else 8192)
    return Roofline(flops, measure_bandwidth(), f"float32 matmul and copy, measured on {device.device_kind}")


def of_kind(table: Mapping[str, float], kind: str) -> float | None:
    """Returns the number of a device kind in one of the tables above; None if it has none."""
    # the longest name first: "TPU v5 lite" also begins with "TPU v5"
    return next((table[name] for name in sorted(table, key=len, reverse=True) if kind.startswith(name)), None)


def measure_bandwidth(mib: int = 256, repeats: int = 5) -> float:
    """Returns the byte/s, read and written, of the fastest of several passes over an array that no cache holds."""
    a = jnp.ones((mib, 2**18), jnp.float32)
    return 2 * a.nbytes / _fastest(jax.jit(lambda a: a + 1.0), a, repeats)


@functools.cache
def measure_matmul(size: int, repeats: int = 5) -> float:
    """Returns the FLOP/s of the fastest of several [size, size] float32 matrix products on the first local device."""
    a = jnp.ones((size, size), jnp.float32)
    return 2 * size**3 / _fastest(jax.jit(lambda a: a @ a), a, repeats)


def _fastest(function: Callable[[jax.Array], jax.Array], a: jax.Array, repeats: int) -> float:
    """Returns the seconds of the fastest run, which is the one that other work on the machine disturbed least."""
    function(a).block_until_ready()  # compiles
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)


def memory_gib() -> dict[str, float]:
    """Returns the peak memory so far in GiB: of this process, and of the fullest device if devices report theirs."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes on macOS, KiB on Linux
    host_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    peaks = [stats["peak_bytes_in_use"] for d in jax.local_devices() if (stats := d.memory_stats())]
    return {"memory/host_gib": host_gib} | ({"memory/device_gib": max(peaks) / GIB} if peaks else {})


class ProgramMemory(NamedTuple):
    """Bytes of one device: the arguments of a program, and what exists besides while it runs."""

    arguments: int
    temporary: int

    @property
    def total(self) -> int:
        """Bytes of both."""
        return self.arguments + self.temporary


def program_memory(compiled: Any, platform: str) -> ProgramMemory:
    """Returns what a compiled program, with donated arguments, holds on each device of a platform, such as "tpu"."""
    analysis = compiled.memory_analysis()
    arguments = analysis.argument_size_in_bytes
    if platform == "tpu":  # its temp_size_in_bytes counts gaps between arrays twice, and the program is in its memory
        return ProgramMemory(
            arguments, analysis.peak_memory_in_bytes + analysis.generated_code_size_in_bytes - arguments
        )
    return ProgramMemory(arguments, analysis.temp_size_in_bytes)


def device_memory() -> int:
    """Returns the bytes of memory of the first device; on a CPU, those of the machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", 0)) or machine_memory()
