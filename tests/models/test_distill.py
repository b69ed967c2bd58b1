"""Distillation in the tiled loss, against the divergence of all distributions at once and jax's own derivatives."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5g2.core import sharding as meshes
from t5g2.core.errors import UserError
from t5g2.core.sharding import MeshShape
from t5g2.models import block_targets
from t5g2.models.distillation import Distillation, SparseDistribution, TeacherOutputs, sparsify
from t5g2.models.layers import Head
from t5g2.models.loss import cross_entropy
from t5g2.models.loss_config import LossConfig
from tests.models.test_loss import naive, shapes

V, D, B, T, WIDTH = 96, 40, 16, 13, 24  # as in test_loss: an axis is known by its size; the teacher is narrower
HOW = {
    "full": Distillation(0.7),
    "top_k": Distillation(0.7, "top_k", 8),
    "top_k, one more for the others": Distillation(1.0, "top_k", 8, "together"),
    "all of them": Distillation(0.7, "top_k", V, "together"),
    "sampled": Distillation(0.5, "sampled", 8),
}


TILES, BLOCKS = {"strategy": "tokens", "tile_tokens": 32}, {"strategy": "vocabulary", "block_rows": 40}
ALL = {"strategy": "tokens", "tile_tokens": 10**6}, {"strategy": "vocabulary", "block_rows": V}
each_strategy = pytest.mark.parametrize("settings", [TILES, BLOCKS], ids=["tiles", "blocks"])


@pytest.fixture(scope="module")
def data():
    return dict(zip(("hidden", "table", "targets", "weights", "teacher"), draw(), strict=True))


@jax.jit
def draw():
    keys = jax.random.split(jax.random.key(0), 7)
    return (
        jax.random.normal(keys[0], (B, T, D)),
        0.3 * jax.random.normal(keys[1], (V, D)),
        jax.random.randint(keys[2], (B, T), 0, V),
        jnp.where(jnp.arange(T)[None, :] < 11, jax.random.uniform(keys[3], (B, T)), 0.0),
        TeacherOutputs(
            has_teacher_BT=jax.random.uniform(keys[4], (B, T)) < 0.8,
            hidden_BTD=jax.random.normal(keys[5], (B, T, WIDTH)),
            # more rows than the student's vocabulary has, as released tables do
            head=Head(0.5 * jax.random.normal(keys[6], (V + 5, WIDTH)), 4.0),
            key=jax.random.key(1),
        ),
    )


@jax.jit
def teacher_logits(teacher):
    logits = jnp.einsum("btd,vd->btv", teacher.hidden_BTD, teacher.head.table_VD[:V])
    return 4.0 * jnp.tanh(logits / 4.0)


def with_cached_outputs(data, how):
    """The teacher with cached distributions instead of its states."""
    return TeacherOutputs(data["teacher"].has_teacher_BT, kept_of(teacher_logits(data["teacher"]), how))


kept_of = jax.jit(functools.partial(sparsify, dtype=jnp.float32), static_argnums=1)


def sampled_distributions(data, how) -> SparseDistribution:
    """Distributions sampled with the keys of the loss, one for each token."""
    keys = jax.random.split(data["teacher"].key, (B, T))
    return kept_of(teacher_logits(data["teacher"]), how, key=keys)


def divergence(student_BTV, teacher_BTV, how):
    """From the teacher's distribution, as far as it is kept, to the student's: every distribution at once."""
    p, log_s = jax.nn.softmax(teacher_BTV), jax.nn.log_softmax(student_BTV)
    if how.method == "full":
        return jnp.sum(p * (jnp.log(p) - log_s), axis=-1)
    threshold = jnp.sort(p, axis=-1)[..., -how.per_token]
    kept = p >= threshold[..., None]
    if how.tail == "renormalise":
        q = jnp.where(kept, p, 0.0) / jnp.sum(jnp.where(kept, p, 0.0), axis=-1, keepdims=True)
        return jnp.sum(jnp.where(kept, q * (jnp.log(jnp.where(kept, q, 1.0)) - log_s), 0.0), axis=-1)
    inside = jnp.sum(jnp.where(kept, p * (jnp.log(p) - log_s), 0.0), axis=-1)
    if how.per_token == V:
        return inside
    tail = jnp.sum(jnp.where(kept, 0.0, p), axis=-1)
    students = jnp.sum(jnp.where(kept, 0.0, jnp.exp(log_s)), axis=-1)
    return inside + tail * (jnp.log(tail) - jnp.log(students))


@functools.cache
def expected(how, softcap, z_loss):
    """Loss, divergences and gradients from all distributions at once, compiled once for all strategies."""

    def total(hidden, table, targets, weights, teacher):
        logits = jnp.einsum("btd,vd->btv", hidden, table)
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        loss, z, _ = naive(hidden, table, targets, softcap)
        apart = divergence(logits, teacher_logits(teacher), how)
        loss = jnp.where(teacher.has_teacher_BT, (1 - how.weight) * loss + how.weight * apart, loss)
        return jnp.sum(weights * (loss + z_loss * z)), apart

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


def sums(how, softcap=None, **settings):
    def total(hidden, table, targets, weights, teacher):
        made = cross_entropy(
            hidden,
            Head(table, softcap),
            targets,
            weights,
            LossConfig(**settings, distillation=how),
            teacher=teacher,
        )
        return made.total, made

    return total


@functools.cache
def program(how, softcap, z_loss, **settings):
    """Loss, sums and gradients; tests of one configuration share what is compiled."""
    return jax.jit(jax.value_and_grad(sums(how, softcap, **settings, z_loss=z_loss), (0, 1), has_aux=True))


def assert_gradients(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)


@pytest.mark.parametrize("settings", [TILES, BLOCKS, *ALL], ids=["tiles", "blocks", "one tile", "one block"])
@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), (3.0, 0.01)])
@pytest.mark.parametrize("name", [name for name in HOW if name != "sampled"])
def test_loss_and_gradients_are_those_of_all_distributions_at_once(data, name, softcap, z_loss, settings):
    how, values = HOW[name], tuple(data.values())
    (want, apart), want_gradients = expected(how, softcap, z_loss)(*values)
    (got, made), got_gradients = program(how, softcap, z_loss, **settings)(*values)
    np.testing.assert_allclose(got, want, rtol=3e-6)
    assert_gradients(got_gradients, want_gradients)
    known, weights = data["teacher"].has_teacher_BT, data["weights"]
    known, weights, apart = map(np.asarray, (known, weights, apart))
    np.testing.assert_allclose(made.tokens.divergence_BT, np.where(known, apart, 0.0), atol=1e-5)
    np.testing.assert_allclose(made.divergence, np.sum(np.where(known, weights * apart, 0.0)), rtol=3e-6)
    np.testing.assert_allclose(made.teacher_weight, np.sum(np.where(known, weights, 0.0)), rtol=1e-6)


@each_strategy
@pytest.mark.parametrize("name", ["top_k", "top_k, one more for the others"])
def test_cached_outputs_equal_those_of_the_step(data, name, settings):
    how = HOW[name]
    values, run = tuple(data.values())[:4], program(how, None, 0.0, **settings)
    (now, _), now_gradients = run(*values, data["teacher"])
    teacher = with_cached_outputs(data, how)
    (before, made), cached_gradients = run(*values, teacher)
    np.testing.assert_allclose(before, now, rtol=2e-6)
    assert_gradients(cached_gradients, now_gradients)
    # kept in 16 bits: each log-probability to 2^-11 of itself, and so the divergence
    assert teacher.cached is not None
    ids, *probabilities = map(np.asarray, teacher.cached)
    halved = teacher._replace(cached=SparseDistribution(ids, *(x.astype(np.float16) for x in probabilities)))
    kept, exact = (np.asarray(of.tokens.divergence_BT) for of in (run(*values, halved)[0][1], made))
    assert 0 < np.abs(kept - exact).max() < 2**-11 * np.abs(probabilities[0]).max() * 10


@each_strategy
def test_what_is_not_kept_is_what_is_missing(data, settings):
    """The whole divergence is that with the others together, and the others' own divergence by their probability."""
    known = np.asarray(data["teacher"].has_teacher_BT)
    for k in (1, 4, 32):
        how = Distillation(1.0, "top_k", k, "together")
        whole, missing = map(np.asarray, divergence_of_others(*tuple(data.values())[:2], data["teacher"], k))
        made = np.asarray(jax.jit(sums(how, **settings))(*data.values())[1].tokens.divergence_BT)
        np.testing.assert_allclose((made + missing)[known], whole[known], atol=2e-5)
        assert made.min() >= -1e-6


