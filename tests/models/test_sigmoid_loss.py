import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.core import sharding as meshes
from t5g2.core.sharding import MeshShape
from t5g2.models.sigmoid_loss import sigmoid_loss
from tests import hlo

N, D = 48, 20
WRT = ("texts", "images", "scale", "bias")


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def arguments(n=N, scale=2.3, bias=-3.0):
    keys = jax.random.split(jax.random.key(0), 3)
    texts = jax.random.normal(keys[0], (n, D))
    images = texts + 2 * jax.random.normal(keys[1], (n, D))  # pairs are more alike than others
    return unit(texts), unit(images), jnp.float32(scale), jnp.float32(bias)


def dense(texts, images, scale, bias):
    """Equation 1 of the paper, as its pseudocode has it."""
    logits = jnp.matmul(texts, images.T, precision="highest") * jnp.exp(scale) + bias
    signs = 2 * jnp.eye(len(texts)) - 1
    return -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / len(texts)


def chunked(chunk):
    def loss(texts, images, scale, bias):
        return sigmoid_loss(texts, images, logit_scale=scale, logit_bias=bias, chunk=chunk)

    return loss


def assert_same(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=2e-6)
    for name, got_slope, want_slope in zip(WRT, got[1], want[1], strict=True):
        largest = np.abs(want_slope).max()
        assert largest > 1e-3
        np.testing.assert_allclose(got_slope, want_slope, atol=5e-6 * max(largest, 1), rtol=0, err_msg=name)


def test_by_hand():
    """Two pairs, cosines 1 and 0, scale e^0 = 1, bias 0: each row has one log(1 + e^-1) and one log(1 + e^0)."""
    eye = jnp.eye(2)
    loss = sigmoid_loss(eye, eye, logit_scale=jnp.float32(0), logit_bias=jnp.float32(0), chunk=1)
    np.testing.assert_allclose(loss, math.log(1 + math.exp(-1)) + math.log(2), rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 16, N, 10**6])
def test_value_and_gradients_are_those_of_all_logits_at_once(chunk):
    want = jax.value_and_grad(dense, (0, 1, 2, 3))(*arguments())
    assert_same(jax.jit(jax.value_and_grad(chunked(chunk), (0, 1, 2, 3)))(*arguments()), want)
    np.testing.assert_allclose(jax.jit(chunked(chunk))(*arguments()), want[0], rtol=2e-6)  # without gradients


@pytest.mark.parametrize(("scale", "bias"), [(5.0, -80.0), (5.0, 80.0), (-2.0, 0.0)])
def test_extreme_logits(scale, bias):
    given = arguments(scale=scale, bias=bias)
    got, want = (jax.value_and_grad(f, (0, 1, 2, 3))(*given) for f in (chunked(16), dense))
    np.testing.assert_allclose(got[0], want[0], rtol=2e-6)
    for got_slope, want_slope in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(got_slope, want_slope, atol=2e-6 * np.abs(want_slope).max(), rtol=2e-6)


def test_gradients_scale_with_what_follows():
    def halved(*given):
        return 0.5 * chunked(16)(*given) + 3.0

    got, want = (jax.grad(f, (0, 1, 2, 3))(*arguments()) for f in (halved, chunked(16)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, 0.5 * b, rtol=1e-6)


def test_bfloat16_embeddings_have_a_float32_loss():
    texts, images, scale, bias = arguments()
    half = (texts.astype(jnp.bfloat16), images.astype(jnp.bfloat16), scale, bias)
    loss, slopes = jax.value_and_grad(chunked(16), (0, 1, 2, 3))(*half)
    assert [x.dtype for x in (loss, *slopes)] == [jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]
    np.testing.assert_allclose(loss, dense(*(x.astype(jnp.float32) for x in half)), rtol=2e-6)


def test_pairs_are_matched():
    texts, images, scale, bias = arguments()
    right = chunked(16)(texts, images, scale, bias)
    assert right < chunked(16)(texts, jnp.roll(images, 1, axis=0), scale, bias)
    order = jax.random.permutation(jax.random.key(1), N)
    np.testing.assert_allclose(chunked(16)(texts[order], images[order], scale, bias), right, rtol=2e-6)


def test_what_does_not_pair_up_is_refused():
    texts, images, scale, bias = arguments()
    with pytest.raises(ValueError, match=r"texts \(48, 20\) and images \(47, 20\); both must be \[N, D\]"):
        chunked(16)(texts, images[1:], scale, bias)
    with pytest.raises(ValueError, match="chunk = 0; it must be at least 1"):
        chunked(0)(texts, images, scale, bias)


MESHES = [MeshShape(8, 1, 1), MeshShape(2, 4, 1), MeshShape(2, 2, 2), MeshShape(1, 1, 8)]


def compiled(devices, shape, n, chunk):
    """The compiled loss and gradients of n pairs on this mesh, and where its arguments lie."""
    mesh = meshes.make(shape, devices)
    rows, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    places = (rows, rows, whole, whole)
    given = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p) for x, p in zip(arguments(n), places, strict=True)]
    f = jax.value_and_grad(chunked(chunk), (0, 1, 2, 3))
    with jax.set_mesh(mesh):
        return jax.jit(f, out_shardings=(whole, places)).lower(*given).compile(), places


@pytest.mark.parametrize("chunk", [4, 6, 100])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_eight_devices_give_what_one_gives(devices, shape, chunk):
    run, places = compiled(devices, shape, N, chunk)
    assert_same(run(*jax.device_put(arguments(), places)), jax.value_and_grad(dense, (0, 1, 2, 3))(*arguments()))


def test_rows_that_the_devices_do_not_divide(devices):
    """54 = 2 * 27 rows: cut over data = 2, and whole along fsdp = 4."""
    with jax.set_mesh(meshes.make(MeshShape(2, 4, 1), devices)):
        got = jax.jit(jax.value_and_grad(chunked(5), (0, 1, 2, 3)))(*arguments(54))
    assert_same(got, jax.value_and_grad(dense, (0, 1, 2, 3))(*arguments(54)))


def test_no_device_holds_the_logits_or_the_embeddings_of_all(devices):
    """512 rows on 8 devices, 16 texts at a time: what any of them holds is [64, 16] logits and [64, D] embeddings."""
    n, chunk = 512, 16
    local = n // 8
    run, _ = compiled(devices, MeshShape(2, 4, 1), n, chunk)
    held = hlo.shapes(run.as_text())
    assert (local, chunk) in held
    assert max(math.prod(s) for s in held) == local * D
    crossing = hlo.collectives(run.as_text())
    # the texts and their gradient go round; beside them, sums over devices
    assert {c.shape for c in crossing if c.kind == "collective-permute"} == {(local, D)}
    assert all(c.kind == "all-reduce" and math.prod(c.shape) <= 1 for c in crossing if c.kind != "collective-permute")


def test_one_device_holds_a_tile_of_logits():
    run = jax.jit(jax.value_and_grad(chunked(16), (0, 1, 2, 3))).lower(*arguments(512)).compile()
    held = hlo.shapes(run.as_text())
    assert (512, 16) in held
    assert max(math.prod(s) for s in held) == 512 * D
