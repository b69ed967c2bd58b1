"""Every backend against the reference, forward and gradients, over masks, heads, packing and padding."""

import functools
import itertools
import math
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.api import model_inputs
from t5g2.core.batch import Sequences, image_blocks
from t5g2.data.packed_rows import Feature
from t5g2.data.packing import Packer
from t5g2.models import build, masks
from t5g2.models.backends import blockwise, columns, reference, splash
from t5g2.models.backends.site import Site
from t5g2.models.config import EncoderDecoderConfig
from t5g2.models.layers import Compute
from t5g2.models.masks import ALL, Keys, Mask
from t5g2.models.stack import LayerInputs
from tests import hlo, tiny, weights
from tests.models.backend_variants import GENERAL, VARIANTS, refusal
from tests.models.test_loss import equations

ROWS, LENGTH, MEMORY, SIZE = 2, 41, 19, 128

MASKS = {
    "all": ALL,
    "causal": masks.causal(),
    "causal window": masks.causal(9),
    "window around": masks.bidirectional(10),
    "more before than after": Mask(causal=False, left=11, right=2),
    "more after than before": Mask(causal=False, left=0, right=13),
    "wider than the row": masks.causal(500),
}
HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (3, 1)}


def tokens(segments, positions=None, blocks=None) -> Sequences:
    """Tokens of these segments; positions rise from 0 in each, unless given."""
    segments = np.array(segments, np.int32)
    if positions is None:
        positions = np.zeros_like(segments)
        for row, column in np.ndindex(*segments.shape):
            same = column and segments[row, column] == segments[row, column - 1]
            positions[row, column] = positions[row, column - 1] + 1 if same else 0
    arrays = (np.zeros_like(segments), segments, np.array(positions, np.int32))
    return Sequences(*arrays, None if blocks is None else np.asarray(blocks, np.int32))


def runs(length: int, *lengths: int) -> list[int]:
    """Segments 1, 2, … of these lengths, then padding; a negative length is padding."""
    row: list[int] = []
    for segment, size in enumerate(lengths, 1):
        row += [0 if size < 0 else segment] * abs(size)
    return (row + [0] * length)[:length]


# rows of the queries' own tokens, and of an encoder
ROWS_OF = {
    "whole": ([runs(LENGTH, 41), runs(LENGTH, 41)], [runs(MEMORY, 19), runs(MEMORY, 19)]),
    "packed": ([runs(LENGTH, 11, 17, 8), runs(LENGTH, 30, 11)], [runs(MEMORY, 5, 4, 6), runs(MEMORY, 9, 10)]),
    "padded right": ([runs(LENGTH, 13), runs(LENGTH, 40)], [runs(MEMORY, 3), runs(MEMORY, 17)]),
    "padded left": ([runs(LENGTH, -20, 21), runs(LENGTH, -1, 40)], [runs(MEMORY, -9, 10), runs(MEMORY, -1, 18)]),
    # the second example has no encoder side, and the second row is padding
    "nothing to see": ([runs(LENGTH, 20, 21), runs(LENGTH)], [runs(MEMORY, 10), runs(MEMORY)]),
}


def arrays(heads: tuple[int, int], dtype) -> tuple:
    draw = np.random.RandomState(0)

    def array(length: int, number: int):
        return draw.standard_normal((ROWS, length, number, SIZE)).astype(dtype)

    query_heads, kv_heads = heads
    own, memory = ((array(n, kv_heads), array(n, kv_heads)) for n in (LENGTH, MEMORY))
    return array(LENGTH, query_heads), own, memory, array(LENGTH, query_heads)


