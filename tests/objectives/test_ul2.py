"""UL2: the arrays as drawn, the text rebuilt from them, and rates, spans and shares as asked for."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5g2.core.errors import UserError
from t5g2.core.special_tokens import SpecialTokens
from t5g2.objectives import T5GEMMA2, UL2, Denoiser
from t5g2.objectives.spans import corrupt, random_parts
from t5g2.objectives.teacher_forcing import teacher_forced
from tests.objectives.arrays import SPECIALS, assert_example, repeatable

TOKENS = np.arange(11, 21, dtype=np.int32)
MANY = SpecialTokens(pad=0, eos=1, bos=2, unk=3, mask=4, first_sentinel=10_000, sentinels=10_000)


class Drawn:
    """A generator whose draws are written down: which task, then the cuts of the kept and of the removed tokens."""

    def __init__(self, task: float, *cuts: list[int]):
        self._task, self._cuts = task, list(cuts)

    def random(self) -> float:
        return self._task

    def choice(self, items: int, count: int, **_) -> np.ndarray:
        cuts = np.array(self._cuts.pop(0), np.int64)
        assert len(cuts) == count
        assert np.all(cuts < items)
        return cuts


def test_the_drawn_spans():
    # half of 10 tokens in spans of 2.5 on average: two spans; both parts of 5 are cut after their second token
    ul2 = UL2((Denoiser("spans", rate=0.5, mean_span=2.5),))
    drawn = {
        "encoder_tokens": [11, 12, 90, 15, 16, 17, 91],
        "decoder_tokens": [2, 90, 13, 14, 91, 18, 19, 20],
        "targets": [90, 13, 14, 91, 18, 19, 20, 1],
    }
    example = ul2(TOKENS, Drawn(0.3, [1], [1]), special_tokens=SPECIALS)
    assert_example(example, **drawn, weights=[1, 1, 1, 1, 1, 1, 1, 1])
    silent = dataclasses.replace(ul2, loss_on_sentinels=False)
    example = silent(TOKENS, Drawn(0.3, [1], [1]), special_tokens=SPECIALS)
    assert_example(example, **drawn, weights=[0, 1, 1, 0, 1, 1, 1, 1])


def test_the_drawn_suffix():
    example = UL2().only("suffix_r75")(np.arange(11, 19, dtype=np.int32), Drawn(0.3), special_tokens=SPECIALS)
    assert_example(
        example,
        encoder_tokens=[11, 12],
        decoder_tokens=[2, 13, 14, 15, 16, 17, 18],
        targets=[13, 14, 15, 16, 17, 18, 1],
        weights=[1] * 7,
    )


def test_the_drawn_corruption():
    encoder, targets, origins = corrupt(TOKENS, np.array([2, 3]), np.array([2, 3]), np.array([90, 91]))
    np.testing.assert_array_equal(encoder, [11, 12, 90, 15, 16, 17, 91])
    np.testing.assert_array_equal(targets, [90, 13, 14, 91, 18, 19, 20])
    np.testing.assert_array_equal(origins, [-1, 2, 3, -1, 7, 8, 9])


def test_the_drawn_parts():
    assert random_parts(7, 3, Drawn(0.0, [2, 1])).tolist() == [2, 1, 4]
    assert random_parts(7, 1, np.random.default_rng(0)).tolist() == [7]
    assert random_parts(4, 4, np.random.default_rng(0)).tolist() == [1, 1, 1, 1]


def test_the_drawn_shift():
    targets, origins = np.array([14, 15], np.int32), np.array([3, 4])
    example = teacher_forced(np.empty(0, np.int32), targets, origins, special_tokens=SPECIALS, eos=True)
    assert_example(example, encoder_tokens=[], decoder_tokens=[2, 14, 15], targets=[14, 15, 1], weights=[1, 1, 1])
    assert example.origins is not None
    assert (example.origins.dtype, example.origins.tolist()) == (np.int32, [3, 4, -1])


def rebuilt(example, special_tokens) -> np.ndarray:
    """The text that a reader of the encoder's input and of the targets would write down."""
    targets = example.targets[:-1]  # without EOS
    starts = np.flatnonzero(special_tokens.is_sentinel(targets))
    if not len(starts):
        return np.concatenate([example.encoder_tokens, targets])
    spans = {int(part[0]): part[1:] for part in np.split(targets, starts[1:])}
    return np.concatenate([spans.get(token, [token]) for token in example.encoder_tokens.tolist()])


@repeatable
@given(length=st.integers(2, 400), seed=st.integers(0, 2**32 - 1))
def test_inputs_and_targets_rebuild_the_text(length, seed):
    tokens, ul2 = np.arange(100, 100 + length, dtype=np.int32), UL2()
    example = ul2(tokens, np.random.default_rng(seed), special_tokens=MANY)
    np.testing.assert_array_equal(rebuilt(example, MANY), tokens)
    task = ul2.tasks[example.denoiser]
    taken = example.targets[:-1][~MANY.is_sentinel(example.targets[:-1])]
    assert len(taken) == task.noise_tokens(length)
    assert np.all(np.diff(taken) > 0)
    sentinels = example.targets[MANY.is_sentinel(example.targets)]
    np.testing.assert_array_equal(sentinels, MANY.sentinel_ids(task.sentinels(length)))
    assert example.decoder_tokens[0] == MANY.bos
    np.testing.assert_array_equal(example.decoder_tokens[1:], example.targets[:-1])
    assert example.targets[-1] == MANY.eos


