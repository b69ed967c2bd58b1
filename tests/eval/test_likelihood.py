"""Log-likelihoods against sums by hand from the logits, for both kinds of models, in any batch and on eight devices."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from t5g2.core import sharding as meshes
from t5g2.core.batch import Sequences
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.eval import likelihood
from t5g2.eval.likelihood import Likelihood, Scoring, TokenPair
from t5g2.eval.reading import Reading
from t5g2.models.loss_config import LossConfig
from tests import programs, tiny, weights
from tests.tiny import FLOAT32

TOKENIZER = Bytes(sentinels=4)
STACK = dataclasses.replace(tiny.GEMMA3, vocab_size=TOKENIZER.vocab_size)
MODELS = {
    "decoder-only": STACK,
    "encoder-decoder": dataclasses.replace(tiny.T5GEMMA2, encoder=STACK, decoder=STACK),
}
READING = Reading.trained(TOKENIZER)
SCORING = Scoring(READING, rows=4, compute=FLOAT32, loss=LossConfig(tile_tokens=64))
PAIRS = [("the cat", " sat"), ("", "dog"), ("a long context, past the window ", "of é tokens"), ("x", ""), ("x", "y")]


@functools.cache
def model_of(kind):
    return weights.model(MODELS[kind])


def by_hand(model, context, continuation):
    """Sum of log-probabilities and greediness from all logits of one row, token by token."""
    space = len(context) - len(context.rstrip())
    context, continuation = context[: len(context) - space], context[len(context) - space :] + continuation
    before, after = TOKENIZER.encode(context).tolist(), TOKENIZER.encode(continuation).tolist()
    bos = TOKENIZER.special_tokens.bos
    encoder, row = None, [bos, *before, *after]
    if model.config.is_encoder_decoder:
        encoder, row = sequences(before or [bos]), [bos, *after]
    logits = np.asarray(programs.logits(model, encoder, sequences(row), compute=FLOAT32), np.float64)[0]
    total, greedy = 0.0, True
    for place, token in enumerate(after, start=len(row) - len(after) - 1):
        total += logits[place, token] - np.log(np.sum(np.exp(logits[place])))
        greedy &= int(np.argmax(logits[place])) == token
    return total, greedy, len(after), len(continuation.encode())


def sequences(row):
    # of one length, so that all rows share a program
    length = 48
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(row)] = row
    positions = np.arange(length, dtype=np.int32)[None]
    return Sequences(tokens, (positions < len(row)).astype(np.int32), positions)


@pytest.mark.parametrize("kind", MODELS)
def test_log_likelihoods_are_the_sums_of_log_probabilities(kind):
    model = model_of(kind)
    scores = likelihood.loglikelihood(model, PAIRS, scoring=SCORING)
    for pair, score in zip(PAIRS, scores, strict=True):
        assert (pytest.approx(score.sum, abs=2e-5), *score[1:]) == by_hand(model, *pair)
    # the likeliest token of each prompt, found by hand, is greedy, and another is not
    prompt = "the cat"
    sums = {text: by_hand(model, prompt, text) for text in map(chr, range(97, 123))}
    best = likelihood.loglikelihood(model, [(prompt, text) for text in sums], scoring=SCORING)
    assert [score.is_greedy for score in best] == [greedy for _, greedy, *_ in sums.values()]


@pytest.mark.parametrize("kind", MODELS)
def test_batches_and_devices_change_nothing(kind, devices):
    model = model_of(kind)
    scores = likelihood.loglikelihood(model, PAIRS, scoring=SCORING)
    alone = [likelihood.loglikelihood(model, [pair], scoring=SCORING)[0] for pair in PAIRS]
    mesh = meshes.make(meshes.MeshShape(data=2, fsdp=2, tensor=2), devices)
    with jax.set_mesh(mesh):
        cut = jax.device_put(model, meshes.shardings(model, mesh))
        spread = likelihood.loglikelihood(cut, PAIRS, scoring=dataclasses.replace(SCORING, mesh=mesh))
    for other in (alone, spread):
        np.testing.assert_allclose([s.sum for s in other], [s.sum for s in scores], atol=2e-5)
        assert [s[1:] for s in other] == [s[1:] for s in scores]


def test_a_greedy_continuation_is_greedy():
    model, prompt = model_of("decoder-only"), TOKENIZER.encode("the cat")
    row = [TOKENIZER.special_tokens.bos, *prompt.tolist()]
    for _ in range(3):
        logits = programs.logits(model, None, sequences(row), compute=FLOAT32)
        row.append(int(np.argmax(logits[0, len(row) - 1])))
    context, continuation = np.array(row[:-3], np.int32), np.array(row[-3:], np.int32)
    other = continuation.copy()
    other[1] = (other[1] + 1) % TOKENIZER.vocab_size
    scores = likelihood.score_tokens(
        model, [TokenPair(context, continuation), TokenPair(context, other)], scoring=SCORING
    )
    assert [score.is_greedy for score in scores] == [True, False]


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_a_bos_that_a_text_spells_is_the_only_one(is_encoder_decoder):
    reading, bos = dataclasses.replace(READING, encoder_bos=True), READING.bos
    for tokens, read in (([bos, 9], [bos, 9]), ([9, bos], [bos, 9, bos]), ([bos], [bos]), ([], [bos])):
        inputs = reading.inputs(np.array(tokens, np.int32), is_encoder_decoder=is_encoder_decoder)
        assert inputs.tolist() == read


def test_the_windows_of_a_text_predict_every_token_once():
    text, first = "abcde", TOKENIZER.first_byte + ord("a")
    a, b, c, d, e = range(first, first + 5)
    bos = TOKENIZER.special_tokens.bos

    def windows(window, context_tokens=1):
        pairs = likelihood.text_windows(READING, text, window, context_tokens)
        return [(pair.context.tolist(), pair.continuation.tolist()) for pair in pairs]

    # as lm_eval.utils.make_disjoint_window(get_rolling_token_windows(…, max_seq_len=3, context_len=1)) gives them
    assert windows(3) == [([bos], [a, b, c]), ([b, c], [d, e])]
    assert windows(2) == [([bos], [a, b]), ([b], [c, d]), ([c, d], [e])]
    assert windows(3, 3) == [([bos], [a, b, c]), ([a, b, c], [d, e])]
    assert windows(9) == [([bos], [a, b, c, d, e])]
    assert likelihood.text_windows(READING, "", 4) == []


@pytest.mark.parametrize("kind", MODELS)
def test_rolling_is_the_sum_over_windows(kind):
    model, text = model_of(kind), "the cat sat on a mat"
    [whole, empty] = likelihood.loglikelihood_rolling(model, [text, ""], window=16, scoring=SCORING)
    windows = likelihood.text_windows(READING, text, 16)
    parts = likelihood.score_tokens(model, windows, scoring=SCORING)
    assert whole.sum == pytest.approx(sum(part.sum for part in parts))
    assert (whole.tokens, whole.text_bytes) == (20, 20)
    assert empty == Likelihood(0, True, 0, 0)
    [short] = likelihood.loglikelihood_rolling(model, [text], window=64, scoring=SCORING)
    assert short.sum == pytest.approx(by_hand(model, "", text)[0], abs=2e-5)


def test_rows_are_filled_up_to_few_lengths():
    lengths = [likelihood.bucket_length(n) for n in (1, 32, 33, 48, 49, 65, 96, 97, 193, 1000)]
    assert lengths == [32, 32, 48, 48, 64, 96, 96, 128, 256, 1024]


def test_each_process_gives_its_rows_of_the_same_batches():
    """The rows of 1, 2 and 4 processes together are one batch; rows past the pairs have weight zero."""
    pairs = [likelihood.encode_pair(READING, *pair, is_encoder_decoder=False) for pair in PAIRS]
    [(numbers, lengths), (last, _)] = likelihood._batches(pairs, [0, 1, 2, 4], 3, False)
    assert sorted([*numbers, *last]) == [0, 1, 2, 4]
    _, decoder, targets, weights_BT = likelihood._arrays([pairs[n] for n in last], lengths, SCORING, False)
    assert decoder.tokens.shape == targets.shape == (4, lengths[1])
    assert weights_BT.sum(axis=1).tolist() == [len(pairs[n].continuation) for n in last] + [0, 0, 0]
    assert decoder.segments[1:].sum() == 0


@pytest.mark.parametrize("text", ["plain", "é € 𝄞 and more", ""])
def test_bytes_of_tokens_add_up_to_the_text(text):
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.byte_counts(tokens).sum() == len(text.encode())
    special = TOKENIZER.special_tokens
    assert TOKENIZER.byte_counts([[special.bos, special.eos], [special.first_sentinel, 9999]]).tolist() == [[0, 0]] * 2