@functools.cache
def program(variant: str, mask: Mask, merged: bool, softcap: float | None, dtype: str = "float32"):
    """Output and gradients by queries, keys and values, compiled once for all tokens."""

    def run(q_BTNH, own, memory, do_BTNH, query, encoder):
        def total(q_BTNH, own, memory):
            sources = [(Keys(*memory, encoder), ALL)] if merged else []
            sources.append((Keys(*own, query), mask))
            o_BTNH = VARIANTS[variant](q_BTNH, query, sources, scale=0.09, softcap=softcap, dtype=dtype)
            return jnp.sum(o_BTNH * do_BTNH).astype(jnp.float32), o_BTNH

        gradients, o_BTNH = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q_BTNH, own, memory)
        return o_BTNH, gradients

    # the backward pass of jax's own attention mixes types
    return jax.numpy_dtype_promotion("standard")(jax.jit(run)) if variant == "cudnn" else jax.jit(run)


def compare(
    variant: str, mask: Mask, heads: str, row_kinds, *, merged: bool, softcap=None, dtype=jnp.float32, atol=2e-5
):
    q_BTNH, own, memory, do_BTNH = arrays(HEADS[heads], dtype)
    for segments, encoder_segments in row_kinds:
        query, encoder = tokens(segments), tokens(encoder_segments)
        run = (q_BTNH, own, memory, do_BTNH, query, encoder)
        expected, got = (program(name, mask, merged, softcap)(*run) for name in ("reference", variant))
        assert got[0].dtype == dtype
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(*(np.asarray(x).astype(np.float32) for x in (a, b)), atol=atol)


def site(mask: Mask, merged: bool, softcap: float | None, blocks: bool = False) -> Site:
    keys, shown = ((MEMORY, LENGTH), (ALL, mask)) if merged else ((LENGTH,), (mask,))
    return Site(ROWS, LENGTH, keys, shown, len(keys) - 1, 4, SIZE, softcap is not None, blocks, "float32")


def supported(mask: Mask, merged: bool, softcap: float | None = None, blocks: bool = False) -> list[str]:
    here = site(mask, merged, softcap, blocks)
    return [name for name in VARIANTS if name != "reference" and refusal(name, here) is None]


EVERY = [
    pytest.param(variant, name, merged, id=f"{variant}-{name}-{'merged' if merged else 'alone'}")
    for name, mask in MASKS.items()
    for merged in (False, True)
    for variant in supported(mask, merged)
]


@pytest.mark.parametrize(("variant", "mask", "merged"), EVERY)
def test_every_mask(variant, mask, merged):
    compare(variant, MASKS[mask], "GQA", ROWS_OF.values(), merged=merged)


@pytest.mark.parametrize("heads", ["MHA", "MQA"])
@pytest.mark.parametrize("variant", supported(masks.causal(), merged=True))
def test_every_grouping_of_heads(variant, heads):
    compare(variant, masks.causal(), heads, [ROWS_OF["packed"]], merged=True)


@pytest.mark.parametrize("variant", supported(MASKS["causal window"], merged=True, softcap=0.7))
def test_the_soft_cap_has_its_slope(variant):
    compare(variant, MASKS["causal window"], "GQA", ROWS_OF.values(), merged=True, softcap=0.7)


@pytest.mark.parametrize("variant", supported(masks.causal(), merged=True))
def test_bfloat16(variant):
    # weights and gradients of scores are rounded to 8 bits before they are multiplied
    compare(variant, masks.causal(), "GQA", [ROWS_OF["packed"]], merged=True, dtype=jnp.bfloat16, atol=0.06)


@functools.cache
def offset_program(variant: str, softcap: float | None):
    """Output and gradients of merged attention with an offset on the scores of the encoder's keys."""

    def run(q_BTNH, own, memory, do_BTNH, query, encoder, offset):
        def output(q_BTNH, own, memory):
            encoder_keys = Keys(*memory, encoder, score_offset=offset)
            sources = [(encoder_keys, ALL), (Keys(*own, query), MASKS["causal window"])]
            return VARIANTS[variant](q_BTNH, query, sources, scale=0.09, softcap=softcap, dtype="float32")

        o_BTNH, gradients = jax.vjp(output, q_BTNH, own, memory)
        return o_BTNH, gradients(do_BTNH)

    return jax.jit(run)


