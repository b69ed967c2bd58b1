import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from t5g2.core import settings, tree
from t5g2.core.errors import UserError
from t5g2.train import config_file, loop, optim, schedules
from t5g2.train.optim import Decay, Freeze, OptimConfig
from t5g2.train.optimizers import OPTIMIZERS, Adafactor, AdamW, Lion, Muon
from t5g2.train.schedules import Constant, Cosine, InverseSqrt, Linear, WarmupStableDecay
from t5g2.train.state import TrainState
from tests import tiny, weights


class Part(nnx.Module):
    """A module of named weights."""

    def __init__(self, key, **shapes):
        for i, (name, shape) in enumerate(shapes.items()):
            value = 1.0 + 0.1 * jax.random.normal(jax.random.fold_in(key, i), shape)
            setattr(self, name, nnx.Param(value, out_sharding=(None,) * len(shape), eager_sharding=False))


class Block(nnx.Module):
    def __init__(self, key):
        self.attention = Part(key, q=(8, 2, 4))
        self.attention.q_norm = Part(key, scale=(4,))
        self.mlp = Part(key, up=(8, 12))


class Stack(nnx.Module):
    """Layers 0 and 1 are stored as a stack, layer 2 by itself."""

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 3)
        self.slots = nnx.List([jax.vmap(Block)(keys[:2])])
        self.tail = nnx.List([Block(keys[2])])


class Model(nnx.Module):
    def __init__(self):
        self.embedder = Part(jax.random.key(1), table=(20, 8))
        self.layers = Stack()
        self.final_norm = Part(jax.random.key(2), scale=(8,))


@pytest.fixture(scope="module")
def params():
    return jax.jit(Model)()


def gradients_like(params, seed):
    draw = np.random.default_rng(seed + 100)
    return jax.tree.map(lambda x: jax.device_put(draw.standard_normal(x.shape, np.float32)), params)


@functools.cache
def compiled(how, total, structure, leaves):
    """The first state of the optimizer and its update; runs that differ in gradients or length share them."""
    updates = optim.make(how, total, jax.tree.unflatten(structure, leaves))
    return jax.jit(updates.init), jax.jit(updates.apply)


def run(how, params, *, steps=3, total=100, gradients=gradients_like):
    """The weights after so many updates, the optimizer's state, and the facts of the last update."""
    leaves, structure = jax.tree.flatten(params)
    init, apply = compiled(how, total, structure, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves))
    state = init(params)
    for step in range(steps):
        params, state, applied = apply(params, gradients(params, step), state, jnp.int32(step))
    return params, state, applied


def by_path(params):
    """{name: array} of every weight, layer by layer."""
    return {tree.name(key): leaf.read() for key, leaf in tree.leaves(params).items()}


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (Constant(2.0), [2.0] * 8),
        (Constant(2.0, warmup_steps=4), [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]),
        (Linear(2.0, warmup_steps=4), [0.5, 1.0, 1.5, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0]),
        (Linear(2.0, warmup_steps=0, final_fraction=0.5), [2.0, 1.875, 1.75, 1.625, 1.5, 1.375, 1.25, 1.125, 1.0]),
        (Cosine(2.0, warmup_steps=2), [1.0, 2.0, 2.0, 1.8660254, 1.5, 1.0, 0.5, 0.1339746, 0.0, 0.0]),
        (Cosine(2.0, warmup_steps=4, final_fraction=0.1), [0.5, 1.0, 1.5, 2.0, 2.0, 1.7363961, 1.1, 0.4636039, 0.2]),
        (WarmupStableDecay(2.0, 2, 0.5), [1.0, 2.0, 2.0, 2.0, 2.0, 1.0, 0.5857864, 0.2679492, 0.0, 0.0]),
        (WarmupStableDecay(2.0, 2, 0.5, 0.5, "linear"), [1.0, 2.0, 2.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0]),
        (WarmupStableDecay(2.0, 0, 0.0), [2.0] * 9),
        (InverseSqrt(2.0, warmup_steps=4), [0.5, 1.0, 1.5, 2.0, 1.7888544, 1.6329932, 1.5118579, 1.4142136]),
    ],
)
def test_schedules(schedule, rates):
    learning_rate = schedule.make(8)
    np.testing.assert_allclose([learning_rate(step) for step in range(len(rates))], rates, atol=1e-6)
    assert learning_rate(jnp.int32(1)).dtype == jnp.float32


