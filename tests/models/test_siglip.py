"""Properties of SigLIP without a reference: shapes, memory, sharding, first values; tests/parity has the numbers."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.core import sharding as meshes
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.core.sharding import MeshShape
from t5g2.models import build, siglip
from t5g2.models.config import ImageConfig, VisionConfig
from t5g2.models.layers import Compute
from t5g2.models.position_embeddings import resample_positions
from t5g2.models.siglip import Projector, Siglip, VisionTower
from t5g2.models.sizes import size
from tests import weights
from tests.tiny import FLOAT32, IMAGES, SIGLIP, VISION

POOLED = replace(VISION, pool=True)


def tower(config: VisionConfig, seed: int = 0) -> VisionTower:
    return VisionTower(config, key=jax.random.key(seed))


def images(config: VisionConfig, number: int = 2):
    return jax.random.uniform(jax.random.key(1), (number, config.image_size, config.image_size, 3), minval=-1.0)


def count(module) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(module))


@pytest.mark.parametrize(
    ("name", "part", "parameters"),
    [
        ("gemma3:4b", "vision", 416_866_032),
        ("gemma3:4b", "projector", 1152 + 1152 * 2560),
        ("medsiglip:448", "vision", 428_565_440),
        ("medsiglip:448", "text", 449_734_896),
        ("medsiglip:448", None, 878_300_338),
    ],
)
def test_parameters_of_the_released_towers(name, part, parameters):
    whole = build.abstract(size(name))
    assert count(whole if part is None else getattr(whole, part)) == parameters


def test_leaves():
    """Names, shapes and logical axes of all weights: what checkpoints, adaptation and sharding speak of."""
    d, n, h, f, p = 16, 2, 8, 24, 4  # of the image tower
    attention = {f"{name}.kernel": ((d, n, h), ("embed", "heads", "head_size")) for name in "qkv"}
    attention |= {f"{name}.bias": ((n, h), ("heads", "head_size")) for name in "qkv"}
    attention |= {"o.kernel": ((n, h, d), ("heads", "head_size", "embed")), "o.bias": ((d,), (None,))}
    mlp = {"up.kernel": ((d, f), ("embed", "mlp")), "up.bias": ((f,), ("mlp",))}
    mlp |= {"down.kernel": ((f, d), ("mlp", "embed")), "down.bias": ((d,), (None,))}
    norm = {"scale": ((d,), (None,)), "bias": ((d,), (None,))}

    def under(prefix, leaves):
        return {f"{prefix}.{name}": value for name, value in leaves.items()}

    layer = under("attention", attention) | under("mlp", mlp)
    layer |= under("pre_attention_norm", norm) | under("pre_mlp_norm", norm)
    pool = under("attention", attention) | under("mlp", mlp) | under("norm", norm) | {"probe": ((d,), (None,))}
    expected = {(f"layers.{name}", number): value for name, value in layer.items() for number in (0, 1)}
    whole = under("pool", pool) | under("final_norm", norm)
    whole |= {"patches.kernel": ((p, p, 3, d), (None, None, None, "embed")), "patches.bias": ((d,), (None,))}
    whole |= {"positions": ((16, d), (None, "embed"))}
    expected |= {(name, None): value for name, value in whole.items()}
    made = tree.leaves(tower(POOLED))
    assert {key: (leaf.shape, leaf.axes) for key, leaf in made.items()} == expected

    text = {path: leaf.shape for (path, _), leaf in tree.leaves(build.abstract(SIGLIP)).items()}
    assert text["text.embedder.table"] == (50, 20)
    assert text["text.positions"] == (6, 20)
    assert (text["text.head.kernel"], text["text.head.bias"]) == ((20, 16), (16,))
    assert text["text.layers.attention.q.kernel"] == (20, 4, 5)
    assert text["logit_scale"] == text["logit_bias"] == ()
    assert {path.split(".")[0] for path in text} == {"vision", "text", "logit_scale", "logit_bias"}
    projector = tree.leaves(Projector(IMAGES, 32, key=jax.random.key(0)))
    assert {path: leaf.shape for (path, _), leaf in projector.items()} == {"norm.scale": (16,), "kernel": (16, 32)}


def test_first_values():
    """big_vision's: Xavier and LeCun by their bounds, biases of an MLP of 1e-6, cosines at scale 10 and bias -10."""
    config = VisionConfig(width=128, layers=2, mlp_width=192, heads=4, image_size=32, patch_size=4, pool=True)
    text = replace(SIGLIP.text, vocab_size=500, width=128, heads=4, projection=128)
    made = Siglip(replace(SIGLIP, vision=config, text=text), key=jax.random.key(0))
    values = {path: np.asarray(leaf.read()) for (path, layer), leaf in tree.leaves(made).items() if layer in (None, 1)}

    def spread(path, bound):
        x = values[path]
        assert 0.97 * bound < np.abs(x).max() <= bound
        assert abs(x.std() - bound / 3**0.5) < 0.02 * bound
        assert abs(x.mean()) < 0.02 * bound

    for name in ("q", "k", "v", "o"):
        spread(f"vision.layers.attention.{name}.kernel", (6 / 256) ** 0.5)
        spread(f"vision.pool.attention.{name}.kernel", (6 / 256) ** 0.5)
        assert not values[f"text.layers.attention.{name}.bias"].any()
    for name in ("up", "down"):
        spread(f"text.layers.mlp.{name}.kernel", (6 / (128 + (192 if "vision" in name else text.mlp_width))) ** 0.5)
        assert 3e-7 < values[f"vision.layers.mlp.{name}.bias"].std() < 3e-6
    assert 0.8 * (6 / 129) ** 0.5 < np.abs(values["vision.pool.probe"]).max() <= (6 / 129) ** 0.5
    for path, std in (
        ("vision.patches.kernel", 48**-0.5),
        ("vision.positions", 128**-0.5),
        ("text.embedder.table", 128**-0.5),
        ("text.head.kernel", 128**-0.5),
    ):
        assert values[path].std() == pytest.approx(std, rel=0.03)
    for path, value in values.items():
        if path.endswith("norm.scale"):
            assert (value == 1).all()
        elif path.endswith(("norm.bias", "head.bias", "patches.bias")):
            assert not value.any()
    assert values["logit_scale"] == np.float32(math.log(10))
    assert values["logit_bias"] == -10