visible = jax.jit(reference.visible, static_argnums=2)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("variant", GENERAL)
def test_an_offset_on_the_scores_of_a_source(variant, softcap):
    """Against NumPy: added to the encoder's scores, after the soft cap. Gradients are those of the reference."""
    q_BTNH, own, memory, do_BTNH = arrays(HEADS["GQA"], jnp.float32)
    query, encoder = (tokens(segments) for segments in ROWS_OF["packed"])
    run = q_BTNH, own, memory, do_BTNH, query, encoder
    o_BTNH, gradients = offset_program(variant, softcap)(*run, jnp.float32(-2.5))

    shown = [visible(query, encoder, ALL), visible(query, query, MASKS["causal window"])]
    k_BSNH, v_BSNH = (np.repeat(np.concatenate([m, o], axis=1), 2, axis=2) for m, o in zip(memory, own, strict=True))
    s_BNTS = 0.09 * np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH)
    s_BNTS = s_BNTS if softcap is None else softcap * np.tanh(s_BNTS / softcap)
    s_BNTS[..., :MEMORY] -= 2.5
    w_BNTS = np.exp(s_BNTS) * np.concatenate(shown, axis=2)[:, None]
    total_BNT1 = w_BNTS.sum(axis=-1, keepdims=True)
    expected = np.einsum("BNTS,BSNH->BTNH", w_BNTS / np.where(total_BNT1 == 0, 1, total_BNT1), v_BSNH)
    np.testing.assert_allclose(o_BTNH, expected, atol=2e-5)

    wanted = offset_program("reference", softcap)(*run, jnp.float32(-2.5))[1]
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), gradients, wanted)


@pytest.mark.parametrize("variant", GENERAL)
def test_an_offset_of_0_is_none(variant):
    q_BTNH, own, memory, do_BTNH = arrays(HEADS["GQA"], jnp.float32)
    query, encoder = (tokens(segments) for segments in ROWS_OF["packed"])
    run = q_BTNH, own, memory, do_BTNH, query, encoder
    none = program(variant, MASKS["causal window"], True, None)(*run)
    zero = offset_program(variant, None)(*run, jnp.float32(0))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), zero, none)


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_a_kernel_refuses_an_offset(name):
    with_offset = replace(site(masks.causal(), merged=True, softcap=None), score_offset=True)
    assert refusal(name, with_offset) == "it adds nothing to the scores of a source"
    assert refusal(name, replace(with_offset, score_offset=False)) is None


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("variant", ["blockwise", "small blocks"])
def test_a_softmax_in_bfloat16(variant, softcap):
    """Near that of the reference in bfloat16, which is itself off by its rounding."""
    q_BTNH, own, memory, do_BTNH = arrays(HEADS["GQA"], jnp.float32)
    query, encoder = (tokens(segments) for segments in ROWS_OF["packed"])

    run = q_BTNH, own, memory, do_BTNH, query, encoder
    exact, expected, got = (
        jax.tree.leaves(jax.device_get(program(name, MASKS["causal window"], True, softcap, *dtype)(*run)))
        for name, *dtype in (("reference",), ("reference", "bfloat16"), (variant, "bfloat16"))
    )
    for a, b, c in zip(got, expected, exact, strict=True):
        assert np.abs(b - c).max() > 1e-4 * np.abs(c).max(), "the reference rounds"
        np.testing.assert_allclose(a, c, atol=0.03 * np.abs(c).max())


BLOCKS = np.zeros((ROWS, LENGTH), np.int32)
BLOCKS[0, 3:9], BLOCKS[0, 13:27], BLOCKS[1, :33] = 1, 2, 1  # images, one across two examples; a long prefix


