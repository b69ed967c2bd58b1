"""An adapted model computes what its source does, and every weight of both is accounted for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.adapt import rules
from t5g2.adapt.apply import apply
from t5g2.adapt.rules import T5GEMMA2_FROM_GEMMA3, Recipe, Rule, check, target_config
from t5g2.core import mesh as meshes
from t5g2.core import tree
from t5g2.core.batch import Stream
from t5g2.core.errors import UserError
from t5g2.models import build
from t5g2.models.layers import Compute
from tests import tiny, weights

EOI = 7
COMPUTE = Compute(dtype="float32")
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def source():
    return weights.model(tiny.GEMMA3)


@pytest.fixture(scope="module")
def target_of(source):
    """config -> (the source of this config, the adapted model, its provenance)."""

    def adapt(config=tiny.GEMMA3, dtype=jnp.float32):
        model = source if config == tiny.GEMMA3 else weights.model(config)
        abstract = build.abstract(target_config(config, eoi_id=EOI), dtype)
        return model, *apply(tree.leaves(model), abstract, T5GEMMA2_FROM_GEMMA3, key=KEY)

    return adapt


def stream(tokens, segments=None, positions=None, blocks=None):
    tokens = jnp.asarray(tokens, jnp.int32)
    whole = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments, jnp.int32)
    return Stream(tokens, segments, whole if positions is None else positions, blocks)


def tokens_with_eoi(rows=2, length=11):
    tokens = np.random.default_rng(0).integers(0, tiny.GEMMA3.vocab_size, (rows, length))
    tokens[:, 3] = EOI
    return tokens


def test_the_decoder_alone_is_the_source(target_of):
    """With every encoder token masked, logits are the source's, past the window, end-of-image tokens included."""
    gemma, t5gemma, _ = target_of()
    decoder = stream(tokens_with_eoi())
    encoder = stream(tokens_with_eoi(length=5), segments=np.zeros((2, 5)))
    run = jax.jit(lambda model, *streams: model.logits(model.hidden(*streams, compute=COMPUTE)))
    np.testing.assert_allclose(run(t5gemma, encoder, decoder), run(gemma, None, decoder), atol=1e-5, rtol=1e-5)
    seen = run(t5gemma, encoder._replace(segments=jnp.ones_like(encoder.segments)), decoder)
    assert np.abs(np.asarray(seen) - np.asarray(run(gemma, None, decoder))).max() > 0.1, "the mask must matter"


def test_the_encoder_on_single_tokens_is_the_source(target_of):
    """A token that sees itself alone does not know causal from bidirectional: packed rows of segments of one token."""
    gemma, t5gemma, _ = target_of()
    tokens = tokens_with_eoi()
    alone = stream(tokens, segments=1 + np.arange(22).reshape(2, 11), positions=jnp.zeros((2, 11), jnp.int32))
    encoded = t5gemma.encode(alone, compute=COMPUTE)
    np.testing.assert_allclose(encoded, gemma.hidden(None, alone, compute=COMPUTE), atol=1e-5, rtol=1e-5)


def test_the_encoder_is_the_source_seeing_both_ways(target_of):
    """Where windows reach over the whole row, the encoder is the source with all tokens in one bidirectional block."""
    gemma, t5gemma, _ = target_of(dataclasses.replace(tiny.GEMMA3, window=64))
    tokens = tokens_with_eoi()
    both_ways = stream(tokens, blocks=jnp.ones(tokens.shape, jnp.int32))
    encoded = t5gemma.encode(stream(tokens), compute=COMPUTE)
    np.testing.assert_allclose(encoded, gemma.hidden(None, both_ways, compute=COMPUTE), atol=1e-5, rtol=1e-5)


def test_every_leaf_is_accounted_for_once(target_of):
    gemma, t5gemma, provenance = target_of()
    sources, targets = tree.leaves(gemma), tree.leaves(t5gemma)
    assert [row.source for row in provenance.rows] == list(sources)
    assert sorted(use.target for row in provenance.rows for use in row.uses) == sorted(targets)
    for row in provenance.rows:
        kept = np.asarray(sources[row.source].read())
        for use in row.uses:
            value = np.asarray(targets[use.target].read())
            expected = kept[EOI] * np.sqrt(np.float32(32)) if use.target[0] == "embedder.eoi" else kept
            np.testing.assert_array_equal(value, expected)
    layer = next(row for row in provenance.rows if row.source == ("layers.attention.q", 2))
    assert [use.target for use in layer.uses] == [("decoder.layers.attention.q", 2), ("encoder.layers.attention.q", 2)]