def test_layers_differ():
    made = {key: leaf.read() for key, leaf in tree.leaves(tower(VISION)).items()}
    assert not np.array_equal(made["layers.mlp.up.kernel", 0], made["layers.mlp.up.kernel", 1])


def test_patches_are_those_of_a_convolution():
    """Flax's and transformers' patch embedding; in rows from the top left."""
    made, given = tower(replace(VISION, layers=1)), images(VISION)
    p = VISION.patch_size
    kernel = made.patches.kernel[...]
    grid = jax.lax.conv_general_dilated(
        given, kernel, (p, p), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    cut = jnp.moveaxis(given.reshape(2, 4, p, 4, p, 3), 2, 3).reshape(2, 16, p, p, 3)
    np.testing.assert_allclose(made.patches.transform(cut), grid.reshape(2, 16, 16), atol=1e-6)
    # without layers that mix them, a state depends on its own patch only
    blind = jax.tree.map(lambda x: x, made)
    blind.layers.slots[0].attention.o.kernel[...] = jnp.zeros_like(blind.layers.slots[0].attention.o.kernel[...])
    gradient = jax.grad(lambda x: jnp.sum(blind.encode(x, compute=FLOAT32)[:, 6] ** 3))(given)
    touched = np.argwhere(np.abs(gradient).max(axis=(0, 3)) > 0)
    assert (touched.min(axis=0).tolist(), touched.max(axis=0).tolist()) == ([4, 8], [7, 11])  # row 1, column 2


def test_every_patch_sees_every_other():
    made, given = tower(VISION), images(VISION, 1)
    gradients = jax.jit(jax.jacrev(lambda x: jnp.sum(made.encode(x, compute=FLOAT32) ** 3, axis=(0, 2))))(given)
    assert (np.abs(gradients).max(axis=(1, 4)) > 0).all()


def test_every_token_of_a_text_is_seen_and_the_last_one_speaks():
    model = build.make(SIGLIP, key=jax.random.key(0))
    tokens = np.array([[5, 6, 7, 1, 1, 1]], np.int32)
    embed = jax.jit(partial(model.embed_texts, compute=FLOAT32))
    changed = np.where(np.eye(6, dtype=bool), 9, tokens)
    swapped = tokens[:, [1, 0, 2, 3, 4, 5]]
    together = np.asarray(embed(np.concatenate([tokens, changed, swapped])))
    # any of the six, as padding is seen too, and their order
    assert (np.abs(together[1:] - together[0]).max(axis=-1) > 1e-4).all()


def value_and_slopes(model, given, compute=FLOAT32):
    def total(model):
        return jnp.sum(model.pooled(given, compute=compute).astype(jnp.float32) ** 3)

    return jax.jit(jax.value_and_grad(total))(model)


def assert_close(got, want, atol=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=atol * max(1, np.abs(b).max()), rtol=0)


def test_attention_in_blocks_changes_nothing():
    model, given = tower(POOLED), images(POOLED)
    assert_close(value_and_slopes(model, given, replace(FLOAT32, backend="blockwise")), value_and_slopes(model, given))


@pytest.mark.parametrize(
    "compute", [replace(FLOAT32, remat="block"), replace(FLOAT32, scan=False)], ids=["remat", "unrolled"]
)
def test_how_layers_are_run_changes_nothing(compute):
    model, given = tower(POOLED), images(POOLED)
    assert_close(value_and_slopes(model, given, compute), value_and_slopes(model, given))


def test_memory_of_the_released_tower():
    """At 896 pixels the scores of one layer are 1 GiB an image; forward, all that is held beside weights is less."""
    config = size("gemma3:4b").images.vision
    given = jax.ShapeDtypeStruct((1, 896, 896, 3), jnp.float32)
    run = jax.jit(lambda model, x: model.encode(x, compute=Compute()))
    held = run.lower(jax.eval_shape(lambda: tower(config)), given).compile().memory_analysis()
    assert 16 * 4096 * 4096 * 4 == 2**30
    assert held.temp_size_in_bytes < 2**29


@pytest.mark.parametrize("shape", [MeshShape(8, 1, 1), MeshShape(2, 2, 2), MeshShape(1, 4, 2)], ids=str)
def test_eight_devices_give_what_one_gives(devices, shape):
    model = weights.model(SIGLIP)
    tokens = jax.random.randint(jax.random.key(2), (8, 6), 0, 50)
    given = images(SIGLIP.vision, 8)

    def total(model, tokens, given):
        both = model.embed_texts(tokens, compute=FLOAT32), model.embed_images(given, compute=FLOAT32)
        return jnp.sum(jnp.tanh(model.logits(*both)))

    want = jax.jit(jax.value_and_grad(total))(model, tokens, given)
    mesh = meshes.make(shape, devices)
    rows, places = meshes.batch_sharding(mesh), meshes.shardings(model, mesh)
    with jax.set_mesh(mesh):
        f = jax.jit(jax.value_and_grad(total), out_shardings=(meshes.replicated(mesh), places))
        got = f(jax.device_put(model, places), *jax.device_put((tokens, given), rows))
    assert_close(got, want, atol=5e-5)


def test_dtypes():
    """Images run in vision_dtype and texts in dtype; embeddings and logits are float32 whatever those are."""
    model, given, tokens = weights.model(SIGLIP), images(SIGLIP.vision), jnp.ones((2, 6), jnp.int32)
    for compute in (FLOAT32, Compute(), Compute(dtype="float32", vision_dtype="bfloat16")):

        @jax.jit
        def outputs(model, tokens, given, compute=compute):
            embedded = model.embed_texts(tokens, compute=compute), model.embed_images(given, compute=compute)
            states = [run(given, compute=compute) for run in (model.vision.encode, model.vision.pooled)]
            return (*embedded, model.logits(*embedded)), (*states, model.text.encode(tokens, compute=compute))

        embedded, states = outputs(model, tokens, given)
        assert [x.dtype for x in states] == [compute.vision_dtype, compute.vision_dtype, compute.dtype]
        assert [x.dtype for x in embedded] == [jnp.float32] * 3
        for x in embedded[:2]:
            np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1.0, rtol=1e-6)
    projector = Projector(IMAGES, 32, key=jax.random.key(0))
    patches = jnp.ones((2, 16, 16), jnp.bfloat16)
    half = Compute(vision_dtype="bfloat16")
    assert projector.project(patches, compute=half).dtype == jnp.bfloat16