@pytest.mark.parametrize("mask", [masks.causal(), masks.causal(6), masks.causal(6, ahead=5)], ids=str)
@pytest.mark.parametrize("variant", supported(masks.causal(), merged=True, blocks=True))
def test_blocks_of_images_and_prefixes(variant, mask):
    q_BTNH, own, memory, do_BTNH = arrays(HEADS["GQA"], jnp.float32)
    for kind in ("whole", "packed"):
        segments, encoder_segments = ROWS_OF[kind]
        run = (q_BTNH, own, memory, do_BTNH, tokens(segments, blocks=BLOCKS), tokens(encoder_segments))
        expected, got = (program(name, mask, True, None)(*run) for name in ("reference", variant))
        jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), got, expected)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("variant", ["blockwise", "small blocks"])
def test_positions_in_any_order(variant, mask):
    """Gaps, steps back, segments that go on after another: what columns cannot say, positions do."""
    draw = np.random.RandomState(1)
    rows = []
    for _ in range(3):
        segments = draw.randint(0, 4, (ROWS, LENGTH))
        rows.append((tokens(segments, draw.randint(0, 40, (ROWS, LENGTH))), draw.randint(0, 4, (ROWS, MEMORY))))
    q_BTNH, own, memory, do_BTNH = arrays(HEADS["GQA"], jnp.float32)
    for query, encoder_segments in rows:
        run = (q_BTNH, own, memory, do_BTNH, query, tokens(encoder_segments))
        expected, got = (program(name, MASKS[mask], True, None)(*run) for name in ("reference", variant))
        jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), got, expected)


@pytest.mark.parametrize("before", [0, 5, 16])
@pytest.mark.parametrize(
    "mask", [m for m in MASKS.values() if m != ALL] + [Mask(causal=True, left=3, right=1)], ids=str
)
def test_blocks_of_a_kernels_mask_are_those_of_all_pairs(mask, before):
    """Known from corners or computed, in front of, across and after the other source's last key."""
    length, block = 24, 4
    tiles, ahead = range(0, length, block), np.arange(length + before)[None] - before - np.arange(length)[:, None]
    expected = np.ones(ahead.shape, bool)
    for bound, hidden in ((mask.left, ahead < -(mask.left or 0)), (mask.right, ahead > (mask.right or 0))):
        expected &= ~hidden | (bound is None)
    expected &= (ahead <= 0) | (not mask.causal)
    expected[:, :before] = True
    of_kernel = splash._columns_mask(mask, expected.shape, before)
    for q, k in itertools.product(tiles, range(0, length + before, block)):
        index = slice(q, q + block), slice(k, min(k + block, length + before))
        np.testing.assert_array_equal(of_kernel[index], expected[index])


@pytest.mark.parametrize("variant", ["splash", "cudnn"])
def test_kernels_that_know_columns_give_nan_where_positions_differ(variant):
    q_BTNH, own, memory, do_BTNH = arrays(HEADS["GQA"], jnp.float32)
    positions = np.broadcast_to(np.arange(LENGTH), (ROWS, LENGTH)).copy()
    positions[1, 20:] += 1
    query = tokens(ROWS_OF["whole"][0], positions)
    o_BTNH, _ = program(variant, masks.causal(), False, None)(q_BTNH, own, memory, do_BTNH, query, query)
    assert np.isfinite(o_BTNH[0]).all()
    assert np.isnan(o_BTNH[1]).all()


IN_ORDER = jax.jit(columns.in_order)


@pytest.mark.parametrize(
    ("segments", "positions", "expected"),
    [
        ([1, 1, 1, 2, 2, 0], [0, 1, 2, 0, 1, 0], True),
        ([0, 0, 1, 1, 0, 0], [9, 9, 0, 1, 9, 9], True),
        ([1, 1, 2, 2, 4, 4], [7, 8, 3, 4, 0, 1], True),
        ([0, 0, 0, 0, 0, 0], [0, 3, 1, 0, 0, 0], True),
        # padding within a segment, with positions of columns or counted without it
        ([1, 1, 0, 1, 1, 0], [0, 1, 2, 3, 4, 5], True),
        ([1, 1, 0, 1, 1, 0], [0, 1, 2, 2, 3, 4], False),
        ([1, 1, 1, 1, 1, 1], [0, 1, 2, 4, 5, 6], False),
        ([1, 1, 1, 1, 1, 1], [0, 1, 2, 2, 3, 4], False),
        ([1, 1, 2, 2, 1, 1], [0, 1, 0, 1, 4, 5], False),
        ([2, 2, 1, 1, 0, 0], [0, 1, 0, 1, 0, 0], False),
    ],
)
def test_rows_in_order(segments, positions, expected):
    assert IN_ORDER(tokens([segments], [positions])).tolist() == [expected]


