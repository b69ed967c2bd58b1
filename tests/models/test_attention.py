"""Every backend against attention written out by hand, in float64, one query at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.core.batch import Sequences
from t5g2.core.errors import UserError
from t5g2.models.attention import attend
from t5g2.models.layers import Compute
from t5g2.models.masks import ALL, Keys, Mask, bidirectional, causal
from tests.models.backend_variants import GENERAL, VARIANTS

ROWS, LENGTH, HEADS, KV_HEADS, SIZE = 2, 7, 4, 2, 6


def source(draw, length: int, segments) -> Keys:
    def array():
        return draw.standard_normal((ROWS, length, KV_HEADS, SIZE)).astype(np.float32)

    return Keys(array(), array(), tokens(length, segments))


def tokens(length: int, segments, blocks=None) -> Sequences:
    shape = (ROWS, length)
    segments = np.broadcast_to(np.array(segments, np.int32), shape)
    blocks = None if blocks is None else np.broadcast_to(np.array(blocks, np.int32), shape)
    positions = np.zeros(shape, np.int32)
    for row in range(ROWS):
        for i in range(1, length):
            same = segments[row, i] == segments[row, i - 1]
            positions[row, i] = positions[row, i - 1] + 1 if same else 0
    return Sequences(np.zeros(shape, np.int32), segments, positions, blocks)


def sees(query: Sequences, q: tuple[int, int], keys: Sequences, k: tuple[int, int], mask: Mask) -> bool:
    ahead = keys.positions[k] - query.positions[q]
    if query.segments[q] != keys.segments[k] or keys.segments[k] == 0:
        return False
    if (mask.left is not None and -ahead > mask.left) or (mask.right is not None and ahead > mask.right):
        return False
    if mask.causal and ahead > 0:
        return query.blocks is not None and query.blocks[q] == keys.blocks[k] != 0
    return True


def by_hand(q_BTNH, query: Sequences, sources, scale: float, softcap: float | None):
    out = np.zeros(q_BTNH.shape)
    for row, t, n in np.ndindex(*q_BTNH.shape[:3]):
        scores, values = [], []
        for keys, mask in sources:
            for s in range(keys.k_BSKH.shape[1]):
                if sees(query, (row, t), keys.tokens, (row, s), mask):
                    head = n // (HEADS // KV_HEADS)
                    score = scale * np.dot(np.float64(q_BTNH[row, t, n]), np.float64(keys.k_BSKH[row, s, head]))
                    scores.append(score if softcap is None else softcap * np.tanh(score / softcap))
                    values.append(np.float64(keys.v_BSKH[row, s, head]))
        if scores:
            p = np.exp(np.array(scores) - max(scores))
            out[row, t, n] = (p / p.sum()) @ np.array(values)
    return out


def setup(name: str):
    """Queries, their tokens, and sources: one, two, packed, with blocks, with queries that see nothing."""
    draw = np.random.RandomState(0)
    q_BTNH = draw.standard_normal((ROWS, LENGTH, HEADS, SIZE)).astype(np.float32)
    segments = [[1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1]] if name != "one" else 1
    blocks = [0, 1, 1, 1, 1, 1, 0] if name == "blocks" else None
    own = source(draw, LENGTH, segments)._replace(tokens=tokens(LENGTH, segments, blocks))
    sources = [(own, causal(window=3))]
    if name == "encoder":
        sources = [(own, bidirectional(window=4))]
    if name == "merged":
        sources.append((source(draw, 5, [[1, 1, 2, 2, 0], [1, 0, 0, 1, 1]]), ALL))
    if name == "three":
        sources = [(source(draw, 3, 1), causal()), *sources, (source(draw, 5, 2), ALL)]
    if name == "nothing to see":
        sources = [(source(draw, 5, [[2, 2, 0, 0, 0], [3] * 5]), ALL)]
    return q_BTNH, own.tokens, sources


def run(variant: str, q_BTNH, query, sources, *, scale: float, softcap: float | None = None):
    # a source of the queries' own tokens has the same object
    shown = tuple((mask, keys.tokens is query) for keys, mask in sources)
    return np.asarray(program(variant, shown, scale, softcap)(q_BTNH, query, [keys[:3] for keys, _ in sources]))


@functools.cache
def program(variant: str, shown: tuple[tuple[Mask, bool], ...], scale: float, softcap: float | None):
    """A backend's output from queries, their tokens, and the keys, values and tokens of each source.

    Args:
      shown: the mask of each source, and True if its tokens are those of the queries.
    """

    def output(q_BTNH, query, keys):
        sources = [
            (Keys(k_BSKH, v_BSKH, query if own else of), mask)
            for (k_BSKH, v_BSKH, of), (mask, own) in zip(keys, shown, strict=True)
        ]
        return VARIANTS[variant](q_BTNH, query, sources, scale=scale, softcap=softcap, dtype="float32")

    return jax.jit(output)


CASES = ("one", "packed", "blocks", "encoder", "merged", "three", "nothing to see")


@pytest.mark.parametrize("variant", GENERAL)
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("case", CASES)
def test_equals_attention_by_hand(case, softcap, variant):
    q_BTNH, query, sources = setup(case)
    got = run(variant, q_BTNH, query, sources, scale=0.6, softcap=softcap)
    expected = by_hand(q_BTNH, query, sources, 0.6, softcap)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("variant", GENERAL)
def test_a_query_that_sees_nothing_gets_zeros_and_gives_none(variant):
    q_BTNH, query, sources = setup("nothing to see")
    blind_BT = ~np.array([[0, 0, 0, 0, 1, 1, 0], [0] * 7], bool)

    def total(q_BTNH, k_BSKH, v_BSKH):
        own = [(Keys(k_BSKH, v_BSKH, sources[0][0].tokens), ALL)]
        o_BTNH = VARIANTS[variant](q_BTNH, query, own, scale=0.6, softcap=None, dtype="float32")
        return jnp.sum(jnp.square(o_BTNH) + o_BTNH), o_BTNH

    keys = sources[0][0]
    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
    gradients, o_BTNH = gradient(q_BTNH, keys.k_BSKH, keys.v_BSKH)
    assert not np.asarray(o_BTNH)[blind_BT].any()
    assert not np.asarray(gradients[0])[blind_BT].any()
    assert np.asarray(gradients[0])[~blind_BT].any()
    for gradient in gradients:
        assert np.isfinite(gradient).all()
    # keys that no query sees: padding, and the whole second row
    for gradient in gradients[1:]:
        assert not np.asarray(gradient)[0, 2:].any()
        assert not np.asarray(gradient)[1].any()


@pytest.mark.parametrize("variant", GENERAL)
def test_what_is_hidden_may_be_anything(variant):
    q_BTNH, query, sources = setup("merged")
    keys, mask = sources[1]
    hidden = (keys.tokens.segments == 0)[:, :, None, None]
    loud = (np.where(hidden, np.float32(value), of) for value, of in ((1e9, keys.k_BSKH), (-1e9, keys.v_BSKH)))
    loud = Keys(*loud, keys.tokens)
    quiet = run(variant, q_BTNH, query, sources, scale=0.6)
    np.testing.assert_array_equal(run(variant, q_BTNH, query, [sources[0], (loud, mask)], scale=0.6), quiet)


@pytest.mark.parametrize("variant", GENERAL)
def test_keys_of_many_sources_are_as_good_as_of_one(variant):
    q_BTNH, query, [(keys, mask)] = setup("packed")
    halves = [
        (Keys(*(leaf[:, part] for leaf in keys[:2]), Sequences(*(leaf[:, part] for leaf in keys.tokens[:3]))), mask)
        for part in (slice(0, 3), slice(3, None))
    ]
    whole = run(variant, q_BTNH, query, [(keys, mask)], scale=0.6)
    np.testing.assert_allclose(run(variant, q_BTNH, query, halves, scale=0.6), whole, atol=1e-6)


@pytest.mark.parametrize("variant", GENERAL)
def test_large_scores_do_not_overflow(variant):
    q_BTNH, query, sources = setup("packed")
    o_BTNH = run(variant, np.float32(1e3) * q_BTNH, query, sources, scale=1e3)
    assert np.isfinite(o_BTNH).all()


@pytest.mark.parametrize("variant", GENERAL)
def test_bfloat16_stays_near(variant):
    q_BTNH, query, sources = setup("merged")
    exact = run(variant, q_BTNH, query, sources, scale=0.6)
    small = [(Keys(k.k_BSKH.astype(jnp.bfloat16), k.v_BSKH.astype(jnp.bfloat16), k.tokens), m) for k, m in sources]
    rough = run(variant, q_BTNH.astype(jnp.bfloat16), query, small, scale=0.6)
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(rough.astype(np.float32), exact, atol=0.03)


def test_an_unknown_backend_names_the_nearest():
    q_BTNH, query, sources = setup("one")
    with pytest.raises(UserError, match=r"unknown attention backend 'referense'; did you mean 'reference'"):
        attend(q_BTNH, query, sources, scale=1.0, compute=Compute(backend="referense"))