def test_norms_and_softmax_are_float32_inside():
    """A mean of 300 swallows differences of 1 in bfloat16, whose neighbours are 2 apart there."""
    norm = siglip.LayerNorm(64, eps=1e-6, param_dtype=jnp.float32)
    x = (300 + 2 * (jnp.arange(64) % 2)).astype(jnp.bfloat16)[None]
    got = norm.normalize(x, Compute(vision_dtype="bfloat16")).astype(jnp.float32)
    np.testing.assert_allclose(got[0, :4], [-1, 1, -1, 1], rtol=0.01)


def test_a_vector_of_zeros_has_finite_gradients():
    model = build.make(SIGLIP, key=jax.random.key(0))
    for last in (model.vision.pool.attention.o, model.vision.pool.mlp.down):
        last.kernel[...], last.bias[...] = jnp.zeros_like(last.kernel[...]), jnp.zeros_like(last.bias[...])

    def total(model):
        return jnp.sum(model.embed_images(images(SIGLIP.vision), compute=FLOAT32))

    value, gradients = jax.jit(jax.value_and_grad(total))(model)
    assert value == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_logits_by_hand():
    model = build.make(SIGLIP, key=jax.random.key(0))
    got = model.logits(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]]))
    np.testing.assert_allclose(got, [[0, -4, -10], [-10, -2, -20]], atol=1e-5)