def test_rows_of_data_and_prompts_are_in_order():
    """The promise to kernels that know columns only, checked where rows are made."""
    layout = {side: Feature(12) for side in ("encoder", "decoder")}
    draw = np.random.RandomState(0)
    packer = Packer(layout, 20, policy="best_fit")
    while packer.add({side: np.ones(draw.randint(1, 7), np.int32) for side in layout}):
        pass
    made = packer.finish()
    sides = [
        Sequences(made[side], made[f"{side}_segment_ids"], made[f"{side}_positions"]) for side in ("encoder", "decoder")
    ]
    assert max(side.segments.max() for side in sides) > 2
    holes = np.array([[1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], bool)
    sides.append(model_inputs.sequences(np.ones((3, 6), np.int32), holes, counted=False))
    for side in sides:
        assert np.all(IN_ORDER(side))


block_ranges = jax.jit(blockwise.block_ranges, static_argnums=0)


@pytest.mark.parametrize("kind", ["whole", "packed", "padded right", "padded left"])
@pytest.mark.parametrize("mask", MASKS)
def test_blocks_without_a_visible_pair_are_not_computed(mask, kind):
    """The ranges of blocks are exactly those of the dense mask: causal halves, windows, other examples, padding."""
    block, (segments, _) = 4, ROWS_OF[kind]
    query = tokens(segments)
    source = blockwise.SourceShape(MASKS[mask], LENGTH, block, same=True)
    problem = blockwise.Problem(1.0, None, "float32", block, (source,))
    [(first_n, end_n)] = jax.device_get(block_ranges(problem, query, [query]))
    seen_TS = np.any(visible(query, query, MASKS[mask]), axis=0)
    for n, (first, end) in enumerate(zip(first_n, end_n, strict=True)):
        seen = np.flatnonzero(seen_TS[n * block : (n + 1) * block].any(axis=0)) // block
        if len(seen):
            assert (first, end) == (seen[0], seen[-1] + 1)
        else:
            assert first == end


@pytest.mark.parametrize("variant", ["blockwise", "splash"])
@pytest.mark.parametrize("mask", ["all", "causal window"])
def test_no_array_holds_all_pairs(variant, mask):
    """In the compiled program of output and gradients no array is of the size of queries x keys."""
    length, heads = 2048, 2
    source = tokens(np.ones((1, length)))

    def total(q_BTNH, k_BSKH, v_BSKH):
        sources = [(Keys(k_BSKH, v_BSKH, source), MASKS[mask])]
        return jnp.sum(VARIANTS[variant](q_BTNH, source, sources, scale=0.1, softcap=None, dtype="float32"))

    shapes = [jax.ShapeDtypeStruct((1, length, n, SIZE), jnp.float32) for n in (heads, 1, 1)]
    text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*shapes).compile().as_text()
    sizes = [math.prod(map(int, found.split(","))) for found in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)]
    assert max(sizes) < length * length
    assert max(sizes) >= length * heads * SIZE  # the sizes were read


def test_scores_stay_few_where_the_reference_holds_all():
    """The dense program is what the test above would find."""
    q_BTNH, own, memory, do_BTNH = arrays(HEADS["GQA"], jnp.float32)
    query = tokens(ROWS_OF["whole"][0])
    text = program("reference", ALL, False, None).lower(q_BTNH, own, memory, do_BTNH, query, query).compile().as_text()
    assert re.search(rf"f32\[[\d,]*{LENGTH},\d,{LENGTH}\]", text)


