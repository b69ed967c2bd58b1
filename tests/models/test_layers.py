import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.models import layers
from t5g2.models.config import Rope
from t5g2.models.layers import Embedder, GatedMLP, Head, RMSNorm
from tests.tiny import FLOAT32

TOKENS = np.array([[3, 7, 0, 7]], np.int32)


def test_rms_norm_multiplies_by_one_plus_scale_in_float32_and_rounds_once():
    norm = RMSNorm(4, eps=1e-6, param_dtype=jnp.float32)
    norm.scale[...] = jnp.array([0.0, 0.5, -1.0, 2.0])
    x = np.array([[1.0, -2.0, 3.0, 0.1]], np.float32)
    expected = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6) * np.array([1.0, 1.5, 0.0, 3.0])
    np.testing.assert_allclose(norm.normalize(jnp.asarray(x), FLOAT32), expected, rtol=1e-6)
    rough = jnp.asarray(x, jnp.bfloat16)
    once = norm.normalize(rough.astype(jnp.float32), FLOAT32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(norm.normalize(rough, FLOAT32), once)


# sqrt(width) as bfloat16 holds it, for the widths of released models
@pytest.mark.parametrize(("width", "factor"), [(640, 25.25), (1152, 34.0), (2560, 50.5), (3840, 62.0), (5376, 73.5)])
def test_embeddings_are_scaled_in_the_dtype_of_activations(width, factor):
    embedder = Embedder(9, width, key=jax.random.key(0), param_dtype=jnp.float32)
    row = embedder.table[...][TOKENS]
    np.testing.assert_array_equal(embedder.embed(TOKENS, dtype=jnp.float32), row * np.float32(width**0.5))
    rough = embedder.embed(TOKENS, dtype=jnp.bfloat16)
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rough, row.astype(jnp.bfloat16) * jnp.bfloat16(factor))


def test_the_end_of_image_token_has_a_vector_of_its_own():
    embedder = Embedder(9, 4, key=jax.random.key(0), param_dtype=jnp.float32, eoi_id=7)
    np.testing.assert_array_equal(embedder.eoi[...], np.zeros(4))
    embedder.eoi[...] = jnp.array([1.0, 2.0, 3.0, 4.0])
    x_BTD = embedder.embed(TOKENS, dtype=jnp.float32)
    np.testing.assert_array_equal(x_BTD[0, 1], [1, 2, 3, 4])  # not scaled
    np.testing.assert_array_equal(x_BTD[0, 0], 2 * embedder.table[...][3])
    gradient = jax.grad(lambda e: jnp.sum(e.embed(TOKENS, dtype=jnp.float32)))(embedder)
    np.testing.assert_array_equal(gradient.table[...][7], np.zeros(4))  # its row of the table is not looked up
    np.testing.assert_array_equal(gradient.eoi[...], np.full(4, 2.0))
    np.testing.assert_array_equal(gradient.table[...][0], np.full(4, 2.0))  # the row of padding is like any other


def test_rotation_turns_pairs_half_a_head_apart():
    positions = np.array([[0, 3]], np.int32)
    turn = layers.rotary_cos_sin(positions, Rope(100.0, factor=2.0), 4)
    x = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    y_BTNH = layers.apply_rotary(jnp.broadcast_to(x, (1, 2, 1, 4)), turn)
    np.testing.assert_array_equal(y_BTNH[0, 0, 0], x)
    for pair, frequency in ((0, 1.0), (1, 0.1)):  # 100 ** (-2 k / 4)
        angle = 3 * frequency / 2
        a, b = x[pair], x[pair + 2]
        expected = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
        np.testing.assert_allclose(y_BTNH[0, 1, 0, [pair, pair + 2]], expected, rtol=1e-5)


def test_angles_are_exact_at_long_positions_whatever_the_activations():
    far = np.array([[131_071]], np.int32)
    cos, _ = layers.rotary_cos_sin(far, Rope(10_000.0), 4)
    np.testing.assert_allclose(cos[0, 0], np.cos(131_071.0 * np.array([1.0, 0.01])), atol=1e-2)
    x_BTNH = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    exact = layers.apply_rotary(x_BTNH.astype(jnp.float32), layers.rotary_cos_sin(far, Rope(10_000.0), 4))
    np.testing.assert_array_equal(
        layers.apply_rotary(x_BTNH, layers.rotary_cos_sin(far, Rope(10_000.0), 4)), exact.astype(jnp.bfloat16)
    )


def test_project_contracts_the_axes_it_says():
    keys = jax.random.split(jax.random.key(0), 4)
    x_BTD, w_DNH = jax.random.normal(keys[0], (2, 3, 4)), jax.random.normal(keys[1], (4, 5, 6))
    np.testing.assert_allclose(layers.project(x_BTD, w_DNH), np.einsum("BTD,DNH->BTNH", x_BTD, w_DNH), rtol=1e-5)
    x_BTNH, w_NHD = jax.random.normal(keys[2], (2, 3, 5, 6)), jax.random.normal(keys[3], (5, 6, 4))
    got = layers.project(x_BTNH, w_NHD, inputs=2)
    np.testing.assert_allclose(got, np.einsum("BTNH,NHD->BTD", x_BTNH, w_NHD), rtol=1e-4, atol=1e-5)


def test_mlp_is_gated_by_the_tanh_gelu():
    mlp = GatedMLP(4, 6, key=jax.random.key(0), param_dtype=jnp.float32)
    x_BTD = 30 * jax.random.normal(jax.random.key(1), (2, 3, 4))
    g = np.float64(x_BTD @ mlp.gate[...])
    gelu = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    expected = (gelu * np.float64(x_BTD @ mlp.up[...])) @ np.float64(mlp.down[...])
    np.testing.assert_allclose(mlp.transform(x_BTD), expected, rtol=1e-4, atol=1e-5)


def test_logits_are_float32_and_capped():
    hidden_BTD = 10 * jax.random.normal(jax.random.key(0), (1, 2, 4)).astype(jnp.bfloat16)
    table_VD = jax.random.normal(jax.random.key(1), (5, 4))
    plain = layers.logits(hidden_BTD, Head(table_VD, None))
    assert plain.dtype == jnp.float32
    np.testing.assert_allclose(layers.logits(hidden_BTD, Head(table_VD, 3.0)), 3 * np.tanh(plain / 3), rtol=1e-5)


def test_initial_values():
    draw = layers.normal(jax.random.key(0), (400, 500), jnp.float32)
    assert abs(float(jnp.std(draw)) - 0.02) < 1e-3
    assert abs(float(jnp.mean(draw))) < 1e-3
    # the same draw, rounded: a model started in bfloat16 is the float32 one
    rough = layers.normal(jax.random.key(0), (400, 500), jnp.bfloat16)
    np.testing.assert_array_equal(rough, draw.astype(jnp.bfloat16))


def test_every_axis_of_a_parameter_has_a_name():
    with pytest.raises(ValueError, match="name every axis"):
        layers.param(None, (2, 3), axes=("embed",), init=layers.zeros, dtype=jnp.float32)