def test_a_warmup_ends_before_the_run():
    with pytest.raises(UserError, match=r"warmup_steps = 100 and train\.steps = 100: the warm-up must end before"):
        Cosine(1.0).make(100)
    with pytest.raises(UserError, match=r"warmup_steps = 7, and the decay begins after update 6 of 8; lower warmup"):
        WarmupStableDecay(1.0, 7, 0.25).make(8)
    with pytest.raises(
        UserError, match=r"decay_fraction = 0.0001 of train.steps = 100 is no update; give at least 0.01, or"
    ):
        WarmupStableDecay(1.0, 7, 0.0001).check_length(100)
    WarmupStableDecay(1.0, 7, 0.0).check_length(100)
    WarmupStableDecay(1.0, 7, 0.01).check_length(100)
    with pytest.raises(UserError, match=r"peak = -1\.0; it must be at least 0"):
        Cosine(-1.0)


def test_everything_comes_from_plain_data():
    node = {
        "schedule": {"kind": "cosine", "peak": 1e-3, "final_fraction": 0.1},
        "optimizer": {"kind": "adamw", "second_moment_dtype": "bfloat16"},
        "decay": [{"pattern": "*.scale", "rate": 0.0}, {"pattern": "*", "rate": 0.1}],
        "freeze": [{"pattern": "embedder.*", "end": 10}],
    }
    made = settings.build(OptimConfig, node, tables=(OPTIMIZERS, schedules.SCHEDULES))
    assert made == OptimConfig(
        Cosine(1e-3, final_fraction=0.1),
        AdamW(second_moment_dtype="bfloat16"),
        decay=(Decay("*.scale", 0.0), Decay("*", 0.1)),
        freeze=(Freeze("embedder.*", end=10),),
    )
    assert (
        settings.build(
            OptimConfig,
            settings.dump(made, tables=(OPTIMIZERS, schedules.SCHEDULES)),
            tables=(OPTIMIZERS, schedules.SCHEDULES),
        )
        == made
    )


def test_adamw_is_optax_adamw(params):
    how = OptimConfig(Constant(0.01), AdamW(b1=0.8, b2=0.9), clip_norm=3.0, decay=(Decay("*", 0.2),))
    got, _, applied = run(how, params)
    # optax's own arithmetic mixes types
    with jax.numpy_dtype_promotion("standard"):
        want = adamw_of_optax(params)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-6), got, want)
    np.testing.assert_allclose(applied.gradient_norm, optax.tree.norm(gradients_like(params, 2)), rtol=1e-6)
    np.testing.assert_allclose(applied.learning_rate, 0.01)


def adamw_of_optax(params):
    other = optax.chain(optax.clip_by_global_norm(3.0), optax.adamw(0.01, 0.8, 0.9, weight_decay=0.2))
    want, state, update = params, other.init(params), jax.jit(other.update)
    for step in range(3):
        made, state = update(gradients_like(params, step), state, want)
        want = optax.apply_updates(want, made)
    return want


def test_decay_hits_what_its_pattern_fits(params):
    """Gradients are zero, so only decay moves a weight, by exactly its share."""
    decay = (Decay("*.scale", 0.0), Decay("layers.attention.*", 0.5), Decay("*", 0.25))
    still = lambda params, _: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    after, _, _ = run(OptimConfig(Constant(0.1), decay=decay), params, steps=1, gradients=still)
    for (name, was), now in zip(by_path(params).items(), by_path(after).values(), strict=True):
        rate = 0.0 if ".scale" in name else 0.5 if "attention" in name else 0.25
        np.testing.assert_allclose(now, was * (1 - 0.1 * rate), rtol=1e-6, err_msg=name)
    undecayed, _, _ = run(OptimConfig(Constant(0.1)), params, steps=1, gradients=still)
    jax.tree.map(np.testing.assert_array_equal, undecayed, params)


