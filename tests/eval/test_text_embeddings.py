"""Embeddings of texts are pooled states, whatever the batch."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from t5g2.api import loading
from t5g2.checkpoint.folder import save_model
from t5g2.core.errors import UserError
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.eval.generation import pad_rows
from tests import tiny, weights

TEXTS = ["def f(", "x", "a longer text of some words, past the window of every layer"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root, tokenizer = tmp_path_factory.mktemp("models"), Bytes(sentinels=2)
    gemma = replace(tiny.GEMMA3, vocab_size=tokenizer.vocab_size)
    result = {}
    for name, config in (("gemma", gemma), ("t5gemma2", replace(tiny.T5GEMMA2, encoder=gemma, decoder=gemma))):
        save_model(root / name, weights.model(config), tokenizer=tokenizer.to_dict())
        result[name] = loading.load(root / name)
    return result


def pooled(states, pooling):
    vector = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[pooling]
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_they_are_pooled_states(models, pooling):
    model = models["t5gemma2"]
    vectors = model.embed(TEXTS, pooling=pooling, rows=2)
    assert vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        states = model.encode(model.tokenizer.encode(text)[None])[0]
        np.testing.assert_allclose(vector, pooled(states, pooling), atol=1e-5)


def test_a_decoder_only_model_embeds_with_its_own_states_after_bos(models):
    model = models["gemma"]
    vectors = model.embed(TEXTS, pooling="last", rows=4)
    for text, vector in zip(TEXTS, vectors, strict=True):
        tokens = np.append(np.int32(model.tokenizer.special_tokens.bos), model.tokenizer.encode(text))
        row = pad_rows([tokens], pad=0, left=False, multiple=1)
        states = jax.jit(lambda row: model.params.hidden(None, row, compute=model.compute))(row)[0]
        np.testing.assert_allclose(vector, pooled(np.asarray(states), "last"), atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("name", ["gemma", "t5gemma2"])
def test_a_text_without_tokens_has_the_state_of_bos(models, name, pooling):
    """An encoder that reads no BOS otherwise, too; beside other texts and alone."""
    model = models[name]
    assert not model.encoder_bos
    vectors = model.embed(["", TEXTS[2]], pooling=pooling, rows=2)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[:1], model.embed([""], pooling="first", rows=2), atol=1e-6)


def test_batches_do_not_change_them(models):
    model = models["t5gemma2"]
    together = model.embed(TEXTS, rows=3)
    np.testing.assert_allclose(together[1:2], model.embed(TEXTS[1:2], rows=3), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert model.embed([]).shape == (0, model.config.encoder.width)


def test_what_is_no_pooling_and_no_batch(models):
    with pytest.raises(UserError, match=r"unknown pooling 'max'; .*first, last, mean"):
        models["gemma"].embed(["a"], pooling="max")
    with pytest.raises(UserError, match="rows = 0; it must be at least 1"):
        models["gemma"].embed(["a"], rows=0)