@repeatable
@given(length=st.integers(2, 3000), shorter=st.integers(0, 500), seed=st.integers(0, 2**32 - 1))
def test_lengths_and_sentinels_bound_every_shorter_text(length, shorter, seed):
    ul2, tokens = UL2(), np.zeros(max(2, length - shorter), np.int32)
    example = ul2(tokens, np.random.default_rng(seed), special_tokens=MANY)
    encoder, decoder = ul2.lengths(length)
    assert len(example.encoder_tokens) <= encoder
    assert len(example.targets) <= decoder
    assert np.sum(MANY.is_sentinel(example.targets)) <= ul2.sentinels_needed(length)


def test_the_mixture_of_t5gemma_2():
    assert [(t.mean_span, t.rate, t.weight) for t in T5GEMMA2] == [
        (3.0, 0.15, 1.0),
        (12.0, 0.5, 1.0),
        (32.0, 0.15, 1.0),
        (32.0, 0.5, 1.0),
        (None, 0.75, 4.0),
    ]
    assert UL2().weights == (0.125, 0.125, 0.125, 0.125, 0.5)
    assert [task.sentinels(16384) for task in T5GEMMA2] == [819, 683, 77, 256, 0]
    assert UL2().sentinels_needed(16384) == 819


def test_rates_spans_and_shares_over_many_documents():
    ul2, documents = UL2(), 4000
    lengths = np.random.default_rng(1).integers(400, 600, documents)
    tokens, taken, spans, drawn = (np.zeros(5) for _ in range(4))
    for k, length in enumerate(lengths):
        example = ul2(np.zeros(length, np.int32), np.random.default_rng([7, k]), special_tokens=MANY)
        is_sentinel = MANY.is_sentinel(example.targets)
        d = example.denoiser
        drawn[d] += 1
        tokens[d] += length
        taken[d] += np.sum(~is_sentinel) - 1
        spans[d] += max(np.sum(is_sentinel), 1)
    # the share of a task of weight w is binomial: four standard deviations
    shares = np.array(ul2.weights)
    assert np.all(np.abs(drawn / documents - shares) < 4 * np.sqrt(shares * (1 - shares) / documents))
    # both are rounded once a document: at most half a token, and half a span, of each
    np.testing.assert_allclose(taken / tokens, [t.rate for t in ul2.tasks], atol=0.5 / 400)
    for task, mean in zip(ul2.tasks, taken / spans, strict=True):
        asked = task.mean_span or 0.75 * lengths.mean()
        fewest = round(400 * task.rate / asked)
        assert abs(mean / asked - 1) < (0.5 / fewest if task.mean_span else 0.02), task


def test_spans_differ_in_length_and_place():
    # every cut is equally likely, so lengths of spans are nearly geometric: of mean 3, with a deviation of sqrt(3 * 2)
    lengths = np.concatenate([random_parts(75, 25, np.random.default_rng([3, k])) for k in range(2000)])
    assert lengths.mean() == 3.0
    assert abs(lengths.std() - np.sqrt(6)) < 0.15
    assert abs(np.mean(lengths == 1) - 1 / 3) < 0.02


def test_one_denoiser_alone():
    only = UL2(loss_on_sentinels=False).only("mu32_r50")
    assert (only.denoisers, only.weights, only.loss_on_sentinels) == (("mu32_r50",), (1.0,), False)
    with pytest.raises(UserError, match=r"unknown denoiser 'mu32_r55'; did you mean 'mu32_r50'"):
        UL2().only("mu32_r55")


def test_more_spans_than_sentinels():
    with pytest.raises(UserError, match="needs 15 sentinels and the tokenizer has 10; give the tokenizer more"):
        UL2().only("mu3_r15")(np.zeros(300, np.int32), np.random.default_rng(0), special_tokens=SPECIALS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 1.0}, "rate = 1.0; it must be above 0 and below 1, or 'uniform'"),
        ({"mean_span": 0.5}, "mean_span = 0.5; it must be at least 1"),
        ({"weight": 0.0}, "weight = 0.0; it must be above 0; to leave the denoiser out, remove it"),
    ],
)
def test_a_denoiser_that_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        Denoiser(**{"name": "x", "rate": 0.5} | fields)


def test_a_mixture_that_cannot_be():
    with pytest.raises(UserError, match="tasks is empty"):
        UL2(())
    with pytest.raises(UserError, match="two denoisers have one name: x, x"):
        UL2((Denoiser("x", rate=0.5), Denoiser("x", rate=0.2)))
