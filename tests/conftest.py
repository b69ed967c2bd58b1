"""Eight simulated CPU devices, strict types, no silent warnings of ours."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's and numpy's own threads gain nothing on arrays this small

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Programs compiled once serve the whole suite, its subprocesses and the next run."""
    cache = config.cache.mkdir("jax_compilation_cache")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module", autouse=True)
def programs(request):
    """Compiled programs of one file are of no use to the next, and would take gigabytes by the end.

    They run a few times each, so what LLVM's optimisations save is less than they cost. What is compared with
    transformers, or bit for bit with another process, is compiled as a run compiles it, and so is what the tests start
    as processes of their own.
    """
    as_in_a_run = request.path.parent.name == "parity" or request.path.stem in ("test_state", "test_verify")
    jax.config.update("jax_disable_most_optimizations", not as_in_a_run)
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def devices():
    """The eight simulated devices."""
    assert len(jax.devices()) == 8
    return jax.devices()