def test_a_fresh_projector_says_nothing_and_learns():
    projector, patches = Projector(IMAGES, 32, key=jax.random.key(0)), images(VISION)[:, :, :, 0]
    run = lambda projector: projector.project(patches, compute=FLOAT32)  # noqa: E731
    assert not run(projector).any()
    gradients = jax.grad(lambda projector: jnp.sum(run(projector)))(projector)
    assert gradients.kernel[...].all()
    assert not gradients.norm.scale[...].any()


def test_tokens_are_the_means_of_squares_of_patches():
    """4 x 4 patches, of which number i holds i and 1, as 2 x 2 tokens: the mean of patches 0, 1, 4, 5 is 2.5."""
    config = ImageConfig(replace(VISION, width=2, heads=1), token=8, begin=6, end=7, tokens=4)
    projector = Projector(config, 2, key=jax.random.key(0))
    projector.kernel[...] = jnp.eye(2)
    patches = jnp.stack([jnp.arange(16.0), jnp.ones(16)], axis=-1)[None]
    got = projector.project(patches, compute=FLOAT32)[0]
    np.testing.assert_allclose(got[:, 0] / got[:, 1], [2.5, 4.5, 10.5, 12.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tower(VISION).encode(jnp.zeros((1, 20, 20, 3)), compute=FLOAT32), r"takes \[B, 16, 16, 3\]"),
        (lambda: tower(VISION).pooled(jnp.zeros((1, 16, 16, 3)), compute=FLOAT32), "pool=False"),
        (
            lambda: build.make(SIGLIP, key=jax.random.key(0)).embed_texts(jnp.ones((2, 5), int), compute=FLOAT32),
            "pad every one to 6 tokens",
        ),
    ],
)
def test_wrong_shapes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_resampled_positions():
    """Between the sizes of Gemma 3 and MedSigLIP; a constant stays one, and the weights of every new place sum to 1."""
    draw = np.random.RandomState(0)
    grid = draw.standard_normal((64 * 64, 3)).astype(np.float32)
    small = resample_positions(grid, 32)
    assert (small.shape, small.dtype) == ((32 * 32, 3), np.float32)
    assert resample_positions(small, 64).shape == (64 * 64, 3)
    np.testing.assert_array_equal(resample_positions(grid, 64), grid)
    np.testing.assert_allclose(resample_positions(np.full((49, 2), 1.7), 16), 1.7, rtol=1e-6)
    # rows and columns are not exchanged
    ramp = np.repeat(np.arange(8.0), 8)[:, None]
    got = resample_positions(ramp, 4)[:, 0].reshape(4, 4)
    assert (np.diff(got, axis=0) > 1).all()
    np.testing.assert_allclose(np.diff(got, axis=1), 0, atol=1e-6)


@pytest.mark.parametrize("given", [np.zeros((15, 4)), np.zeros((16,)), np.zeros((0, 4))])
def test_positions_that_are_no_square_are_refused(given):
    with pytest.raises(UserError, match=r"they must be those of a square of patches"):
        resample_positions(given, 4)