@jax.jit
def divergence_of_others(hidden, table, teacher, k):
    """The whole divergence, and that of the tokens past the likeliest k by their probability."""
    student, logits = jnp.einsum("btd,vd->btv", hidden, table), teacher_logits(teacher)
    p, s = jax.nn.softmax(logits), jax.nn.softmax(student)
    others = p < jnp.take(jnp.sort(p, axis=-1), V - k, axis=-1)[..., None]
    q, r = (jnp.where(others, x, 0.0) / jnp.sum(jnp.where(others, x, 0.0), -1, keepdims=True) for x in (p, s))
    ratio = jnp.where(others, q, 1.0) / jnp.where(others, r, 1.0)
    inner = jnp.sum(q * jnp.log(ratio), -1)
    return divergence(student, logits, HOW["full"]), jnp.sum(jnp.where(others, p, 0.0), -1) * inner


@each_strategy
@pytest.mark.parametrize("name", ["full", "all of them"])
def test_a_teacher_that_is_the_student_has_nothing_to_teach(data, name, settings):
    """No divergence, and of the loss the slope that is left is that of the cross-entropy's share."""
    how = HOW[name]
    hidden, table, targets, weights, teacher = data.values()
    itself = teacher._replace(has_teacher_BT=jnp.ones((B, T), bool), hidden_BTD=hidden, head=Head(table, 3.0))
    (_, made), gradients = program(how, 3.0, 0.0, **settings)(hidden, table, targets, weights, itself)
    np.testing.assert_allclose(made.tokens.divergence_BT, 0.0, atol=2e-6)
    plain = jax.tree.map(np.asarray, program(None, 3.0, 0.0, **settings)(hidden, table, targets, weights, None)[1])
    assert_gradients(gradients, [(1 - how.weight) * gradient for gradient in plain])
    (_, alone), none = program(Distillation(1.0), 3.0, 0.0, **settings)(hidden, table, targets, weights, itself)
    for slope in none:
        np.testing.assert_allclose(slope, 0.0, atol=2e-6)
    assert float(alone.loss) > 1.0  # the cross-entropy is there all the same


