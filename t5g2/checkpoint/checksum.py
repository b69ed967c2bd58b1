"""Checksum of an array, computed on the devices that hold it and independent of its sharding."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Returns the checksum of every array, by name.

    Arrays of one shape, dtype and sharding share a program, so layers that are alike are compiled once; one program for
    all arrays would compile a kernel for each of them.
    """
    sums = jax.device_get([checksum(x) for x in arrays.values()])
    return {name: int(total) for name, total in zip(arrays, sums, strict=True)}


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """Returns uint32, the sum modulo 2^32 over all elements of a hash of the element's bits and its position.

    At each position the hash is a bijection of the bits, so any change of one element changes the sum; changes of
    several elements, swaps too, are missed with probability 2^-32. Integer sums do not depend on the order of terms, so
    neither sharding nor devices matter.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    word = jnp.dtype(f"uint{min(32, 8 * x.dtype.itemsize)}")
    # an element of 64 bits becomes two words on a new last axis
    bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    # the position in the whole array, not in a shard of it, so that swapped elements change the sum
    position = jnp.zeros((), jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = jnp.broadcast_to(position, bits.shape) + along * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(_murmur_finalizer(bits ^ _murmur_finalizer(position + jnp.uint32(1))), dtype=jnp.uint32)


def _murmur_finalizer(x: jax.Array) -> jax.Array:
    """Computes the 32-bit finalizer of MurmurHash3, a bijection (Austin Appleby, MurmurHash3.cpp: fmix32)."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))
