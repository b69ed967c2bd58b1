"""SigLIP against transformers: side by side where torch is installed, and against written answers everywhere.

In CI on Python 3.11, where torch and transformers are pinned, their absence fails.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.models.position_embeddings import resample_positions
from t5g2.models.siglip import VisionTower
from tests import weights
from tests.parity import siglip_cases as cases
from tests.tiny import FLOAT32, VISION

FILE = Path(__file__).parent / "golden" / "siglip.npz"
TOLERANCE = 1e-5
BFLOAT16 = replace(FLOAT32, dtype="bfloat16", vision_dtype="bfloat16")


def run_tower(model, images, compute=FLOAT32):
    """States of the patches and, with a pooling head, the image's vector after them."""
    states = model.encode(images, compute=compute)
    if not model.config.pool:
        return states
    return jnp.concatenate([states, model.pooled(images, compute=compute)[:, None]], axis=1)


def run_projector(model, patches, compute=FLOAT32):
    return model.project(jnp.asarray(patches), compute=compute)


def embed(model, texts, images, compute=FLOAT32):
    return model.embed_texts(texts, compute=compute), model.embed_images(images, compute=compute)


def embed_all(model, texts, images, compute=FLOAT32):
    return jnp.concatenate(embed(model, texts, images, compute))


def run_dual(model, texts, images, compute=FLOAT32):
    """Embeddings of the texts, of the images, and the logits of all pairs."""
    texts_MD, images_ND = embed(model, texts, images, compute)
    return texts_MD, images_ND, model.logits(texts_MD, images_ND)


def sigmoid_loss(model, texts, images):
    """Text i belongs to image i and to no other (arXiv 2303.15343, algorithm 1)."""
    logits_NN = model.logits(*embed(model, texts, images))
    signs_NN = 2.0 * jnp.eye(len(texts)) - 1.0
    return -jnp.sum(jax.nn.log_sigmoid(signs_NN * logits_NN)) / len(texts)


@pytest.fixture(scope="module")
def golden():
    return np.load(FILE)


