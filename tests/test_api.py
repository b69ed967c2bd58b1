"""The Python surface on tiny folders: values of the models underneath, and every mistake in words."""

import numpy as np
import pytest

from t5g2 import api
from t5g2.checkpoint.folder import save_model
from t5g2.core.batch import Stream
from t5g2.core.errors import UserError
from tests import tiny, weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders of tiny models by name."""
    root = tmp_path_factory.mktemp("models")
    for name, config in {"gemma": tiny.GEMMA3, "t5gemma2": tiny.T5GEMMA2}.items():
        save_model(root / name, weights.model(config))
    return root


def drawn(length, rows=2, seed=0):
    return np.random.default_rng(seed).integers(10, 97, (rows, length))


def stream(tokens, mask, positions=None):
    positions = np.arange(tokens.shape[1])[None].repeat(len(tokens), 0) if positions is None else positions
    return Stream(*(np.asarray(x, np.int32) for x in (tokens * mask, mask, positions)))


def test_logits_are_the_models(folders):
    tokens, mask = drawn(9), np.ones((2, 9), int)
    mask[1, :3] = 0
    got = api.load(folders / "gemma").logits(tokens, decoder_mask=mask)
    assert got.dtype == np.float32
    model = weights.model(tiny.GEMMA3)
    expected = model.logits(model.hidden(None, stream(tokens, mask), compute=tiny.FLOAT32))
    np.testing.assert_allclose(got[mask == 1], np.asarray(expected)[mask == 1], atol=2e-6)


def test_logits_of_an_encoder_decoder_and_its_states(folders):
    tokens, read, mask = drawn(5), drawn(8, seed=1), np.ones((2, 8), bool)
    mask[0, -2:] = False
    loaded, model = api.load(folders / "t5gemma2"), weights.model(tiny.T5GEMMA2)
    decoder, encoder = stream(tokens, np.ones((2, 5), int)), stream(read, mask)
    got = loaded.logits(tokens.tolist(), read.tolist(), encoder_mask=mask)
    expected = model.logits(model.hidden(encoder, decoder, compute=tiny.FLOAT32))
    np.testing.assert_allclose(got, expected, atol=2e-6)
    states = loaded.encode(read, encoder_mask=mask)
    assert (states.shape, states.dtype) == ((2, 8, 32), np.float32)
    np.testing.assert_allclose(states[mask], np.asarray(model.encode(encoder, compute=tiny.FLOAT32))[mask], atol=2e-6)


def test_positions_count_columns_or_tokens(folders):
    """Queries of merged attention are rotated and the encoder's keys are not, so positions themselves matter."""
    tokens, read = drawn(6), drawn(8, seed=1)
    left = np.concatenate([np.zeros((2, 3), int), tokens], axis=1)
    mask = left > 0
    for positions, same in (("raw", False), ("counted", True)):
        model = api.load(folders / "t5gemma2", positions=positions)
        alone, padded = model.logits(tokens, read), model.logits(left, read, decoder_mask=mask)[:, 3:]
        assert (np.abs(alone - padded).max() < 1e-5) == same


WRONG = [
    (lambda m, t: m.logits([1, 2]), "decoder_tokens is int64[2]; it must be whole numbers of shape [rows, length]"),
    (lambda m, t: m.logits([[1.5]]), "decoder_tokens is float64[1, 1]; it must be whole numbers"),
    (lambda m, t: m.logits([[1], [2, 3]]), "decoder_tokens has rows of different lengths; pad them to one"),
    (lambda m, t: m.logits([[97]]), "decoder_tokens holds the id 97; ids of this model's vocabulary are 0 to 96"),
    (lambda m, t: m.logits([[-1]]), "decoder_tokens holds the id -1"),
    (lambda m, t: m.logits([[3]], decoder_mask=[[1, 1]]), "decoder_mask is int64[1, 2]; it must be bool or 0 and 1 of"),
    (lambda m, t: m.logits([[3]], decoder_mask=[[2]]), "decoder_mask is int64[1, 1]; it must be bool or 0 and 1"),
    (lambda m, t: m.logits([[3]], [[3]]), "encoder_tokens is given, but a decoder-only model has no encoder"),
    (lambda m, t: m.encode([[3]]), "a decoder-only model has no encoder to encode with"),
    (lambda m, t: t.logits([[3]]), "encoder_tokens is missing: this is an encoder-decoder model"),
    (lambda m, t: t.logits([[3]], [[3], [4]]), "encoder_tokens has 2 rows and decoder_tokens 1"),
]


@pytest.mark.parametrize(("use", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_a_mistake_is_said(folders, use, message):
    gemma, t5gemma = (api.load(folders / name) for name in ("gemma", "t5gemma2"))
    with pytest.raises(UserError) as error:
        use(gemma, t5gemma)
    assert message in str(error.value)


def test_an_unknown_choice_is_said(folders):
    with pytest.raises(UserError, match="unknown positions 'count'; did you mean 'counted'"):
        api.load(folders / "gemma", positions="count")
