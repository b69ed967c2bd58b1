"""Eight simulated CPU devices, strict types, no silent warnings of ours."""

import gc
import os
import signal
from collections import Counter
from importlib import metadata
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
if int(metadata.version("jax").split(".")[1]) < 11:  # halves the time to compile; the newer pair has no such choice
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
# A collective holds its thread until all devices have come to it, and independent ones start in any order: with no more
# threads than two cores give, or a schedule that lets many run at once, eight devices can wait for each other for ever
# (without this schedule, a program from the compilation cache did so in two of three runs).
os.environ["XLA_FLAGS"] += " --xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
os.environ["PJRT_NPROC"] = "32"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"  # of LLVM's; programs run a few times
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's and numpy's own threads gain nothing on arrays this small

import jax
import pytest

# The collector looks less often at the many objects that tracing makes, which took a quarter of its time.
gc.set_threshold(50_000, 20, 100)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

MOST_RESIDENT = 3 * 2**30
# each program takes hundreds of memory maps, and past so many of a process (65,530) Linux refuses more, which ends in a
# crash; one file alone has taken 20,000
MOST_MAPS = int(Path("/proc/sys/vm/max_map_count").read_text()) // 2


def pytest_configure(config):
    """Programs compiled once serve the whole suite, its subprocesses and the next run."""
    # a shell that starts the tests in the background has SIGINT ignored, which every process here would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cache = config.cache.mkdir("jax_compilation_cache")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_make_parametrize_id(val, argname):
    """Names bytes by their argument: a gzip header holds the time, and the workers must collect the same names."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items):
    """Files with long tests come first, then those of no folder, so that the workers end at about the same time."""
    long = Counter(item.path for item in items if item.get_closest_marker("long"))
    items.sort(key=lambda item: (-long[item.path], len(item.path.parents)))


def pytest_collection_finish():
    """Takes what was imported out of the garbage collector, because it stays until the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Compiled programs serve the next file too, until they take gigabytes, or too many memory maps."""
    yield
    if resident_bytes() > MOST_RESIDENT or memory_maps() > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


def resident_bytes() -> int:
    """The memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_maps() -> int:
    """The number of memory maps that this process has now."""
    return Path("/proc/self/maps").read_bytes().count(b"\n")


@pytest.fixture(scope="session")
def devices():
    """The eight simulated devices."""
    assert len(jax.devices()) == 8
    return jax.devices()


@pytest.fixture
def one_device(devices, monkeypatch):
    """A run in this process takes one device, as on a laptop: a third less to compile, and no small programs that move
    arrays between devices. For tests that are not about meshes.
    """
    monkeypatch.setattr(jax, "devices", lambda: devices[:1])
