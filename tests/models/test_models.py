"""Dependencies of each token's state, by gradient; and what must not matter: packing, padding, storage, remat."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.core import tree
from t5g2.core.batch import Sequences
from t5g2.core.errors import UserError
from t5g2.models import build, stack
from t5g2.models.config import EncoderDecoderConfig
from t5g2.models.layers import Compute
from tests import weights
from tests.models.test_loss import equations
from tests.tiny import GEMMA2, GEMMA3, SIGLIP, T5GEMMA, T5GEMMA2, T5GEMMA2_IMAGES

COMPUTE = Compute(dtype="float32")
HIDDEN = jax.jit(lambda model, encoder, decoder: model.hidden(encoder, decoder, compute=COMPUTE))
ONE_LOCAL = replace(GEMMA3, layers=1)
ONE_LOCAL_PAIR = EncoderDecoderConfig(encoder=ONE_LOCAL, decoder=replace(ONE_LOCAL, window=3))
LENGTH, ENCODER_LENGTH = 11, 9


def stream(tokens, segments=None, positions=None, blocks=None) -> Sequences:
    tokens = np.atleast_2d(np.array(tokens, np.int32))
    segments = np.ones_like(tokens) if segments is None else np.atleast_2d(np.array(segments, np.int32))
    positions = np.arange(tokens.shape[1]) if positions is None else positions
    positions = np.broadcast_to(np.array(positions, np.int32), tokens.shape)
    return Sequences(tokens, segments, positions, blocks)


# every token is another one, so that the rows of the embedding tell the tokens apart
DECODER = stream(np.arange(10, 10 + LENGTH))
ENCODER = stream(np.arange(40, 40 + ENCODER_LENGTH))


def influence(config, states, *of: Sequences):
    """Tokens `of` a stream that have any influence on each state of `states(model)`: bool[states, tokens]; of several
    streams, a list of them.
    """
    model = weights.model(config)

    def read(model):
        y_TD = states(model)[0]
        return jnp.sum(y_TD * jax.random.normal(jax.random.key(0), y_TD.shape), axis=-1)

    per_row = np.abs(np.asarray(jax.jit(jax.jacrev(read))(model).embedder.table[...])).max(-1)
    found = [per_row[:, np.asarray(sequences.tokens)[0]] > 0 for sequences in of]
    return found if len(found) > 1 else found[0]


def band(queries: int, keys: int, back: int, ahead: int) -> np.ndarray:
    offset = np.arange(keys)[None, :] - np.arange(queries)[:, None]
    return (offset >= -back) & (offset <= ahead)


def test_a_decoder_only_model_is_causal_and_reaches_back_to_the_first_token():
    got = influence(GEMMA3, lambda m: m.hidden(None, DECODER, compute=COMPUTE), DECODER)
    np.testing.assert_array_equal(got, band(LENGTH, LENGTH, LENGTH, 0))


def test_one_local_layer_reaches_as_far_as_its_window():
    got = influence(ONE_LOCAL, lambda m: m.hidden(None, DECODER, compute=COMPUTE), DECODER)
    np.testing.assert_array_equal(got, band(LENGTH, LENGTH, 3, 0))


def test_the_encoder_sees_both_ways():
    got = influence(T5GEMMA2, lambda m: m.encode(ENCODER, compute=COMPUTE), ENCODER)
    assert got.all()
    got = influence(ONE_LOCAL_PAIR, lambda m: m.encode(ENCODER, compute=COMPUTE), ENCODER)
    np.testing.assert_array_equal(got, band(ENCODER_LENGTH, ENCODER_LENGTH, 1, 2))


def test_every_decoder_token_sees_all_of_the_encoder_and_its_own_past():
    def states(model):
        return model.hidden(ENCODER, DECODER, compute=COMPUTE)

    for config, back in ((T5GEMMA2, LENGTH), (ONE_LOCAL_PAIR, 2)):
        of_encoder, of_decoder = influence(config, states, ENCODER, DECODER)
        assert of_encoder.all()
        np.testing.assert_array_equal(of_decoder, band(LENGTH, LENGTH, back, 0))


def test_padding_and_other_examples_have_no_influence():
    segments = np.array([1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0])
    positions = np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0])
    packed = stream(DECODER.tokens, segments, positions)
    encoder = stream(ENCODER.tokens, [1, 1, 2, 2, 2, 2, 2, 0, 0], [0, 1, 0, 1, 2, 3, 4, 0, 0])

    def states(model):
        return model.hidden(encoder, packed, compute=COMPUTE)

    valid = segments != 0
    same = segments[:, None] == segments[None, :]
    got, of_encoder = influence(T5GEMMA2, states, packed, encoder)
    np.testing.assert_array_equal(got[valid], (same & band(LENGTH, LENGTH, LENGTH, 0))[valid])
    np.testing.assert_array_equal(of_encoder[valid], (segments[:, None] == encoder.segments)[valid])


def test_a_bidirectional_prefix_sees_itself_both_ways():
    blocks = np.array([[1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]], np.int32)
    decoder = DECODER._replace(blocks=blocks)
    got = influence(GEMMA3, lambda m: m.hidden(None, decoder, compute=COMPUTE), decoder)
    prefix = (blocks[0][:, None] == 1) & (blocks[0][None, :] == 1)
    np.testing.assert_array_equal(got, band(LENGTH, LENGTH, LENGTH, 0) | prefix)


@pytest.mark.parametrize("config", [GEMMA2, GEMMA3], ids=["gemma 2", "gemma 3"])
def test_packed_prefixes_have_the_states_that_they_have_alone(config):
    """Block 1 of one example is not block 1 of the next."""
    model = weights.model(config)
    draw = np.random.RandomState(0)
    first, second = draw.randint(10, 97, 9), draw.randint(10, 97, 7)

    def row(*examples):
        tokens = np.concatenate([t for t, _ in examples])
        blocks = np.concatenate([np.arange(len(t)) < prefix for t, prefix in examples]).astype(np.int32)
        segments = np.concatenate([np.full(len(t), i + 1) for i, (t, _) in enumerate(examples)])
        positions = np.concatenate([np.arange(len(t)) for t, _ in examples])
        return stream(tokens, segments, positions)._replace(blocks=blocks[None])

    together = np.asarray(HIDDEN(model, None, row((first, 5), (second, 4))))[0]
    np.testing.assert_allclose(together[:9], np.asarray(HIDDEN(model, None, row((first, 5))))[0], atol=1e-5)
    np.testing.assert_allclose(together[9:], np.asarray(HIDDEN(model, None, row((second, 4))))[0], atol=1e-5)
    causal = np.asarray(HIDDEN(model, None, row((first, 0))))[0]
    assert np.abs(together[:4] - causal[:4]).max() > 0.1


@pytest.mark.parametrize(
    "config", [GEMMA2, GEMMA3, T5GEMMA, T5GEMMA2], ids=["gemma 2", "gemma 3", "t5gemma", "t5gemma 2"]
)
def test_packed_examples_have_the_states_that_they_have_alone(config):
    """Three examples in one row, each longer than a window on one side or the other, and padding."""
    model = weights.model(config)
    lengths, encoder_lengths = (9, 2, 7), (6, 11, 0)
    draw = np.random.RandomState(0)
    tokens = [draw.randint(10, 97, n) for n in lengths]
    encoder_tokens = [draw.randint(10, 97, n) for n in encoder_lengths]

    def packed(parts, pad):
        return stream(
            np.concatenate([*parts, np.zeros(pad, int)]),
            np.concatenate([np.full(len(p), i + 1) for i, p in enumerate(parts)] + [np.zeros(pad, int)]),
            np.concatenate([*(np.arange(len(p)) for p in parts), np.zeros(pad, int)]),
        )

    encoder = packed(encoder_tokens, 2) if isinstance(config, EncoderDecoderConfig) else None
    together = np.asarray(HIDDEN(model, encoder, packed(tokens, 3)))[0]
    starts = np.cumsum((0, *lengths))
    for i, start in enumerate(starts[:-1]):
        # padded to one length, so that it is compiled once
        own = packed([encoder_tokens[i]], 12 - encoder_lengths[i]) if isinstance(config, EncoderDecoderConfig) else None
        alone = np.asarray(HIDDEN(model, own, packed([tokens[i]], 12 - lengths[i])))[0, : lengths[i]]
        np.testing.assert_allclose(together[start : start + lengths[i]], alone, atol=1e-5)


@pytest.mark.parametrize(
    "config", [replace(GEMMA3, layers=5), T5GEMMA, T5GEMMA2], ids=["gemma 5", "t5gemma", "t5gemma 2"]
)
def test_neither_scan_nor_remat_changes_states_or_gradients(config):
    model = weights.model(config)
    encoder = ENCODER if isinstance(config, EncoderDecoderConfig) else None

    def run(compute):
        def loss(model):
            return jnp.mean(jnp.square(model.logits(model.hidden(encoder, DECODER, compute=compute))))

        return jax.device_get(jax.jit(jax.value_and_grad(loss))(model))

    expected, expected_gradient = run(COMPUTE)
    changes = ({"scan": False}, {"remat": "block"}, {"remat": "attention"}, {"remat": "mlp,projections", "scan": False})
    for change in changes:
        value, gradient = run(replace(COMPUTE, **change))
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for (path, got), want in zip(
            jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected_gradient), strict=True
        ):
            np.testing.assert_allclose(got, want, atol=1e-5 * max(np.abs(want).max(), 0.1), err_msg=f"{change} {path}")


def test_remat_keeps_the_input_of_each_block_and_what_it_names():
    model = build.abstract(replace(GEMMA3, layers=8))

    def stored(remat):
        def loss(model):
            return jnp.sum(model.hidden(None, DECODER, compute=replace(COMPUTE, remat=remat)))

        kept = jax.eval_shape(lambda model: jax.vjp(loss, model)[1], model)
        return sum(leaf.size for leaf in jax.tree.leaves(kept))

    weight_count = sum(leaf.size for leaf in jax.tree.leaves(model))
    inputs = 8 * LENGTH * GEMMA3.width
    assert stored("block") < weight_count + 2 * inputs
    outputs = 8 * LENGTH * GEMMA3.heads * GEMMA3.head_size
    assert stored("block") + outputs == stored("attention")
    projections = 8 * LENGTH * (GEMMA3.heads + 2 * GEMMA3.kv_heads) * GEMMA3.head_size
    gates = 2 * 8 * LENGTH * GEMMA3.mlp_width
    assert stored("attention, mlp,projections") == stored("attention") + projections + gates
    assert stored("none") > weight_count + 10 * inputs


def test_what_is_offloaded_is_moved_to_the_host_and_back():
    """The input of each block, and what remat names, once in each direction; nothing without it."""
    model = build.abstract(replace(GEMMA3, layers=1, pattern=("local",)))

    def moves(**settings):
        def loss(model):
            return jnp.sum(model.hidden(None, DECODER, compute=replace(COMPUTE, scan=False, **settings)))

        program = jax.make_jaxpr(jax.grad(loss))(model)
        moved = [e for e in equations(program.jaxpr) if e.primitive.name == "device_put"]
        return sorted(str(e.params["devices"]) for e in moved)

    assert moves(remat="block") == []
    assert len(moves(remat="block", offload=True)) == 2
    assert len(moves(remat="attention", offload=True)) == 4
    assert sum("host" in move.lower() for move in moves(remat="attention", offload=True)) == 2
    with pytest.raises(UserError, match="offload moves what remat keeps to the host, and remat is 'none'"):
        replace(COMPUTE, offload=True)


def test_how_layers_are_stored_changes_neither_their_first_values_nor_what_they_compute():
    two, four = ("local", "global"), ("local", "global", "local", "global")
    configs = [replace(GEMMA3, layers=4, pattern=pattern) for pattern in (two, four, four * 2)]
    models = [build.make(config, key=jax.random.key(3)) for config in configs]
    assert [(len(m.layers.slots), len(m.layers.tail)) for m in models] == [(2, 0), (4, 0), (0, 4)]
    first = {key: leaf.read() for key, leaf in tree.leaves(jax.device_get(models[0])).items()}
    states = np.asarray(HIDDEN(models[0], None, DECODER))
    for model in models[1:]:
        for key, leaf in tree.leaves(jax.device_get(model)).items():
            np.testing.assert_allclose(leaf.read(), first[key], rtol=1e-6, err_msg=str(key))
        np.testing.assert_allclose(HIDDEN(model, None, DECODER), states, atol=1e-5)


def test_merged_attention_does_not_see_the_order_of_the_encoder_but_the_decoders_positions():
    model = weights.model(T5GEMMA2)
    memory_BSD = jax.random.normal(jax.random.key(0), (1, ENCODER_LENGTH, 32))
    decode = jax.jit(lambda d, m, e: model.decode(d, m, e, compute=COMPUTE))
    states = decode(DECODER, memory_BSD, ENCODER)
    order = np.random.RandomState(0).permutation(ENCODER_LENGTH)
    np.testing.assert_allclose(decode(DECODER, memory_BSD[:, order], ENCODER), states, atol=1e-5)
    later = DECODER._replace(positions=DECODER.positions + 5)
    assert np.abs(decode(later, memory_BSD, ENCODER) - states).max() > 1e-2
    # without the encoder only distances count
    nothing = ENCODER._replace(segments=np.zeros_like(ENCODER.segments))
    np.testing.assert_allclose(
        decode(later, memory_BSD, nothing), decode(DECODER, memory_BSD, nothing), atol=1e-4, rtol=0
    )


def test_padding_on_the_left_of_the_encoder_is_the_same_as_on_the_right():
    model = weights.model(T5GEMMA2)
    tokens, pad, positions = ENCODER.tokens[0], np.zeros(3, int), np.arange(ENCODER_LENGTH)
    ones = np.ones(ENCODER_LENGTH, int)
    right = stream(np.append(tokens, pad), np.append(ones, pad), np.append(positions, pad))
    left = stream(np.append(pad, tokens), np.append(pad, ones), np.append(pad, positions))
    np.testing.assert_allclose(HIDDEN(model, left, DECODER), HIDDEN(model, right, DECODER), atol=1e-5)


def test_rows_of_nothing_but_padding_are_finite_forward_and_backward():
    model = weights.model(T5GEMMA2)

    def loss(model):
        empty = [s._replace(segments=np.zeros_like(s.segments)) for s in (ENCODER, DECODER)]
        return jnp.sum(model.logits(model.hidden(*empty, compute=COMPUTE)))

    value, gradient = jax.jit(jax.value_and_grad(loss))(model)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@partial(jax.jit, static_argnames="compute")
def states_and_logits(model, encoder, *, compute):
    states = model.hidden(encoder, DECODER, compute=compute)
    return states, model.logits(states)


@pytest.mark.parametrize(
    "config", [GEMMA2, GEMMA3, T5GEMMA, T5GEMMA2], ids=["gemma 2", "gemma 3", "t5gemma", "t5gemma 2"]
)
def test_bfloat16_stays_near_float32(config):
    model = weights.model(config)
    encoder = ENCODER if isinstance(config, EncoderDecoderConfig) else None
    _, exact = states_and_logits(model, encoder, compute=COMPUTE)
    states, rough = states_and_logits(model, encoder, compute=Compute(dtype="bfloat16"))
    assert states.dtype == jnp.bfloat16
    assert rough.dtype == jnp.float32
    assert np.corrcoef(np.ravel(rough), np.ravel(exact))[0, 1] > 0.999


@pytest.mark.parametrize(
    "config", [GEMMA2, GEMMA3, T5GEMMA, T5GEMMA2], ids=["gemma 2", "gemma 3", "t5gemma", "t5gemma 2"]
)
def test_an_abstract_model_is_the_model_without_its_weights(config):
    abstract = build.abstract(config, jnp.bfloat16)
    model = build.make(config, key=jax.random.key(0), param_dtype=jnp.bfloat16)
    assert jax.tree.structure(abstract) == jax.tree.structure(model)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}
    axes = {leaf.path: leaf.axes for leaf in tree.leaves(abstract).values() if len(leaf.shape) > 1}
    stack = "decoder." if isinstance(config, EncoderDecoderConfig) else ""
    table = "decoder_embedder.table" if config is T5GEMMA else "embedder.table"
    assert axes[table] == ("vocab", "embed")
    assert axes[f"{stack}layers.attention.k"] == ("embed", "kv_heads", "head_size")
    assert axes[f"{stack}layers.mlp.down"] == ("mlp", "embed")


def test_a_decoder_only_model_refuses_an_encoder_side():
    model = build.abstract(GEMMA3)
    with pytest.raises(ValueError, match="a decoder-only model has no encoder; give encoder=None"):
        model.hidden(ENCODER, DECODER, compute=COMPUTE)
    with pytest.raises(ValueError, match="a decoder-only model has no encoder; give encoder=None"):
        model.start_cache(1, 4, encoder=ENCODER, compute=COMPUTE)


def test_separate_cross_attention_sees_neither_order_nor_positions():
    model = weights.model(T5GEMMA)
    memory_BSD = jax.random.normal(jax.random.key(0), (1, ENCODER_LENGTH, 24))
    decode = jax.jit(lambda d, m, e: model.decode(d, m, e, compute=COMPUTE))
    states = decode(DECODER, memory_BSD, ENCODER)
    order = np.random.RandomState(0).permutation(ENCODER_LENGTH)
    np.testing.assert_allclose(decode(DECODER, memory_BSD[:, order], ENCODER), states, atol=1e-5)
    later = DECODER._replace(positions=DECODER.positions + 5)
    np.testing.assert_allclose(decode(later, memory_BSD, ENCODER), states, atol=1e-4)


@pytest.mark.parametrize("config", [T5GEMMA, T5GEMMA2], ids=["t5gemma", "t5gemma 2"])
def test_cross_attention_in_global_layers_only(config):
    """A decoder of one local layer does not see the encoder, one of a global layer does."""
    for kind, sees in (("local", False), ("global", True)):
        decoder = replace(config.decoder, layers=1, pattern=(kind,))
        model = weights.model(replace(config, decoder=decoder, cross_layers="global"))
        other = ENCODER._replace(tokens=ENCODER.tokens + 1)
        same = np.array_equal(HIDDEN(model, ENCODER, DECODER), HIDDEN(model, other, DECODER))
        assert same != sees
        assert any("cross" in path for path, _ in tree.leaves(model)) == (sees and config is T5GEMMA)


def test_a_head_of_its_own_is_not_the_embedding():
    model = weights.model(replace(GEMMA3, tied_head=False))
    logits = model.logits(HIDDEN(model, None, DECODER))
    np.testing.assert_array_equal(model.head().table_VD, model.unembedder.table[...])
    model.unembedder.table[...] = 2 * model.unembedder.table[...]
    np.testing.assert_allclose(model.logits(HIDDEN(model, None, DECODER)), 2 * logits, rtol=1e-6)


@pytest.mark.parametrize("setting", ["norm_dtype", "softmax_dtype"])
def test_precision_settings_round_where_they_say(setting):
    model = weights.model(T5GEMMA2)
    exact = HIDDEN(model, ENCODER, DECODER)
    compute = replace(COMPUTE, **{setting: "bfloat16"})
    rough = jax.jit(lambda model: model.hidden(ENCODER, DECODER, compute=compute))(model)
    assert rough.dtype == jnp.float32
    off = np.abs(np.asarray(rough) - np.asarray(exact))
    assert 1e-4 < off.max() < 0.3


@pytest.mark.parametrize("config", [GEMMA2, replace(GEMMA3, tied_head=False), T5GEMMA2_IMAGES, T5GEMMA, SIGLIP])
def test_every_leaf_knows_its_initialiser(config):
    """It makes one layer's array, spread as in a model that was made whole; two models agree on it."""
    abstract, again = build.abstract(config), jax.eval_shape(lambda: build.make(config, key=jax.random.key(1)))
    assert jax.tree.structure(abstract) == jax.tree.structure(again)
    assert hash(jax.tree.structure(abstract)) == hash(jax.tree.structure(again)), "jit would trace twice"
    made = tree.leaves(jax.device_get(build.make(config, key=jax.random.key(0))))
    for at, leaf in tree.leaves(abstract).items():
        half = np.asarray(leaf.init(jax.random.key(1), leaf.shape, jnp.bfloat16))
        assert (half.shape, half.dtype) == (leaf.shape, jnp.bfloat16)
        new, old = half.astype(np.float32), made[at].read()
        assert new.shape == old.shape
        spread = 5 / np.sqrt(2 * max(old.size, 1)) if old.std() > 0 else 0.01
        np.testing.assert_allclose(new.std(), old.std(), rtol=2 * spread, err_msg=tree.name(at))
        if old.std() == 0:
            np.testing.assert_allclose(new, old, rtol=0.01)


def test_the_mlp_of_a_long_row_runs_in_parts_and_computes_the_same(monkeypatch):
    """Parts of 3 and 4 tokens, the last one padded: values and gradients of one MLP over the whole row."""
    model = weights.model(T5GEMMA2)

    def run():
        def loss(model):
            hidden = model.hidden(ENCODER, DECODER, compute=replace(COMPUTE, remat="block"))
            return jnp.mean(jnp.square(model.logits(hidden)))

        return jax.jit(jax.value_and_grad(loss))(model)

    expected = run()
    monkeypatch.setattr(stack, "LONG_ROW", 6)
    monkeypatch.setattr(stack, "PART", 4)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), run(), expected)