def test_provenance_as_a_person_reads_it(target_of):
    _, _, provenance = target_of()
    lines = provenance.table().splitlines()
    text = [" ".join(line.split()) for line in lines]
    assert text[:3] == [
        "how source layers targets shape",
        "derived, tied embedder.table - embedder.eoi (row eoi_id * sqrt(width)), "
        "embedder.table (encoder input, decoder input, output head) [97, 32]",
        "copied final_norm.scale - decoder.final_norm.scale, encoder.final_norm.scale [32]",
    ]
    assert "copied layers.mlp.up 0-2 decoder.layers.mlp.up, encoder.layers.mlp.up [32, 48]" in text
    assert len({line.index("[") for line in lines[2:-2]}) == 1, "columns are aligned"
    assert lines[-2:] == [
        "82 target leaves: 1 derived, 1 tied, 80 copied",
        "41 source leaves: 41 used, 0 dropped",
    ]
    leaves = provenance.to_dict()["leaves"]
    assert len(leaves) == 82
    assert {
        "target": "decoder.layers.mlp.up.1",
        "how": "copied",
        "source": "layers.mlp.up.1",
        "shape": "[32, 48]",
        "note": "",
    } in leaves


def test_weights_are_cast_to_the_targets_dtype(target_of, source):
    _, t5gemma, _ = target_of(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(t5gemma)} == {jnp.dtype("bfloat16")}
    table = np.asarray(source.embedder.table[...]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(t5gemma.embedder.table[...]), table)
    expected = t5gemma.embedder.table[...][EOI] * jnp.asarray(np.sqrt(32), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(t5gemma.embedder.eoi[...]), np.asarray(expected))


def test_leaves_are_read_when_they_are_needed(source):
    reads = []
    view = tree.leaves(source)

    def lazily(leaf):
        def read():
            reads.append(leaf.key)
            return np.asarray(leaf.read())

        return dataclasses.replace(leaf, read=read)

    abstract = build.abstract(target_config(tiny.GEMMA3))
    apply({key: lazily(leaf) for key, leaf in view.items()}, abstract, T5GEMMA2_FROM_GEMMA3, key=KEY)
    assert sorted(reads) == sorted(2 * [key for key in view if key[0] != "embedder.table"] + [("embedder.table", None)])


def test_target_config():
    config = target_config(tiny.GEMMA3, rope_factor=4.0, eoi_id=3)
    assert config.encoder == config.decoder == dataclasses.replace(tiny.GEMMA3, rope_global=rules.Rope(1e6, 4.0))
    assert config.eoi_id == 3
    assert target_config(tiny.GEMMA3).decoder == tiny.GEMMA3
    with pytest.raises(UserError, match="the source is an encoder-decoder model already; give a decoder-only one"):
        target_config(tiny.T5GEMMA2)
    with pytest.raises(UserError, match=r"the source is a Gemma 2 .* give a Gemma 3"):
        target_config(dataclasses.replace(tiny.GEMMA3, final_softcap=30.0))


def test_check_tells_what_cannot_differ_from_what_may():
    target = target_config(tiny.GEMMA3, rope_factor=4.0)
    assert check(tiny.GEMMA3, target) == (
        "encoder.rope_global.factor: 8.0 in the source, 4.0 in the target",
        "decoder.rope_global.factor: 8.0 in the source, 4.0 in the target",
    )
    assert check(tiny.GEMMA3, target_config(tiny.GEMMA3)) == ()
    wider = dataclasses.replace(tiny.GEMMA3, width=64, vocab_size=128)
    with pytest.raises(UserError) as caught:
        check(tiny.GEMMA3, target_config(wider))
    assert str(caught.value).splitlines() == [
        "the source's weights do not fit the target:",
        "  encoder.vocab_size: 97 in the source, 128 in the target",
        "  encoder.width: 32 in the source, 64 in the target",
        "  decoder.vocab_size: 97 in the source, 128 in the target",
        "  decoder.width: 32 in the source, 64 in the target",
        "Choose a target of the source's sizes; --target=t5gemma2 derives it from the source",
    ]
    with pytest.raises(UserError, match="cannot adapt EncoderDecoderConfig to TextConfig; give a decoder-only source"):
        check(tiny.T5GEMMA2, tiny.GEMMA3)