def changed(before, after):
    pairs = zip(by_path(before).items(), by_path(after).values(), strict=True)
    return {name for (name, was), now in pairs if not np.array_equal(was, now)}


def test_frozen_weights_do_not_change_by_a_bit(params):
    """Decay and moments would move them; the first rule that fits counts, and `end=0` exempts."""
    freeze = (Freeze("*.q_norm.scale", end=0), Freeze("layers.attention.*"), Freeze("embedder.*", first=2, end=4))
    how = OptimConfig(Constant(0.1), decay=(Decay("*", 0.1),), freeze=freeze)
    names = set(by_path(params))
    frozen = {n for n in names if n.startswith("layers.attention.") and "q_norm" not in n}
    before = params
    for steps, embedder in ((1, True), (2, True), (3, False), (4, False), (5, True)):
        after, state, _ = run(how, params, steps=steps)
        moved = changed(before, after)
        assert moved == names - frozen - (set() if embedder else {"embedder.table"}), steps
        before = after
    for_good = [name for name in tree.named(state) if "attention" in name and "q_norm" not in name]
    assert not for_good, "what is frozen for good has no moments"


def test_an_image_tower_is_frozen_unless_a_rule_says_otherwise():
    """The projector behind it is trained."""
    params = weights.model(tiny.T5GEMMA2_IMAGES)
    names = set(by_path(params))
    tower = {name for name in names if name.startswith("vision.")}
    assert tower
    decay = (Decay("*", 0.1),)
    assert changed(params, run(OptimConfig(Constant(0.1), decay=decay), params)[0]) == names - tower
    whole = OptimConfig(Constant(0.1), decay=decay, freeze=(Freeze("vision.*", end=0),))
    assert changed(params, run(whole, params)[0]) == names
    half = OptimConfig(Constant(0.1), decay=decay, freeze=(Freeze("vision.layers.*", end=0),))
    assert changed(params, run(half, params)[0]) == (names - tower) | {
        name for name in tower if name.startswith("vision.layers.")
    }


def test_a_tower_is_frozen_where_no_weight_of_it_is_trained():
    """A rule for a part of it, or for some updates, trains it; so the FLOPs that are reported are never too few."""
    for freeze in ((), (Freeze("decoder.*", end=0), Freeze("*")), (Freeze("projector.*"),)):
        assert OptimConfig(Constant(0.1), freeze=freeze).freezes_tower(tiny.T5GEMMA2_IMAGES)
    for pattern in ("*", "vision.*", "vision.layers.*", "vision.final_norm.bias"):
        for rule in (Freeze(pattern, end=0), Freeze(pattern, end=5), Freeze(pattern, first=5)):
            assert not OptimConfig(Constant(0.1), freeze=(rule,)).freezes_tower(tiny.GEMMA3_IMAGES)
    assert OptimConfig(Constant(0.1)).freezes_tower(tiny.GEMMA3)


def test_frozen_gradients_do_not_enter_the_norm(params):
    """Gradients of frozen weights may be anything, without the others noticing."""

    def huge(params, seed):
        made = gradients_like(params, seed)
        made.embedder.table[...] = made.embedder.table[...] * 1e20
        return made

    how = OptimConfig(Constant(0.1), freeze=(Freeze("embedder.*"),))
    alone, _, norm = run(how, params)
    beside, _, norm_beside = run(how, params, gradients=huge)
    jax.tree.map(np.testing.assert_array_equal, alone, beside)
    assert norm.gradient_norm == norm_beside.gradient_norm


