"""The checksum does not depend on where an array lies, and sees what can happen to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from t5g2.checkpoint import checksum


def sharded(mesh_shape):
    devices = np.array(jax.devices()[: int(np.prod(mesh_shape))]).reshape(mesh_shape)
    return jax.NamedSharding(jax.sharding.Mesh(devices, ("a", "b")), P("a", "b"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "float64"])
def test_checksum_is_the_same_on_every_mesh_and_sees_every_change(dtype, devices):
    with jax.enable_x64(dtype == "float64"):
        x = np.random.default_rng(0).integers(0, 2, (8, 4)).astype(jnp.dtype(dtype))
        expected = int(checksum.checksum(jnp.asarray(x)))
        for mesh_shape in ((1, 1), (2, 2), (4, 2)):
            assert int(jax.jit(checksum.checksum)(jax.device_put(x, sharded(mesh_shape)))) == expected
        seen = {expected}
        raw = x.view(np.uint8)
        for byte in range(raw.size):
            for bit in range(8 if dtype != "bool" else 1):
                changed = raw.copy().reshape(-1)
                changed[byte] ^= 1 << bit
                seen.add(int(checksum.checksum(jnp.asarray(changed.view(x.dtype).reshape(x.shape)))))
        assert len(seen) == 1 + raw.size * (8 if dtype != "bool" else 1)


def test_checksum_sees_swaps_and_moves():
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    x[1, 2] = -x[4, 3]  # a pair that differs in the sign bit only
    flat = x.reshape(-1)
    sums = {
        int(checksum.checksum(jnp.asarray(x))),
        int(checksum.checksum(jnp.asarray(x.T))),
        int(checksum.checksum(jnp.asarray(-x))),
    }
    for i in range(flat.size):
        for j in range(i):
            swapped = flat.copy()
            swapped[[i, j]] = swapped[[j, i]]
            sums.add(int(checksum.checksum(jnp.asarray(swapped.reshape(x.shape)))))
    assert len(sums) == 3 + flat.size * (flat.size - 1) // 2
    assert int(checksum.checksum(jnp.zeros((3, 2)))) != int(checksum.checksum(jnp.zeros((2, 2))))
