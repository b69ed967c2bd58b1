"""The step on one and on eight devices, in one and in several microbatches: the same numbers, no surplus traffic."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.core import sharding as meshes
from t5g2.core import tree
from t5g2.core.batch import Batch, Sequences
from t5g2.core.sharding import MeshShape
from t5g2.jobs.program_operations import operations
from t5g2.models import build, flops
from t5g2.models.layers import Compute
from t5g2.models.loss_config import LossConfig
from t5g2.train import optim, state, step
from t5g2.train.optim import Decay, Freeze, OptimConfig
from t5g2.train.optimizers import AdamW
from t5g2.train.schedules import Constant
from tests import hlo, tiny, weights
from tests.models.row_counts import count_lengths
from tests.models.test_loss import equations

# Sizes by which an axis is known in a program: no two of rows, vocabulary and weights have a part in common.
ROWS, T, S, V, D = 40, 6, 9, 104, 32
STACK = dataclasses.replace(tiny.GEMMA3, vocab_size=V, layers=2, pattern=("local",))
CONFIG = dataclasses.replace(tiny.T5GEMMA2, encoder=STACK, decoder=STACK)
DENOISERS, SOURCES = 3, 2
BLOCK = 20  # rows of the table in a vocabulary block
# without a first moment, the state after one update holds the gradients themselves
OPTIM = OptimConfig(Constant(0.01), AdamW(b1=0.0), clip_norm=None, decay=(Decay("*", 0.1),))
PARTS = ("head", "optimizer", "gradients", "metrics", "")
MESHES = [(8, 1, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)]


def make_batch():
    rng = np.random.default_rng(0)

    def stream(length):
        """Two examples in a row, and padding."""
        cuts = np.sort(rng.integers(1, length + 1, (ROWS, 2)), axis=1)
        at = np.arange(length)[None, :]
        segments = np.where(at < cuts[:, :1], 1, np.where(at < cuts[:, 1:], 2, 0))
        positions = np.where(segments == 2, at - cuts[:, :1], at)
        tokens = rng.integers(0, V, (ROWS, length))
        return Sequences(*(x.astype(np.int32) for x in (tokens, segments, positions)))

    decoder = stream(T)
    weights = (rng.uniform(size=(ROWS, T)) * (decoder.segments > 0)).astype(np.float32)
    targets, denoisers, sources = (rng.integers(0, n, (ROWS, T), np.int32) for n in (V, DENOISERS, SOURCES))
    return Batch(stream(S), decoder, targets, weights, denoisers, sources)


BATCH = make_batch()


@dataclasses.dataclass
class Run:
    """One compiled step, and what it made of the first state and the batch, on the host."""

    compiled: object
    abstract: state.TrainState
    before: state.TrainState
    after: state.TrainState
    metrics: step.Metrics

    @property
    def gradients(self):
        return self.after.opt[0].mu


@pytest.fixture(scope="session")
def run(devices):
    @functools.cache
    def fresh(shape, zero1):
        """The first state as it is made on a mesh, on the host; one for all ways to compute there."""
        abstract, updates = plan(shape, zero1)
        params = state.fresh_params(CONFIG, abstract, key=jax.random.key(0), param_dtype="float32")
        return jax.device_get(state.fresh(params, updates, abstract))

    def plan(shape, zero1):
        mesh = meshes.make(MeshShape(*shape), devices[: math.prod(shape)])
        updates = optim.make(OPTIM, 10, build.abstract(CONFIG))
        return state.abstract(CONFIG, updates, mesh=mesh, param_dtype="float32", zero1=zero1), updates

    @functools.cache
    def run(shape, microbatches=1, backend="auto", strategy="tokens", remat="none", zero1=False):
        mesh = meshes.make(MeshShape(*shape), devices[: math.prod(shape)])
        abstract, updates = plan(shape, zero1)
        place = meshes.batch_sharding(mesh)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), BATCH)
        loss = LossConfig(tile_tokens=20, z_loss=0.01, strategy=strategy, block_rows=BLOCK)
        compute = Compute(dtype="float32", backend=backend, remat=remat)
        settings = step.StepOptions(compute, DENOISERS, SOURCES, microbatches, loss, zero1=zero1)
        lowered = step.lower_step(step.make_train_step(updates, settings), abstract, batch, mesh=mesh)
        # a program from the cache may have the names of its operations from an earlier version
        jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
        compiled = lowered.compile()
        jax.config.update("jax_compilation_cache_include_metadata_in_key", False)
        before = fresh(shape, zero1)
        first = jax.tree.map(lambda x, planned: jax.device_put(x, planned.sharding), before, abstract)
        after, metrics = compiled(first, jax.device_put(BATCH, place), None)
        for x, planned in zip(*map(jax.tree.leaves, (after, abstract)), strict=True):
            assert x.sharding.is_equivalent_to(planned.sharding, x.ndim)
        return Run(compiled, abstract, before, *jax.device_get((after, metrics)))

    return run


@pytest.fixture(scope="session")
def alone(run):
    return run((1, 1, 1))


def naive(params, z_loss=0.01):
    """The mean loss, from the logits of all tokens; and what the metrics should be."""
    hidden = params.hidden(BATCH.encoder, BATCH.decoder, compute=Compute(dtype="float32"))
    logits = params.logits(hidden)
    lse = jax.nn.logsumexp(logits, axis=-1)
    loss = lse - jnp.take_along_axis(logits, BATCH.targets[..., None], axis=-1)[..., 0]
    total = jnp.sum(BATCH.weights * (loss + z_loss * lse**2)) / BATCH.weights.sum()
    return total, (loss, jnp.argmax(logits, axis=-1) == BATCH.targets)


def close(got, want):
    """Equal but for the order of float32 sums: to 1e-5 of the largest entry of each array."""
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * np.abs(w).max() + 1e-7), got, want)


def test_one_device_has_the_loss_and_gradients_of_all_logits(alone):
    (total, (loss, correct)), gradients = jax.jit(jax.value_and_grad(naive, has_aux=True))(alone.before.params)
    close(alone.gradients, gradients)
    got, weights = alone.metrics, BATCH.weights
    np.testing.assert_allclose(got.total, total, rtol=1e-5)
    np.testing.assert_allclose(got.loss, np.sum(weights * loss), rtol=1e-5)
    np.testing.assert_allclose(got.weight, np.sum(weights), rtol=1e-5)
    np.testing.assert_allclose(got.correct, np.sum(weights[np.asarray(correct)]), rtol=1e-5)
    for i in range(DENOISERS):
        of = weights * (BATCH.denoisers == i)
        np.testing.assert_allclose((got.denoiser_loss[i], got.denoiser_weight[i]), (np.sum(of * loss), of.sum()), 1e-5)
    for i in range(SOURCES):
        of = weights * (BATCH.sources == i)
        np.testing.assert_allclose((got.source_loss[i], got.source_weight[i]), (np.sum(of * loss), of.sum()), 1e-5)


def norm(values):
    return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(values)))


def test_one_update(alone):
    """Adam without a first moment: the gradient over its own size, and a tenth of the weight, at the learning rate."""
    got = alone.metrics
    assert (alone.before.step, alone.after.step) == (0, 1)
    for before, after, gradient in zip(
        *(jax.tree.leaves(x) for x in (alone.before.params, alone.after.params, alone.gradients)), strict=True
    ):
        moved = gradient / (np.abs(gradient) + 1e-8) + 0.1 * before
        np.testing.assert_allclose(after, before - 0.01 * moved, atol=1e-6)
    assert got.tokens == (BATCH.encoder.segments > 0).sum() + (BATCH.decoder.segments > 0).sum()
    np.testing.assert_allclose(got.gradient_norm, norm(alone.gradients), rtol=1e-5)
    np.testing.assert_allclose(got.parameter_norm, norm(alone.after.params), rtol=1e-5)
    np.testing.assert_allclose(got.learning_rate, 0.01)
    assert got.finite
    assert {x.dtype for x in got} == {np.dtype(t) for t in (np.float32, np.int32, bool)}


@pytest.mark.parametrize(("shape", "strategy"), [*((shape, "tokens") for shape in MESHES), ((2, 2, 2), "vocabulary")])
def test_eight_devices_compute_what_one_does(run, alone, shape, strategy):
    eight = run(shape, strategy=strategy)
    jax.tree.map(np.testing.assert_array_equal, eight.before, alone.before)
    close(eight.metrics, alone.metrics)
    close(eight.gradients, alone.gradients)


@pytest.mark.parametrize(
    ("shape", "remat"), [((2, 2, 2), "none"), ((2, 2, 2), "attention"), ((2, 1, 4), "none"), ((1, 1, 8), "none")]
)
def test_blockwise_attention_computes_the_same_on_any_mesh(run, alone, shape, remat):
    """4 query and 2 key/value heads: over 4 devices each takes one key/value head of two, over 8 all have all."""
    blocks = run(shape, backend="blockwise", remat=remat)
    close(blocks.metrics, alone.metrics)
    close(blocks.gradients, alone.gradients)


@pytest.mark.parametrize(("shape", "microbatches"), [((1, 1, 1), 4), ((2, 2, 2), 2)])
def test_microbatches_do_not_matter(run, alone, shape, microbatches):
    parts = run(shape, microbatches)
    close(parts.metrics, alone.metrics)
    close(parts.gradients, alone.gradients)


@pytest.mark.parametrize(("parts", "microbatches"), [(8, 1), (4, 2)])
def test_zero1_updates_a_part_of_the_weights_and_gathers_it(run, alone, parts, microbatches):
    """Each device of data holds its part of the moments, but for norms; weights are whole on all."""
    cut = run((parts, 1, 1), microbatches, zero1=True)
    close(cut.metrics, alone.metrics)
    close(cut.gradients, alone.gradients)
    for before, after, gradient in zip(
        *map(jax.tree.leaves, (cut.before.params, cut.after.params, cut.gradients)), strict=True
    ):
        moved = gradient / (np.abs(gradient) + 1e-8) + 0.1 * before
        np.testing.assert_allclose(after, before - 0.01 * moved, atol=1e-6)
    held = [math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(cut.abstract.opt[0].nu)]
    whole = [x.size for x in jax.tree.leaves(cut.abstract.params)]
    assert all(part in (n // parts, n) for n, part in zip(whole, held, strict=True))
    assert sum(part for n, part in zip(whole, held, strict=True) if part == n) < 0.03 * sum(whole), "norms"
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(cut.abstract.params))
    crossing = hlo.collectives(cut.compiled.as_text())
    assert {c.kind for c in crossing} == {"all-gather", "all-reduce"}
    gathers = [c for c in crossing if c.kind == "all-gather"]
    assert sum(math.prod(c.shape) for c in gathers) == sum(n for n, part in zip(whole, held, strict=True) if part < n)
    assert not any(c.looped for c in gathers), "once for an update, not for a layer or a microbatch"


@pytest.mark.parametrize(
    ("shape", "microbatches", "zero1"),
    [((1, 1, 1), 1, False), ((2, 2, 2), 1, False), ((2, 2, 2), 2, False), ((8, 1, 1), 1, True)],
)
def test_the_states_memory_is_used_again(run, shape, microbatches, zero1):
    made = run(shape, microbatches, zero1=zero1)
    on_each = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(made.abstract))
    assert made.compiled.memory_analysis().alias_size_in_bytes >= 0.95 * on_each


def training_flops():
    """FLOPs of an update by part, of whole rows."""
    counts = count_lengths(CONFIG, encoder=S, decoder=T) * ROWS
    return flops.training(CONFIG, counts, frozen_vision=False)


@pytest.mark.parametrize(
    ("shape", "microbatches", "remat", "most"),
    [
        ((1, 1, 1), 1, "none", 1.1),
        ((1, 1, 1), 4, "none", 1.1),
        ((2, 2, 2), 2, "none", 1.1),
        ((8, 1, 1), 1, "none", 1.1),
        ((1, 1, 1), 1, "block", 1.45),
    ],
)
def test_a_step_computes_little_more_than_the_model_has(run, shape, microbatches, remat, most):
    """Products of the optimised program, as often as loops turn, over those of whole rows; all devices together.

    The head in token tiles computes nothing twice; with the masks of padding nothing is left out.
    """
    exact = sum(training_flops().values())
    computed = hlo.flops(run(shape, microbatches, remat=remat).compiled.as_text()) * math.prod(shape)
    assert 1 <= computed / exact <= most


def test_key_value_heads_that_tensor_does_not_divide_are_computed_by_all(run):
    """2 heads over 4 devices: their projections on all of them, four times instead of once, and nothing else."""
    exact = training_flops()
    heads = STACK.kv_heads / (STACK.heads + STACK.kv_heads)
    projections = exact["encoder/projections"] + exact["decoder/projections"]
    of_keys_and_values = heads * projections + exact["cross/memory"]
    computed = hlo.flops(run((1, 2, 4)).compiled.as_text()) * 8
    assert sum(exact.values()) < computed <= 1.1 * (sum(exact.values()) + 3 * of_keys_and_values)


def test_vocabulary_blocks_compute_the_heads_product_once_more(run):
    """Four products of the head instead of three, which the ratio above leaves out."""
    exact = training_flops()
    computed = hlo.flops(run((2, 2, 2), strategy="vocabulary").compiled.as_text()) * 8
    assert 1 <= (computed - exact["head"] / 3) / sum(exact.values()) <= 1.1


@pytest.mark.parametrize(("shape", "microbatches"), [((1, 1, 1), 1), ((1, 1, 1), 4), ((2, 2, 2), 1)])
def test_every_product_of_a_step_is_in_a_named_scope(run, shape, microbatches):
    program = operations(run(shape, microbatches).compiled.as_text()).values()
    flops = {scope: sum(o.flops for o in program if o.scope == scope) for scope in {o.scope for o in program}}
    layers = ("encoder.local.attention", "encoder.local.mlp", "decoder.local.merged", "decoder.local.mlp")
    assert {*layers, "head", "optimizer", "encoder.embed", "decoder.embed", "gradients", "metrics"} <= set(flops)
    # what jax moves out of the loop over layers, as masks, keeps its side
    assert {scope.split(".")[0] for scope in flops} <= {*(layer.split(".")[0] for layer in layers), *PARTS}
    large = {scope for scope, count in flops.items() if count > 0.01 * sum(flops.values())}
    assert large == {*layers, "head"}
    assert flops.get("", 0) < 0.01 * sum(flops.values())


@pytest.mark.parametrize("microbatches", [1, 2])
def test_what_crosses_devices(run, microbatches):
    """On 2 x 2 x 2 devices: weights are gathered, gradients summed and cut; logits stay, and so do states of rows."""
    text = run((2, 2, 2), microbatches).compiled.as_text()
    crossing = hlo.collectives(text)
    table = sorted((c.kind, math.prod(c.shape)) for c in crossing if {V, V // 2} & set(c.shape))
    # once for the lookups and the head together: a CPU sums gradients whole and cuts them; and there are no logits
    assert table == [(kind, V // 2 * D) for kind in ("all-gather", "all-reduce")]
    rows = {ROWS, ROWS // 2, ROWS // 4, ROWS // microbatches, ROWS // microbatches // 4}
    gathered = {c.shape for c in crossing if c.kind == "all-gather"}
    assert gathered, "FSDP gathers weights"
    assert not [s for s in gathered if rows & set(s)], "no device needs another's rows"
    assert not [c for c in crossing if c.kind in ("all-to-all", "collective-permute")], "nothing is cut differently"


@pytest.mark.parametrize(("shape", "width"), [((1, 1, 1), V), ((2, 2, 2), V // 2), ((1, 1, 8), V // 8)])
def test_no_device_holds_logits_but_a_tile(run, shape, width):
    logits = [s for s in hlo.shapes(run(shape).compiled.as_text()) if width in s and not {D, D // 2, D // 4} & set(s)]
    tile = max(20, ROWS // math.prod(shape[:2]))  # one position of every row, at least
    assert max(map(math.prod, logits)) == tile * width, logits


def test_a_loss_that_is_not_finite_is_recorded(run, alone):
    params = jax.device_put(alone.before.params)
    params.decoder.final_norm.scale[...] = jnp.full(D, jnp.nan)
    _, metrics = alone.compiled(jax.device_put(alone.before._replace(params=params)), jax.device_put(BATCH), None)
    assert not metrics.finite


def test_a_batch_without_weights_has_no_gradient(alone):
    batch = BATCH._replace(weights=np.zeros_like(BATCH.weights))
    after, metrics = alone.compiled(jax.device_put(alone.before), jax.device_put(batch), None)
    assert metrics.finite
    assert metrics.total == metrics.gradient_norm == 0.0
    close(after.params, jax.tree.map(lambda x: x * (1 - 0.01 * 0.1), alone.before.params))


def test_frozen_weights_of_a_model_do_not_change():
    """The encoder is frozen, but for its last norm: nothing else of it moves, and its gradients are not in the norm."""
    how = dataclasses.replace(OPTIM, freeze=(Freeze("encoder.final_norm.*", end=0), Freeze("encoder.*")))
    params = weights.model(CONFIG)
    updates = optim.make(how, 10, params)
    first = state.TrainState(jnp.int32(0), params, jax.jit(updates.init)(params))
    train_step = step.make_train_step(updates, step.StepOptions(Compute(dtype="float32"), DENOISERS, SOURCES))
    after, metrics = jax.jit(train_step)(first, jax.device_put(BATCH))
    jax.tree.map(np.testing.assert_array_equal, after.params.encoder.layers, params.encoder.layers)
    for moved in (lambda model: model.encoder.final_norm.scale, lambda model: model.decoder.layers.slots[0].mlp.up):
        assert not np.array_equal(moved(after.params), moved(params))
    gradients = after.opt.inner_states["trained"].inner_state[0].mu
    np.testing.assert_allclose(metrics.gradient_norm, norm(gradients), rtol=1e-5)


def test_what_is_frozen_for_good_is_not_differentiated():
    """Its part of the backward pass is not in the program, also before XLA removes anything, where microbatches are
    added up in a loop.
    """
    params = build.abstract(CONFIG)

    def flops(freeze):
        updates = optim.make(dataclasses.replace(OPTIM, freeze=freeze), 10, params)
        settings = step.StepOptions(
            Compute(dtype="float32", scan=False), DENOISERS, SOURCES, microbatches=2, loss=LossConfig(ROWS * T)
        )
        first = jax.eval_shape(lambda p: state.TrainState(jnp.int32(0), p, updates.init(p)), params)
        lowered = jax.jit(step.make_train_step(updates, settings)).lower(first, jax.device_put(BATCH))
        return lowered.cost_analysis()["flops"]

    everything = flops(())
    assert flops((Freeze("encoder.*"), Freeze("embedder.*"))) < 0.75 * everything
    assert flops((Freeze("encoder.*", end=5), Freeze("embedder.*", end=5))) > 0.95 * everything


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("strategy", ["tokens", "vocabulary"])
def test_a_frozen_embedding_has_no_gradient_in_the_program(strategy, microbatches):
    """As traced, before XLA removes anything: neither the head's product nor the scatter of the lookup."""
    params = build.abstract(CONFIG)
    settings = step.StepOptions(
        Compute(dtype="float32"), DENOISERS, SOURCES, microbatches, LossConfig(strategy=strategy, block_rows=V // 2)
    )

    def operations(freeze):
        updates = optim.make(dataclasses.replace(OPTIM, freeze=freeze), 10, params)
        first = jax.eval_shape(lambda p: state.TrainState(jnp.int32(0), p, updates.init(p)), params)
        program = jax.make_jaxpr(step.make_train_step(updates, settings))(first, jax.device_put(BATCH))
        found = set()
        for equation in equations(program.jaxpr):
            shape = equation.outvars[0].aval.shape if equation.outvars else ()
            if D in shape and {V, V // 2} & set(shape):
                found.add(equation.primitive.name)
        return found & {"dot_general", "scatter-add"}

    assert operations(()) == {"dot_general", "scatter-add"}
    assert operations((Freeze("embedder.*"),)) == set()


def test_a_warm_up_of_cross_attention_moves_nothing_else():
    """T5Gemma, arXiv 2504.06225, section 3.2: at first the new cross-attention alone, its two norms included, then all;
    an encoder wider than the decoder, in a real step.
    """
    narrow = dataclasses.replace(tiny.GEMMA2, vocab_size=V, layers=2)
    wide = dataclasses.replace(narrow, width=40, heads=2, kv_heads=1)
    config = dataclasses.replace(tiny.T5GEMMA, encoder=wide, decoder=narrow)
    freeze = (Freeze("decoder.layers.*cross*", end=0), Freeze("*", end=2))
    params = weights.model(config)
    updates = optim.make(dataclasses.replace(OPTIM, freeze=freeze), 10, params)
    train_step = jax.jit(step.make_train_step(updates, step.StepOptions(Compute(dtype="float32"), DENOISERS, SOURCES)))
    now = state.TrainState(jnp.int32(0), params, jax.jit(updates.init)(params))
    cross = ("cross_attention.q", "cross_attention.k", "cross_attention.v", "cross_attention.o")
    new = {f"decoder.layers.{name}" for name in (*cross, "pre_cross_norm.scale", "post_cross_norm.scale")}
    paths = jax.tree.leaves(tree.paths(params))
    assert new < set(paths)
    for number in range(4):
        before = jax.tree.leaves(now.params)
        now, _ = train_step(now, jax.device_put(BATCH))
        moved = {
            path
            for path, old, after in zip(paths, before, jax.tree.leaves(now.params), strict=True)
            if not np.array_equal(old, after)
        }
        assert moved == (new if number < 2 else set(paths)), number