def test_a_thawed_weight_starts_afresh(params):
    """Frozen for 3 updates and then trained for 2, a weight moves as one that has been trained for 2."""
    late = lambda params, step: gradients_like(params, step - 3)  # noqa: E731
    how = OptimConfig(Constant(0.1), clip_norm=None, freeze=(Freeze("*", end=3),))
    thawed, _, _ = run(how, params, steps=5, gradients=late)
    fresh, _, _ = run(dataclasses.replace(how, freeze=()), params, steps=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), thawed, fresh)


def test_moments_are_stored_as_asked_and_names_are_unique(params):
    freeze = (Freeze("embedder.*", end=1), Freeze("final_norm.*"))
    how = OptimConfig(Constant(0.1), AdamW(moment_dtype="bfloat16"), freeze=freeze)
    after, state, _ = run(how, params)
    kinds = {(name.split(".mu.")[-1] != name, str(value.dtype)) for name, value in tree.named(state).items()}
    assert kinds == {(True, "bfloat16"), (False, "float32"), (False, "int32")}
    exact, _, _ = run(dataclasses.replace(how, optimizer=AdamW()), params)
    for got, want, was in zip(*map(jax.tree.leaves, (after, exact, params)), strict=True):
        got, want, was = (np.asarray(x) for x in (got, want, was))
        assert np.abs(got - want).max() <= 0.02 * np.abs(want - was).max() + 1e-7


@pytest.mark.parametrize("optimizer", [AdamW(), Adafactor(min_dim_size_to_factor=8), Lion(), Muon()])
def test_weights_in_bfloat16_are_updated_in_float32(params, optimizer):
    def cast(values, dtype):
        return jax.tree.map(lambda x: x.astype(dtype), values)

    half = cast(params, jnp.bfloat16)
    config = OptimConfig(Constant(0.1), optimizer, decay=(Decay("*", 0.1),))
    rounded, state, _ = run(config, half, steps=1)
    exact, _, _ = run(config, cast(half, jnp.float32), steps=1)

    def check(got, want):
        # one of the two neighbours: less than one ulp away, and the value itself where it is representable
        want = np.asarray(want, np.float64)
        ulp = 2.0 ** (np.floor(np.log2(np.abs(want))) - 7)
        assert (np.abs(np.asarray(got, np.float64) - want) < ulp).all()

    jax.tree.map(check, rounded, exact)
    assert {x.dtype for x in jax.tree.leaves(rounded)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}


@pytest.mark.parametrize("optimizer", [AdamW(), Adafactor(min_dim_size_to_factor=128, relative=False)])
def test_updates_below_one_ulp_are_not_lost_in_bfloat16(optimizer):
    # all gradients are 1, so 50 updates of 1e-3 take a weight of 1 to 0.95; rounded to nearest it would stay 1
    class Weights(nnx.Module):
        def __init__(self, dtype):
            self.w = nnx.Param(jnp.ones((4096,), dtype))

    def trained(dtype):
        ones = lambda params, _: jax.tree.map(jnp.ones_like, params)  # noqa: E731
        return run(OptimConfig(Constant(1e-3), optimizer, clip_norm=None), Weights(dtype), steps=50, gradients=ones)[0]

    exact = np.asarray(trained(jnp.float32).w[...], np.float64)
    half = np.asarray(trained(jnp.bfloat16).w[...], np.float64)
    np.testing.assert_allclose(exact, 0.95, atol=1e-5)
    # the mean of 4096 independent walks; one has a variance of at most 50 * ulp^2 / 4, ulp 2^-8 below 1
    assert abs(half.mean() - 0.95) < 5 * np.sqrt(50 / 4 / 4096) * 2.0**-8
    assert half.std() > 0  # every weight has random bits of its own