def test_what_is_kept_of_a_drawn_distribution():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    ids, log_probs, tail = sparsify(logits, Distillation(method="top_k", per_token=2), dtype=jnp.float32)
    assert ids.tolist() == [[0, 1]]
    np.testing.assert_allclose(jnp.exp(log_probs), [[0.5, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(tail, [0.2], rtol=1e-5)


def test_what_is_drawn_is_drawn_by_its_probability_and_once():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    how, draws = Distillation(method="sampled", per_token=2), 20_000
    logits = jnp.broadcast_to(jnp.log(p), (draws, 4))
    ids = np.asarray(sparsify(logits, how, key=jax.random.split(jax.random.key(0), draws)).ids)
    assert (ids[:, 0] != ids[:, 1]).all()
    # the pair (i, j) without putting back: p_i * p_j / (1 - p_i)
    for i in range(4):
        for j in range(4):
            chance = 0.0 if i == j else p[i] * p[j] / (1 - p[i])
            found = np.mean((ids == [i, j]).all(axis=1))
            assert abs(found - chance) <= 5 * np.sqrt(chance / draws), (i, j)


@pytest.mark.parametrize("settings", [TILES | {"tile_tokens": 16}, *ALL, BLOCKS], ids=str)
def test_the_loss_of_a_sample_is_that_of_the_same_sample_cached(data, settings):
    """Live or cached, in tiles or blocks of any size: the same draws give the same loss."""
    how, values = HOW["sampled"], tuple(data.values())
    run = program(how, None, 0.0, **settings)
    (live_loss, _), step_gradients = run(*values)
    cached = TeacherOutputs(data["teacher"].has_teacher_BT, sampled_distributions(data, how))
    (cached_loss, _), cached_gradients = run(*values[:4], cached)
    np.testing.assert_allclose(cached_loss, live_loss, rtol=2e-6)
    assert_gradients(cached_gradients, step_gradients)
    other = data["teacher"]._replace(key=jax.random.key(2))
    assert run(*values[:4], other)[0][0] != live_loss


@pytest.mark.parametrize(
    ("name", "cached"),
    [("full", False), *itertools.product(["top_k, one more for the others", "sampled"], [False, True])],
)
@pytest.mark.parametrize(
    ("settings", "size"), [(TILES | {"tile_tokens": 48}, 48 * V), (BLOCKS | {"block_rows": 20}, 20 * B * T)]
)
def test_no_logits_but_a_tile_or_a_block_of_either(data, name, cached, settings, size, monkeypatch):
    # the kept tokens of a teacher are found in tiles of their own
    monkeypatch.setattr(block_targets, "TILE_LOGITS", 16 * V)
    teacher = with_cached_outputs(data, Distillation(method="top_k", per_token=8)) if cached else data["teacher"]
    run = jax.value_and_grad(sums(HOW[name], 3.0, **settings), (0, 1), has_aux=True)
    program = jax.make_jaxpr(run)(*tuple(data.values())[:4], teacher)
    with_vocab = {s for s in shapes(program.jaxpr) if {V, 20} & set(s) and D not in s and WIDTH not in s}
    assert max(map(math.prod, with_vocab)) == size, with_vocab


@pytest.mark.parametrize(
    ("name", "cached"),
    [
        ("full", False),
        ("sampled", False),
        *itertools.product(["top_k", "top_k, one more for the others"], [False, True]),
    ],
)
@each_strategy
def test_on_eight_devices_as_on_one(data, devices, name, cached, settings):
    """Rows over 4 devices, the vocabulary over 2; on one device most programs are those of the first test."""
    how = HOW[name]
    values = tuple(data.values())[:4]
    teacher = with_cached_outputs(data, how) if cached else data["teacher"]
    run = jax.value_and_grad(sums(how, 3.0, **settings, z_loss=0.01), (0, 1), has_aux=True)
    (want, _), want_gradients = program(how, 3.0, 0.01, **settings)(*values, teacher)
    mesh = meshes.make(MeshShape(2, 2, 2), devices)
    rows, table = meshes.batch_sharding(mesh), NamedSharding(mesh, P("tensor", "fsdp"))
    whole = NamedSharding(mesh, P())
    places = jax.tree.map(lambda x: rows if x.shape[:2] == (B, T) else whole, teacher)
    with jax.set_mesh(mesh):
        put = jax.device_put((*values, teacher), (rows, table, rows, rows, places))
        (got, _), got_gradients = jax.jit(run)(*put)
    np.testing.assert_allclose(got, want, rtol=2e-6)
    assert_gradients(jax.device_get(got_gradients), want_gradients)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": 0.0}, "above 0 and at most 1"),
        ({"weight": 1.5}, "above 0 and at most 1"),
        ({"method": "topk"}, "top_k"),
        ({"tail": "drop"}, "renormalise"),
        ({"per_token": 0}, "at least 1"),
        ({"method": "sampled", "tail": "together"}, "renormalise"),
    ],
)
def test_settings_that_mean_nothing(given, message):
    with pytest.raises(UserError, match=message):
        Distillation(**given)