@pytest.mark.parametrize("name", [name for name in cases.GOLDEN if name in cases.TOWERS])
def test_written_answers_of_towers(name, golden):
    model = cases.tower(name)
    assert golden[f"tower: {name}: weights"] == cases.checksum(model), "these are not the weights the answers are for"
    got = jax.jit(run_tower)(model, cases.images(model.config))
    np.testing.assert_allclose(got, golden[f"tower: {name}"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", [name for name in cases.GOLDEN if name in cases.DUALS])
def test_written_answers_of_dual_encoders(name, golden):
    model = cases.dual_encoder(name)
    assert golden[f"dual: {name}: weights"] == cases.checksum(model), "these are not the weights the answers are for"
    got = jax.jit(run_dual)(model, cases.texts(model.config), cases.images(model.config.vision))[-1]
    np.testing.assert_allclose(got, golden[f"dual: {name}"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", [name for name in cases.GOLDEN if name in cases.PROJECTORS])
def test_written_answers_of_projectors(name, golden):
    model = cases.projector(name)
    assert golden[f"projector: {name}: weights"] == cases.checksum(model), "these are not the answers' weights"
    got = jax.jit(run_projector)(model, cases.patches(model.config))
    np.testing.assert_allclose(got, golden[f"projector: {name}"], atol=TOLERANCE, rtol=0)


def test_the_answers_are_of_the_release_we_name(golden):
    assert str(golden["transformers"]) == "5.23.0"
    assert FILE.stat().st_size < 150_000


@pytest.fixture(scope="module")
def torch():
    if os.environ.get("CI") and sys.version_info[:2] == (3, 11):
        import torch
    else:
        torch = pytest.importorskip("torch")
        pytest.importorskip("transformers")
    return torch


@pytest.fixture(scope="module")
def reference(torch):
    from tests.parity import siglip_reference

    with torch.no_grad():
        yield siglip_reference


@pytest.mark.parametrize("name", cases.TOWERS)
def test_towers(name, reference):
    model = cases.tower(name)
    images = cases.images(model.config)
    expected = reference.run_tower(reference.tower(model), images).numpy()
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(jax.jit(run_tower)(model, images), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", cases.DUALS)
def test_dual_encoders(name, reference):
    model = cases.dual_encoder(name)
    texts, images = cases.texts(model.config), cases.images(model.config.vision)
    theirs = reference.dual_encoder(model)
    expected = reference.run_dual(theirs, texts, images)
    got = jax.jit(run_dual)(model, texts, images)
    for ours, other in zip(got, (expected.text_embeds, expected.image_embeds, expected.logits_per_text), strict=True):
        assert np.std(other.numpy()) > 0.03
        np.testing.assert_allclose(ours, other.numpy(), atol=TOLERANCE, rtol=0)
    pairs = reference.run_dual(theirs, texts[:3], images).loss.item()
    np.testing.assert_allclose(jax.jit(sigmoid_loss)(model, texts[:3], images), pairs, rtol=TOLERANCE)


@pytest.mark.parametrize("name", cases.PROJECTORS)
def test_projectors(name, reference):
    model, width = cases.projector(name), cases.PROJECTORS[name][1]
    patches = cases.patches(model.config)
    expected = reference.run_projector(reference.projector(model, width), patches).numpy()
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(jax.jit(run_projector)(model, patches), expected, atol=TOLERANCE, rtol=0)


def _towers(reference, dtype):
    for name in cases.TOWERS:
        model = weights.rounded(cases.tower(name))
        images = cases.images(model.config)
        yield (run_tower, model, images), reference.run_tower(reference.tower(model, dtype), images)


def _projectors(reference, dtype):
    for name, (_, width) in cases.PROJECTORS.items():
        model = weights.rounded(cases.projector(name))
        patches = cases.patches(model.config)
        theirs = reference.run_projector(reference.projector(model, width, dtype), patches)
        yield (run_projector, model, patches), theirs


def _embeddings(reference, dtype):
    for name in cases.DUALS:
        model = weights.rounded(cases.dual_encoder(name))
        texts, images = cases.texts(model.config), cases.images(model.config.vision)
        said = reference.run_dual(reference.dual_encoder(model, dtype), texts, images)
        yield (embed_all, model, texts, images), reference.torch.cat([said.text_embeds, said.image_embeds])


@pytest.mark.long
@pytest.mark.parametrize("family", [_towers, _embeddings, _projectors])
def test_bfloat16_is_no_farther_from_float32_than_transformers_is(family, reference, torch):
    """On the same weights and inputs, over all configs: the mean and the largest."""
    exact = [said.numpy() for _, said in family(reference, torch.float32)]
    off: dict[str, list[np.ndarray]] = {"ours": [], "theirs": []}
    for want, ((ours, *inputs), theirs) in zip(exact, family(reference, torch.bfloat16), strict=True):
        got = np.asarray(jax.jit(ours, static_argnames="compute")(*inputs, compute=BFLOAT16)).astype(np.float32)
        off["ours"].append(np.abs(got - want).ravel())
        off["theirs"].append(np.abs(theirs.float().numpy() - want).ravel())
    mine, other = (np.concatenate(off[who]) for who in ("ours", "theirs"))
    told = f"mean {mine.mean():.6f} (transformers {other.mean():.6f}), max {mine.max():.4f} ({other.max():.4f})"
    print(f"{family.__name__}: {told}")
    assert mine.mean() > 1e-5, "it was not computed in bfloat16"
    assert mine.mean() <= other.mean(), told
    assert mine.max() <= 1.25 * other.max(), told


def assert_gradients(got, want):
    assert got.keys() == want.keys()
    for name in got:
        largest = np.abs(want[name]).max()
        # what a key's bias adds to all scores of a query alike, the softmax takes away
        if not name.endswith("k_proj.bias") and "in_proj_bias" not in name:
            assert largest > 1e-4, f"{name} has no gradient to compare"
        np.testing.assert_allclose(got[name], want[name], atol=1e-4 * max(largest, 1e-3), rtol=0, err_msg=name)


def test_a_remainder_of_the_image_is_cut_off(reference, torch):
    """As by siglip-so400m-patch14-384: 27 patches of 14 pixels are 378 of 384."""
    config = replace(VISION, image_size=4 * VISION.patch_size + 2)
    model = cases.filled(VisionTower, config)
    images = np.random.RandomState(0).uniform(-1, 1, (2, config.image_size, config.image_size, 3)).astype(np.float32)
    assert config.patches == 16
    with torch.no_grad():
        expected = reference.run_tower(reference.tower(model), images)
    actual = jax.jit(run_tower)(model, images)
    np.testing.assert_allclose(actual, np.asarray(expected), atol=1e-5)


def test_gradients_of_a_tower(reference, torch):
    model = cases.tower("odd, pooled")
    images = cases.images(model.config)
    weights = np.random.RandomState(2).standard_normal((3, model.config.patches + 1, model.config.width))
    weights = (weights / weights.size**0.5).astype(np.float32)
    theirs = reference.tower(model, torch.float64)  # so that what is nothing is nothing, whatever the order of sums
    with torch.enable_grad():
        (reference.run_tower(theirs, images) * torch.tensor(weights)).sum().backward()
    gradient = jax.jit(jax.grad(lambda model: jnp.sum(run_tower(model, images) * weights)))(model)
    assert_gradients(reference.tower_tensors(reference.leaves(gradient)), reference.gradients(theirs))


def test_gradients_of_the_sigmoid_loss(reference, torch):
    model = cases.dual_encoder("odd")
    texts, images = cases.texts(model.config)[:3], cases.images(model.config.vision)
    theirs = reference.dual_encoder(model)
    with torch.enable_grad():
        reference.run_dual(theirs, texts, images).loss.backward()
    gradient = jax.jit(jax.grad(lambda model: sigmoid_loss(model, texts, images)))(model)
    assert_gradients(reference.dual_tensors(reference.leaves(gradient)), reference.gradients(theirs))


def test_gradients_of_a_projector(reference, torch):
    model, patches = cases.projector("6 to 4"), cases.patches(cases.PROJECTORS["6 to 4"][0])
    weights = np.random.RandomState(2).standard_normal((3, 4, 17)).astype(np.float32)
    theirs = reference.projector(model, 17)
    with torch.enable_grad():
        (reference.run_projector(theirs, patches) * torch.tensor(weights)).sum().backward()
    gradient = jax.jit(jax.grad(lambda model: jnp.sum(run_projector(model, patches) * weights)))(model)
    assert_gradients(reference.projector_tensors(reference.leaves(gradient)), reference.gradients(theirs))


@pytest.mark.parametrize(("old", "new"), [(64, 32), (32, 64), (4, 7), (7, 4), (1, 3), (3, 1), (5, 5), (16, 27)])
def test_resampled_positions(old, new, reference, torch):
    """As transformers' own module does it, for images of another size."""
    config = replace(cases.TOWERS["tiny"], image_size=4 * old)
    model = cases.filled(cases.VisionTower, config)
    embeddings = reference.tower(model).embeddings
    expected = embeddings.interpolate_pos_encoding(torch.zeros(1, new * new, 16), 4 * new, 4 * new)[0].numpy()
    got = resample_positions(np.asarray(model.positions[...]), new)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=3e-6, rtol=0)


def test_cases_are_awkward():
    towers, duals = cases.TOWERS.values(), cases.DUALS.values()
    assert min(len(cases.TOWERS), len(cases.DUALS), len(cases.PROJECTORS)) >= 8
    assert {tower.pool for tower in towers} == {True, False}
    assert any(tower.patches == 1 for tower in towers)
    assert any(tower.patches > 512 for tower in towers)
    assert any(tower.width // tower.heads % 2 for tower in towers)
    assert any(dual.text.width != dual.text.projection for dual in duals)
    assert any(dual.text.layers != dual.vision.layers for dual in duals)
    assert {dual.text.length for dual in duals} > {1, 33}