def test_a_running_mean_of_the_weights(params):
    """In float32 whatever the weights are, equal to weights that are frozen, and used in the dtype of the weights."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    config = OptimConfig(Constant(0.1), AdamW(), freeze=(Freeze("embedder.*"),), ema=0.75)
    updater, after = optim.make(config, 100, half), half
    state, apply = jax.jit(updater.init)(half), jax.jit(updater.apply)
    expected = by_path(jax.tree.map(lambda x: np.asarray(x, np.float64), half))
    for step in range(4):
        after, state, _ = apply(after, gradients_like(half, step), state, jnp.int32(step))
        expected = {
            name: 0.75 * expected[name] + 0.25 * np.asarray(x, np.float64) for name, x in by_path(after).items()
        }
    assert {x.dtype for x in jax.tree.leaves(state.mean)} == {jnp.dtype(jnp.float32)}
    for name, mean in by_path(state.mean).items():
        np.testing.assert_allclose(np.asarray(mean), expected[name], rtol=1e-6)
    used = optim.mean_weights(after, state)
    assert {x.dtype for x in jax.tree.leaves(used)} == {jnp.dtype(jnp.bfloat16)}
    assert changed(used, half) == changed(after, half)
    assert "embedder.table" not in changed(used, half)
    # without a mean, everything else is the same, bit for bit
    plain, _, _ = run(dataclasses.replace(config, ema=None), half, steps=4)
    assert not changed(plain, after)


def test_stochastic_rounding_to_bfloat16():
    key = jax.random.key(0)
    x = jnp.float32(1.0 + 1e-3)
    many = np.asarray(optim.stochastic_round(jnp.full(100_000, x), jnp.bfloat16, key), np.float64)
    assert set(many) == {1.0, 1.0078125}
    # 1e-3 / 2^-7 = 0.128 of them go up: within five standard deviations
    assert abs((many > 1).mean() - 0.128) < 5 * np.sqrt(0.128 * 0.872 / 100_000)
    exact = jnp.asarray([0.0, -0.0, 1.0, -2.5, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(
        optim.stochastic_round(exact, jnp.bfloat16, key).astype(jnp.float32), exact, strict=True
    )
    negative = np.asarray(optim.stochastic_round(jnp.full(1000, -x), jnp.bfloat16, key), np.float64)
    assert set(negative) == {-1.0, -1.0078125}
    with pytest.raises(ValueError, match="stochastic rounding to float16"):
        optim.stochastic_round(exact, jnp.float16, key)


@pytest.mark.parametrize("relative", [False, True])
def test_adafactor_sees_layers_and_not_how_they_are_stored(params, relative):
    """One layer has gradients and weights a hundred times as large: the others in its stack do not notice."""

    def louder(params, seed):
        made = gradients_like(params, seed)
        up = made.layers.slots[0].mlp.up
        up[...] = up[...].at[0].multiply(100.0)
        return made

    how = OptimConfig(Constant(0.1), Adafactor(min_dim_size_to_factor=8, relative=relative), clip_norm=None)
    calm, state, _ = run(how, params)
    loud, _, _ = run(how, params, gradients=louder)
    assert changed(calm, loud) <= {"layers.mlp.up.0"}
    factored = [name for name, x in tree.named(state).items() if name.endswith("v_row.embedder.table") and x.ndim == 1]
    assert factored, "the table's second moment is its row and column means"


def test_adafactor_steps_are_bounded(params):
    """A direction's root mean square is at most clip_rms, times the weight's where relative."""
    for relative in (False, True):
        how = OptimConfig(Constant(1.0), Adafactor(relative=relative, clip_rms=0.5), clip_norm=None)
        after, _, _ = run(how, params, steps=1)
        rms = lambda x: float(np.sqrt(np.mean(np.square(x))))  # noqa: E731
        for was, now in zip(*(map(np.asarray, by_path(x).values()) for x in (params, after)), strict=True):
            bound = 0.5 * (max(rms(was), 1e-3) if relative else 1.0)
            np.testing.assert_allclose(rms(now - was), bound, rtol=1e-4)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            OptimConfig(Constant(1.0), freeze=(Freeze("encoder.*"),)),
            r"optim\.freeze has the pattern 'encoder\.\*', which matches no",
        ),
        (
            OptimConfig(Constant(1.0), decay=(Decay("*.bias", 0.1),)),
            r"optim\.decay has the pattern '\*\.bias', which matches no weig",
        ),
    ],
)
def test_a_pattern_that_fits_nothing(params, how, message):
    with pytest.raises(UserError, match=message + r".*embedder\.table, final_norm\.scale, layers\.attention\.q,"):
        optim.make(how, 10, params)


def test_moments_that_would_lose_what_is_added():
    with pytest.raises(UserError, match=r"with b2 = 0\.999: an update adds at most 0\.001 of the moment"):
        AdamW(b2=0.999, second_moment_dtype="bfloat16")
    with pytest.raises(UserError, match=r"moment_dtype = 'bfloat16' with b1 = 0\.995: .* use a b1 up to 0\.99, or"):
        AdamW(b1=0.995, moment_dtype="bfloat16")
    with pytest.raises(UserError, match=r"moment_dtype = 'bfloat16' with b2 = 0\.999"):
        Lion(b2=0.999, moment_dtype="bfloat16")
    with pytest.raises(UserError, match=r"moment_dtype = 'bfloat16' with momentum = 0\.995"):
        Muon(momentum=0.995, moment_dtype="bfloat16")
    with pytest.raises(UserError, match="b1 = 1; it must be at least 0 and below 1"):
        AdamW(b1=1)


def test_a_rule_that_never_freezes():
    with pytest.raises(UserError, match=r"'a\.\*' is frozen from update 5 to 5 - 1, which is never; give an end above"):
        Freeze("a.*", first=5, end=5)
    assert Freeze("a.*", first=5, end=0).end == 0


@pytest.mark.parametrize(("beta", "share"), [(0.9, 0.98), (0.99, 0.8)])
def test_a_rounded_moment_is_near_a_constant_gradient(beta, share):
    """Each update is rounded to bfloat16; float32 reaches the gradient, and what is refused stays far below."""
    updates = AdamW(b1=beta, moment_dtype="bfloat16").directions()

    @jax.jit
    def run(state):
        return jax.lax.fori_loop(0, 3000, lambda _, state: updates.update(jnp.ones(1), state)[1], state)

    mu = float(run(updates.init(jnp.zeros(1))).mu[0])
    assert share - 0.01 < mu < share + 0.01


def test_stored_leaves_of_one_path_have_random_bits_of_their_own():
    # two slots of a pattern have the same path, shape and here the same numbers
    class Pair(nnx.Module):
        def __init__(self):
            self.layers = nnx.Module()
            self.layers.slots = nnx.List([jax.vmap(Block)(jax.random.split(jax.random.key(0), 2)) for _ in range(2)])
            self.layers.tail = nnx.List([])

    half = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.bfloat16), Pair())
    after, _, _ = run(OptimConfig(Constant(1e-3), clip_norm=None), half, steps=1, gradients=lambda p, _: half)
    first, second = (np.asarray(slot.mlp.up[...], np.float32) for slot in after.layers.slots)
    assert set(first.ravel()) == set(second.ravel()) == {1.0, 1.0 - 2.0**-8}
    assert (first != second).any()


def test_what_is_evaluated(params):
    """The weights, or with eval.ema their running mean, which a run must keep."""
    file, changes = "tests/e2e/config.py:source@nowhere", [("optim.ema", "0.5"), ("eval.ema", "True")]
    state = TrainState(1, params, optim.StateWithMean(None, jax.tree.map(jnp.zeros_like, params)))
    with_mean, without = (loop.evaluated(config_file.load(file, changes[:n]), state) for n in (2, 1))
    assert all(not leaf.any() for leaf in jax.tree.leaves(with_mean))
    assert without is params
    with pytest.raises(UserError, match=r"eval\.ema is set, and no mean of the weights is kept; set optim\.ema"):
        config_file.load(file, changes[1:])
