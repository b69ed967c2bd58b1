"""Attention where columns are cut over devices: that of whole rows, output and gradients, on any mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.core import sharding as meshes
from t5g2.core.batch import Sequences
from t5g2.core.sharding import MeshShape
from t5g2.models import masks
from t5g2.models.backends import blockwise, cut_columns, reference
from t5g2.models.backends.cut_columns import LocalColumns, halo, local_columns
from t5g2.models.backends.per_device import per_device
from t5g2.models.masks import ALL, Keys, Mask
from tests import hlo
from tests.models.backend_variants import VARIANTS
from tests.models.test_backends import IN_ORDER, runs, tokens

ROWS, MEMORY, LENGTH, HEADS, KV_HEADS = 4, 32, 12, 4, 2
SHAPES = {
    "data 2 x context 4": MeshShape(data=2, context=4),
    "fsdp 2 x tensor 2 x context 2": MeshShape(data=1, fsdp=2, tensor=2, context=2),
    "context 8": MeshShape(data=1, context=8),
}
# two rows packed, one with padding within, one whole
ENCODER = [runs(MEMORY, 3, 17, 9), runs(MEMORY, 20, 12), runs(MEMORY, -5, 14, -2, 6), runs(MEMORY, 32)]
DECODER = [runs(LENGTH, 4, 2, 6), runs(LENGTH, 5, 3), runs(LENGTH, 0, 7, 0, 4), runs(LENGTH, 12)]
BACKENDS = {
    "blockwise": per_device(blockwise.attend, combines=True),
    "small blocks": per_device(VARIANTS["small blocks"], combines=True),
    "splash": per_device(VARIANTS["splash"]),
    "reference": reference.attend,
}


def arrays(size: int) -> tuple:
    draw = np.random.RandomState(0)

    def array(length: int, number: int):
        return draw.standard_normal((ROWS, length, number, size)).astype(np.float32)

    own, memory = (tuple(array(n, KV_HEADS) for _ in range(2)) for n in (LENGTH, MEMORY))
    return array(MEMORY, HEADS), array(LENGTH, HEADS), own, memory


def program(backend, mask: Mask, kind: str):
    """Output and gradients of an encoder's attention to itself, or a decoder's to it, alone or merged."""

    def run(q_BTNH, own, memory, query: Sequences, encoder: Sequences):
        def total(q_BTNH, own, memory):
            sources = {
                "encoder": [(Keys(*memory, encoder, "encoder_length"), mask)],
                "cross": [(Keys(*memory, encoder, "encoder_length"), ALL)],
                "merged": [(Keys(*memory, encoder, "encoder_length"), ALL), (Keys(*own, query), mask)],
            }[kind]
            tokens = encoder if kind == "encoder" else query
            o_BTNH = backend(q_BTNH, tokens, sources, scale=0.3, softcap=None, dtype="float32")
            return jnp.sum(jnp.sin(o_BTNH)), o_BTNH

        gradients, o_BTNH = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q_BTNH, own, memory)
        return o_BTNH, gradients

    return jax.jit(run)


@functools.cache
def expected(mask: Mask, kind: str, size: int):
    q_BSNH, q_BTNH, own, memory = arrays(size)
    arguments = (q_BSNH if kind == "encoder" else q_BTNH, own, memory, tokens(DECODER), tokens(ENCODER))
    return arguments, jax.device_get(program(reference.attend, mask, kind)(*arguments))


def compare(shape: MeshShape, backend: str, mask: Mask, kind: str, size: int = 8):
    arguments, wanted = expected(mask, kind, size)
    with jax.set_mesh(meshes.make(shape)):
        got = jax.device_get(program(BACKENDS[backend], mask, kind)(*arguments))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5 * max(1, np.abs(w).max())), got, wanted)


@pytest.mark.parametrize(
    ("shape", "mask", "kind"),
    [
        ("data 2 x context 4", ALL, "encoder"),
        ("data 2 x context 4", masks.bidirectional(6), "encoder"),
        # halos of several neighbours, which hold 4 columns each, unequal on the two sides
        ("context 8", Mask(causal=False, left=11, right=5), "encoder"),
        ("context 8", masks.each_side(20), "encoder"),  # wider than a halo pays
        ("fsdp 2 x tensor 2 x context 2", masks.causal(7), "encoder"),
        ("fsdp 2 x tensor 2 x context 2", masks.causal(), "encoder"),
        ("data 2 x context 4", masks.causal(), "merged"),
        ("fsdp 2 x tensor 2 x context 2", masks.causal(3), "merged"),
        ("context 8", masks.causal(5), "merged"),  # 12 own keys in 8 shares
        ("data 2 x context 4", ALL, "cross"),
    ],
)
def test_blocks_of_cut_columns(shape, mask, kind):
    compare(SHAPES[shape], "small blocks" if kind == "encoder" else "blockwise", mask, kind)


@pytest.mark.parametrize("shape", ["data 2 x context 4", "fsdp 2 x tensor 2 x context 2"])
def test_an_offset_of_cut_columns(shape):
    """Each device adds it to the scores of its share of the encoder's keys."""

    def output(backend):
        def run(q_BTNH, own, memory, query: Sequences, encoder: Sequences, offset):
            encoder_keys = Keys(*memory, encoder, "encoder_length", score_offset=offset)
            sources = [(encoder_keys, ALL), (Keys(*own, query), masks.causal(3))]
            return backend(q_BTNH, query, sources, scale=0.3, softcap=None, dtype="float32")

        return jax.jit(run)

    _, *run = arrays(8)
    arguments = (*run, tokens(DECODER), tokens(ENCODER), jnp.float32(-1.5))
    wanted = jax.device_get(output(reference.attend)(*arguments))
    with jax.set_mesh(meshes.make(SHAPES[shape])):
        got = jax.device_get(output(BACKENDS["blockwise"])(*arguments))
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert np.abs(wanted - expected(masks.causal(3), "merged", 8)[1][0]).max() > 0.05