@pytest.mark.parametrize(("remat", "forward_passes"), [("none", 1), ("attention", 1), ("block", 2)])
def test_a_kept_output_spares_the_second_forward_pass(remat, forward_passes):
    """Two products of the forward pass in each pass, and five of the backward pass, over blocks of queries and keys."""
    model = build.abstract(replace(tiny.GEMMA3, layers=1, pattern=("local",)))
    compute, length = Compute(dtype="float32", backend="blockwise", remat=remat), 300

    def loss(model):
        source = tokens([runs(length, length)])
        return jnp.sum(model.run(jnp.zeros((1, length, model.config.width)), inputs(model, source), compute=compute))

    def inputs(model, source):
        return LayerInputs.create(source, model.config, lambda kind: masks.decoder(model.config, kind))

    program = jax.make_jaxpr(jax.grad(loss))(model)
    products = [e for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
    block = blockwise.CPU.least
    assert sum(block in e.invars[0].aval.shape + e.outvars[0].aval.shape for e in products) == 2 * forward_passes + 5


FAMILIES = {
    "gemma 2": tiny.GEMMA2,
    "gemma 3 with images": tiny.GEMMA3_IMAGES,
    "t5gemma": tiny.T5GEMMA,
    "t5gemma 2 with images": tiny.T5GEMMA2_IMAGES,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_a_whole_model(family, monkeypatch):
    """Packed rows and images, several blocks a row: equal to the reference backend to 1e-5 of the largest entry."""
    monkeypatch.setattr(blockwise, "CPU", blockwise.CPU._replace(most=8, least=4))
    config = one_pattern(FAMILIES[family])
    model, draw = weights.model(config), np.random.RandomState(0)
    decoder, encoder = (stream_of(draw, n) for n in (25, 19))
    images = jnp.asarray(draw.uniform(-1, 1, (2, 1, 16, 16, 3)), jnp.float32) if "images" in family else None
    two_sided = isinstance(config, EncoderDecoderConfig)
    if images is not None:
        # the tokens of one image, inside the first example of each row
        side = encoder if two_sided else decoder
        side.tokens[:, 2:6] = tiny.IMAGES.token
    if images is not None and not two_sided:
        decoder = decoder._replace(blocks=image_blocks(decoder.tokens, tiny.IMAGES.token))
    targets = draw.randint(0, 97, decoder.tokens.shape)

    def loss(model, compute):
        hidden = model.hidden(encoder if two_sided else None, decoder, images, compute=compute)
        log_p = jax.nn.log_softmax(model.logits(hidden))
        return -jnp.mean(jnp.where(decoder.segments > 0, jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0], 0))

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    programs = [
        run.lower(model, Compute(dtype="float32", backend=name)).compile() for name in ("reference", "blockwise")
    ]
    expected, got = (program(model) for program in programs)
    lengths = {
        *(side.tokens.shape[1] for side in (decoder, encoder)),
        decoder.tokens.shape[1] + encoder.tokens.shape[1],
    }
    pairs = [
        {s for s in hlo.shapes(program.as_text() or "") if sum(size in lengths for size in s) > 1}
        for program in programs
    ]
    assert pairs[0], "the reference holds the scores of all pairs"
    assert not pairs[1], "blocks hold those of none"
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (got[1], expected[1])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1e-2, np.abs(b).max()))


def one_pattern(config):
    """A local and a global layer in each stack: each kind is compiled once, and how layers are stored is not asked."""
    if isinstance(config, EncoderDecoderConfig):
        return replace(config, encoder=one_pattern(config.encoder), decoder=one_pattern(config.decoder))
    return replace(config, layers=len(config.pattern))


def stream_of(draw, length: int) -> Sequences:
    """Two rows: three examples, and two and padding; each side of an example has its number."""
    segments = np.array([runs(length, 9, 3, length - 12), runs(length, 8, 7)], np.int32)
    drawn = draw.randint(10, 97, segments.shape).astype(np.int32)
    return tokens(segments)._replace(tokens=drawn, segments=segments)