def recipe_with(*rules, dropped=()):
    return Recipe("a test", (*rules, *T5GEMMA2_FROM_GEMMA3.rules), dropped)


def test_nothing_may_be_left_over(source):
    abstract = build.abstract(target_config(tiny.GEMMA3, eoi_id=EOI))
    recipe = Recipe("a test", [rule for rule in T5GEMMA2_FROM_GEMMA3.rules if not rule.target.startswith("embedder")])
    with pytest.raises(UserError) as caught:
        apply(tree.leaves(source), abstract, recipe, key=KEY)
    assert str(caught.value).splitlines()[1:] == [
        "target leaves without a rule:",
        "  embedder.eoi",
        "  embedder.table",
        "source leaves neither used nor dropped:",
        "  embedder.table",
    ]
    deeper = build.abstract(target_config(dataclasses.replace(tiny.GEMMA3, layers=4)))
    with pytest.raises(
        UserError, match=r"whose source leaf does not exist:\n  .*attention.k.3 \(from layers.attention.k.3\)"
    ):
        apply(tree.leaves(source), deeper, T5GEMMA2_FROM_GEMMA3, key=KEY)
    wider = build.abstract(target_config(dataclasses.replace(tiny.GEMMA3, mlp_width=40)))
    with pytest.raises(
        UserError,
        match=r"of another shape:\n  layers.mlp.down.0 -> .*: \[48, 32\] in the source, \[40, 32\] in the target",
    ):
        apply(tree.leaves(source), wider, T5GEMMA2_FROM_GEMMA3, key=KEY)


def test_initialised_and_dropped_leaves(source):
    """Rules of the kinds that this recipe does not need: a final norm made anew, and the source's left behind."""
    recipe = recipe_with(
        Rule("*.final_norm.scale", "initialised", None, "made anew"),
        Rule("decoder.layers.mlp.up", "initialised", None),
        dropped=("final_norm.*",),
    )
    config = target_config(tiny.GEMMA3)
    model, provenance = apply(tree.leaves(source), build.abstract(config), recipe, key=KEY)
    new, made = tree.leaves(build.make(config, key=KEY)), tree.leaves(model)
    for key in (("encoder.final_norm.scale", None), ("decoder.layers.mlp.up", 0), ("decoder.layers.mlp.up", 2)):
        np.testing.assert_allclose(made[key].read(), new[key].read(), rtol=1e-6)
    text = [" ".join(line.split()) for line in provenance.table().splitlines()]
    assert "dropped final_norm.scale - - [32]" in text
    assert "initialised - - encoder.final_norm.scale (made anew) [32]" in text
    assert "initialised - 0-2 decoder.layers.mlp.up [32, 48]" in text
    assert text[-1] == "41 source leaves: 40 used, 1 dropped"
    assert {
        "target": "-",
        "how": "dropped",
        "source": "final_norm.scale",
        "shape": "[32]",
        "note": "",
    } in provenance.to_dict()["leaves"]


def test_lands_on_a_mesh(source, devices):
    mesh = meshes.make(meshes.MeshShape(data=2, fsdp=2, tensor=2))
    abstract = build.abstract(target_config(tiny.GEMMA3, eoi_id=EOI))
    places = meshes.shardings(abstract, mesh)
    sharded, _ = apply(tree.leaves(source), abstract, T5GEMMA2_FROM_GEMMA3, key=KEY, shardings=places)
    alone, _ = apply(tree.leaves(source), abstract, T5GEMMA2_FROM_GEMMA3, key=KEY)
    assert [x.sharding for x in jax.tree.leaves(sharded)] == jax.tree.leaves(places)
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