@pytest.mark.parametrize(
    ("mask", "kind"), [(masks.bidirectional(6), "encoder"), (masks.causal(), "merged"), (masks.causal(3), "merged")]
)
def test_a_kernel_with_cut_columns(mask, kind):
    """Its mask is known while tracing: that of a halo, or of a share of a decoder's queries."""
    compare(SHAPES["data 2 x context 4"], "splash", mask, kind, size=128)


def test_rows_out_of_order_are_nan_where_a_halo_is_by_columns():
    arguments, wanted = expected(masks.bidirectional(6), "encoder", 8)
    positions = np.array(arguments[4].positions)
    positions[3, 7:] += 2
    swapped = arguments[4]._replace(positions=positions)
    with jax.set_mesh(meshes.make(SHAPES["data 2 x context 4"])):
        o_BTNH, _ = program(BACKENDS["small blocks"], masks.bidirectional(6), "encoder")(*arguments[:4], swapped)
    assert IN_ORDER(swapped).tolist() == [True, True, True, False]
    np.testing.assert_allclose(o_BTNH[:3], wanted[0][:3], atol=1e-5)
    assert np.isnan(o_BTNH[3]).all()


@pytest.mark.parametrize(
    ("mask", "blocks", "expected"),
    [
        (masks.bidirectional(512), False, (255, 256)),
        (masks.causal(512), False, (511, 0)),
        (masks.causal(512), True, None),  # an image's tokens see all of it
        (masks.causal(512, ahead=511), True, (511, 511)),
        (masks.causal(), False, None),
        (ALL, False, None),
        (Mask(causal=False, left=3), False, None),
        (masks.each_side(3583), False, (3583, 3583)),
        (masks.each_side(3584), False, None),  # as many as all others have
    ],
)
def test_halos(mask, blocks, expected):
    assert halo(mask, 1024, 8, blocks=blocks) == expected


def test_columns_on_one_device(devices):
    encoder, own = (64, "encoder_length"), (20, "length")
    window = masks.bidirectional(6)
    with jax.set_mesh(meshes.make(MeshShape(data=1, fsdp=2, context=4), devices)):
        assert local_columns(64, [encoder], [ALL], own=0, blocks=False) == LocalColumns(16, (64,), None)
        assert local_columns(64, [encoder], [window], own=0, blocks=False) == LocalColumns(16, (16 + 2 + 3,), 0)
        merged = local_columns(20, [encoder, own], [ALL, masks.causal()], own=1, blocks=False)
        assert merged == LocalColumns(20, (16, 5), 1, combined=True)
        assert local_columns(20, [own], [masks.causal()], own=0, blocks=False) == LocalColumns(20, (20,), 0)
        # a length that the mesh does not divide is whole on every device
        odd = (63, "encoder_length")
        assert local_columns(63, [odd], [window], own=0, blocks=False) == LocalColumns(63, (63,), 0)
    assert local_columns(64, [encoder], [window], own=0, blocks=False) == LocalColumns(64, (64,), 0)


@pytest.mark.parametrize(
    ("mask", "kind", "kinds"),
    [
        (masks.bidirectional(6), "encoder", {"collective-permute"}),
        (ALL, "encoder", {"all-gather"}),
        (masks.causal(), "merged", {"all-reduce"}),
    ],
)
def test_what_crosses_devices(mask, kind, kinds):
    """A window sends halos, a global layer gathers keys; of merged attention outputs are summed, and no key moves."""
    (q_BTNH, own, memory, query, encoder), _ = expected(mask, kind, 8)
    mesh = meshes.make(SHAPES["context 8"])
    cut = jax.NamedSharding(mesh, jax.P(None, "context", None, None))
    memory = jax.device_put(memory, cut)
    q_BTNH = jax.device_put(q_BTNH, cut) if kind == "encoder" else q_BTNH
    output = jax.jit(lambda *arguments: program(BACKENDS["blockwise"], mask, kind)(*arguments)[0])
    with jax.set_mesh(mesh):
        text = output.lower(q_BTNH, own, memory, query, encoder).compile().as_text()
    crossing = hlo.collectives(text or "")
    assert {c.kind for c in crossing} == kinds
    if kind == "merged":  # of every query and head the largest score, the sum of weights, and the output
        assert sorted(math.prod(c.shape) for c in crossing) == [ROWS * LENGTH * HEADS * n for n in (1, 1, 8)]


def test_the_halo_of_the_first_and_the_last_device_is_padding(devices):
    """Columns 0 to 15 over 4 devices, 5 before and 2 after: what is past an end is 0, as segments of padding are."""
    mesh = meshes.make(MeshShape(data=1, context=4), devices[:4])

    def around(x_BCKH):
        before = cut_columns._from_neighbours(x_BCKH, 5, "context", 4, before=True)
        after = cut_columns._from_neighbours(x_BCKH, 2, "context", 4, before=False)
        return jnp.concatenate([*before, x_BCKH, *after], axis=1)

    with jax.set_mesh(mesh):
        spec = jax.P(None, "context", None, None)
        run = jax.jit(jax.shard_map(around, in_specs=spec, out_specs=spec, check_vma=False))
        got = np.asarray(run(jnp.arange(1, 17)[None, :, None, None])).reshape(4, 11)
    row = np.pad(np.arange(1, 17), (5, 2))
    np.testing.assert_array_equal(got, [row[4 * i : 4 * i + 11] for i in range(4)])
