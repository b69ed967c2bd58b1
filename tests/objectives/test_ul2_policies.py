"""UL2's settings: what stands for spans, mode tokens, EOS on either side, splits, what the weights are shares of."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5g2.core.errors import UserError
from t5g2.core.special_tokens import SpecialTokens
from t5g2.data.config import DataConfig, Source
from t5g2.data.sources.python_text import PythonText
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.objectives import T5GEMMA2, UL2, UL2_ORIGINAL, Denoiser, SpanCorruption, UL2Original
from tests.objectives.arrays import SPECIALS, assert_example, repeatable
from tests.objectives.test_ul2 import MANY, TOKENS, Drawn

TWO = dataclasses.replace(SPECIALS, sentinels=2)
MODES = (("NLU", 50), ("NLU", 51), ("S2S", 52), ("NLG", 53))
SPANS = Denoiser("spans", rate=0.5, mean_span=2.5, mode="NLU")


def test_the_drawn_mask_and_mode_tokens():
    ul2 = UL2((SPANS,), sentinels="mask", encoder_eos=True, mode_tokens=MODES[:2])
    drawn = {
        "encoder_tokens": [50, 51, 11, 12, 4, 15, 16, 17, 4, 1],
        "decoder_tokens": [2, 4, 13, 14, 4, 18, 19, 20],
        "targets": [4, 13, 14, 4, 18, 19, 20, 1],
    }
    example = ul2(TOKENS, Drawn(0.3, [1], [1]), special_tokens=SPECIALS)
    assert_example(example, **drawn, weights=[1, 1, 1, 1, 1, 1, 1, 1])
    silent = dataclasses.replace(ul2, loss_on_sentinels=False)
    example = silent(TOKENS, Drawn(0.3, [1], [1]), special_tokens=SPECIALS)
    assert_example(example, **drawn, weights=[0, 1, 1, 0, 1, 1, 1, 1])


def test_the_drawn_sentinels_that_begin_again():
    ul2 = UL2((Denoiser("spans", rate=0.3, mean_span=1.0),), sentinels="cyclic", eos=False)
    assert_example(
        ul2(TOKENS, Drawn(0.3, [0, 1], [0, 1]), special_tokens=TWO),
        encoder_tokens=[11, 90, 13, 91, 15, 16, 17, 18, 19, 90],
        decoder_tokens=[2, 90, 12, 91, 14, 90],
        targets=[90, 12, 91, 14, 90, 20],
        weights=[1, 1, 1, 1, 1, 1],
    )
    assert TWO.cyclic_sentinel_ids(5).tolist() == [90, 91, 90, 91, 90]
    assert TWO.cyclic_sentinel_ids(0).dtype == TWO.sentinel_ids(0).dtype == np.int32


def test_one_span_is_the_end_of_the_text_behind_a_sentinel():
    """As the prompts of the original UL2's S-denoiser end."""
    objective = UL2Original().only("suffix_r25")
    assert_example(
        objective(np.arange(11, 19, dtype=np.int32), np.random.default_rng(0), special_tokens=SPECIALS),
        encoder_tokens=[11, 12, 13, 14, 15, 16, 90],
        decoder_tokens=[2, 90, 17, 18],
        targets=[90, 17, 18, 1],
        weights=[1, 1, 1, 1],
    )


def test_the_original_seven():
    seven = [(t.mean_span, t.rate, t.mode) for t in UL2_ORIGINAL]
    assert seven == [
        (3.0, 0.15, "NLU"),
        (8.0, 0.15, "NLU"),
        (None, 0.25, "S2S"),
        (3.0, 0.5, "NLG"),
        (8.0, 0.5, "NLG"),
        (64.0, 0.15, "NLG"),
        (64.0, 0.5, "NLG"),
    ]
    assert UL2_ORIGINAL[2].count == 1
    assert UL2Original().weights == (1 / 7,) * 7
    tokens = np.arange(100, 400, dtype=np.int32)
    for task in UL2_ORIGINAL:
        plain, moded = UL2Original().only(task.name), UL2Original(mode_tokens=MODES).only(task.name)
        one, other = (o(tokens, np.random.default_rng(3), special_tokens=MANY) for o in (plain, moded))
        mode = [token for name, token in MODES if name == task.mode]
        assert other.encoder_tokens.tolist() == mode + one.encoder_tokens.tolist()
        assert other.targets.tolist() == one.targets.tolist()


@pytest.mark.parametrize(("policy", "needed"), [("distinct", 819), ("cyclic", 1), ("mask", 0)])
def test_how_many_sentinels_16384_tokens_take(policy, needed):
    ul2 = UL2(sentinels=policy)
    assert ul2.sentinels_needed(16384) == needed
    alone = [ul2.only(task.name).sentinels_needed(16384) for task in T5GEMMA2]
    assert alone == [min(needed, n) for n in (819, 683, 77, 256, 0)]
    source = (Source(PythonText(), ul2),)
    lengths = {"rows": 1, "streams": 1, "encoder_length": 16384, "decoder_length": 16384, "chunk_tokens": 16384}
    DataConfig(source, Bytes(sentinels=needed), **lengths)
    if needed:
        with pytest.raises(UserError, match=rf"takes up to {needed} sentinels, and the tokenizer has {needed - 1}; "):
            DataConfig(source, Bytes(sentinels=needed - 1), **lengths)


def test_the_ways_out_of_too_few_sentinels():
    lengths = {"rows": 1, "streams": 1, "encoder_length": 512, "decoder_length": 512, "chunk_tokens": 512}
    with pytest.raises(UserError) as error:
        DataConfig((Source(PythonText(), UL2(), name="text"),), Bytes(sentinels=3), **lengths)
    assert str(error.value) == (
        "source 'text': a chunk of chunk_tokens = 512 takes up to 26 sentinels, and the tokenizer has 3; give the "
        "tokenizer 26 sentinels, lower chunk_tokens, choose denoisers with longer spans or a lower rate, or let spans "
        'share them: the objective\'s sentinels = "cyclic" begins again after the last, "mask" takes one token for '
        "every span"
    )
    with pytest.raises(UserError, match="source '0': mode_tokens has 8 for mode 'NLU'; take an id from 0 to 266 that"):
        DataConfig(
            (Source(PythonText(), UL2((SPANS,), sentinels="mask", mode_tokens=(("NLU", 8),))),),
            Bytes(sentinels=3),
            **lengths,
        )


mixtures = st.one_of(
    st.sampled_from([T5GEMMA2, UL2_ORIGINAL]),
    st.lists(
        st.one_of(
            st.builds(dict, rate=st.floats(0.01, 0.99), mean_span=st.floats(1.0, 40.0)),
            st.builds(dict, rate=st.floats(0.01, 0.99), count=st.integers(1, 40)),
            st.builds(dict, rate=st.one_of(st.just("uniform"), st.floats(0.01, 0.99))),
        ),
        min_size=1,
        max_size=3,
    ).map(lambda fields: tuple(Denoiser(str(i), mode="NLU", **f) for i, f in enumerate(fields))),
)


@repeatable
@given(
    tasks=mixtures,
    length=st.integers(2, 300),
    shorter=st.integers(0, 100),
    seed=st.integers(0, 2**32 - 1),
    moded=st.booleans(),
    settings=st.fixed_dictionaries(
        {
            "loss_on_sentinels": st.booleans(),
            "eos": st.booleans(),
            "encoder_eos": st.booleans(),
            "sentinels": st.sampled_from(["distinct", "cyclic", "mask"]),
            "mixing": st.sampled_from(["examples", "tokens"]),
        }
    ),
)
def test_every_policy_rebuilds_the_text_and_fits_the_lengths(tasks, length, shorter, seed, moded, settings):
    used = {task.mode for task in tasks}
    ul2 = UL2(tasks, mode_tokens=tuple(p for p in MODES if p[0] in used) if moded else (), **settings)
    special_tokens = dataclasses.replace(MANY, sentinels=max(ul2.sentinels_needed(length), 1))
    ul2.check_tokenizer(special_tokens, 20_000)
    tokens = np.arange(100, 100 + max(2, length - shorter), dtype=np.int32)
    example = ul2(tokens, np.random.default_rng(seed), special_tokens=special_tokens)
    task = ul2.tasks[example.denoiser]

    read = example.encoder_tokens.tolist()
    before = [token for mode, token in ul2.mode_tokens if mode == task.mode]
    assert read[: len(before)] == before
    assert read[len(read) - ul2.encoder_eos :] == [special_tokens.eos] * ul2.encoder_eos
    read = read[len(before) : len(read) - ul2.encoder_eos]
    asked = example.targets.tolist()
    assert asked[len(asked) - ul2.eos :] == [special_tokens.eos] * ul2.eos
    asked = asked[: len(asked) - ul2.eos]
    np.testing.assert_array_equal(rebuilt(read, asked, special_tokens), tokens)

    assert example.decoder_tokens.tolist() == [special_tokens.bos, *example.targets[:-1].tolist()]
    silent = (
        special_tokens.is_sentinel(example.targets)
        if not ul2.loss_on_sentinels
        else np.zeros(len(example.targets), bool)
    )
    np.testing.assert_array_equal(example.weights, 1.0 - silent)
    encoder, decoder = ul2.lengths(length)
    assert len(example.encoder_tokens) <= encoder
    assert len(example.targets) <= decoder
    for array in (example.encoder_tokens, example.decoder_tokens, example.targets):
        assert array.dtype == np.int32


def rebuilt(read: list[int], asked: list[int], special_tokens: SpecialTokens) -> list[int]:
    """The text: the encoder's input, each sentinel replaced by the next span, whose own sentinel is the same one."""
    begins = [i for i, token in enumerate(asked) if special_tokens.is_sentinel(np.array(token))]
    if not begins:
        return read + asked
    assert begins[0] == 0
    spans = [asked[b:e] for b, e in zip(begins, [*begins[1:], len(asked)], strict=True)]
    text = []
    for token in read:
        if special_tokens.is_sentinel(np.array(token)):
            sentinel, *span = spans.pop(0)
            assert sentinel == token
            text += span
        else:
            text.append(token)
    assert not spans
    return text


@pytest.mark.parametrize("loss_on_sentinels", [True, False])
@pytest.mark.parametrize("tasks", [T5GEMMA2, UL2_ORIGINAL, (*T5GEMMA2[:2], Denoiser("any", rate="uniform"))])
def test_weights_are_shares_of_the_targets_that_count(tasks, loss_on_sentinels):
    """Over texts of any lengths; with mixing="examples" they are far from it."""
    shares = {}
    for mixing in ("tokens", "examples"):
        ul2 = UL2(tasks, mixing=mixing, loss_on_sentinels=loss_on_sentinels)
        rng, counted = np.random.default_rng(11), np.zeros((6000, len(tasks)))
        for k, length in enumerate(rng.integers(32, 400, len(counted))):
            example = ul2(np.zeros(length, np.int32), np.random.default_rng([11, k]), special_tokens=MANY)
            counted[k, example.denoiser] = example.weights.sum()
        totals = counted.sum(axis=1, keepdims=True)
        shares[mixing] = counted.sum(axis=0) / totals.sum()
        # of a ratio of sums, to first order
        deviation = np.sqrt(np.sum((counted - ul2.weights * totals) ** 2, axis=0)) / totals.sum()
        beyond = np.abs(shares[mixing] - ul2.weights) / deviation
        assert np.all(beyond < 4) if mixing == "tokens" else np.any(beyond > 10), (mixing, beyond)


@repeatable
@given(length=st.integers(2, 20_000))
def test_a_denoiser_is_drawn_by_weight_over_targets(length):
    """1 token in 8 of each of the first four tasks, 1 in 2 of the suffix, whatever the length."""
    ul2 = UL2(mixing="tokens")
    counted = [task.noise_tokens(length) + task.sentinels(length) + 1 for task in T5GEMMA2]
    tokens = np.array(ul2.chances(length)) * counted
    np.testing.assert_allclose(tokens / tokens.sum(), [1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 2])
    assert sum(ul2.chances(length)) == pytest.approx(1.0)
    assert UL2().chances(length) == UL2().weights == ul2.weights


def test_every_split_of_a_uniform_suffix_is_equally_likely():
    ul2 = UL2((Denoiser("any", rate="uniform"),))
    kept = [
        len(ul2(TOKENS, np.random.default_rng([4, k]), special_tokens=SPECIALS).encoder_tokens) for k in range(4500)
    ]
    counts = np.bincount(kept, minlength=11)
    assert counts[0] == counts[10] == 0
    # 500 each are expected, with a standard deviation of 21
    np.testing.assert_allclose(counts[1:10], 500, atol=85)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": "uniform", "mean_span": 3.0}, "denoiser 'x' has rate \"uniform\" and spans; give a number, or leave"),
        ({"rate": "uniform", "count": 3}, "denoiser 'x' has rate \"uniform\" and spans; give a number, or leave"),
        ({"mean_span": 3.0, "count": 2}, "denoiser 'x' has mean_span 3.0 and count 2; one follows from the other"),
        ({"count": 0}, "count = 0; it must be at least 1"),
    ],
)
def test_a_denoiser_that_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        Denoiser(**{"name": "x", "rate": 0.5} | fields)


def test_modes_that_cannot_be():
    with pytest.raises(UserError, match="mode_tokens has no id for NLG, S2S; give every mode of the"):
        UL2Original(mode_tokens=(("NLU", 50),))
    with pytest.raises(UserError, match="unknown mode 'NLX' in mode_tokens; did you mean"):
        UL2Original(mode_tokens=(*MODES, ("NLX", 54)))
    with pytest.raises(UserError, match="mode_tokens has 90 for mode 'NLU'; take an id from 0 to 199 that is neither"):
        UL2((SPANS,), mode_tokens=(("NLU", 90),)).check_tokenizer(SPECIALS, 200)
    with pytest.raises(UserError, match="mode_tokens has 200 for mode 'NLU'; take an id from 0 to 199"):
        UL2((SPANS,), mode_tokens=(("NLU", 200),)).check_tokenizer(SPECIALS, 200)


def test_a_tokenizer_without_a_mask_or_without_sentinels():
    nothing = dataclasses.replace(SPECIALS, mask=-1, sentinels=0)
    with pytest.raises(UserError, match=r'sentinels = "mask", and the tokenizer has no mask token; set its id'):
        SpanCorruption(sentinels="mask").check_tokenizer(nothing, 200)
    with pytest.raises(UserError, match="needs sentinels for 1 spans and the tokenizer has none"):
        SpanCorruption(sentinels="cyclic")(TOKENS, np.random.default_rng(0), special_tokens=nothing)
    UL2((Denoiser("suffix", rate=0.5),), sentinels="mask").check_tokenizer(nothing, 200)
    assert not nothing.is_sentinel(np.array([-1, 4, 90])).any()
    assert SPECIALS.is_sentinel(np.array([3, 4, 89, 90, 99, 100])).tolist() == [False, True, False, True, True, False]


@pytest.mark.parametrize(
    ("changes", "prompt", "asked"),
    [
        ({}, [10, 11, 90, 14, 91, 17], [90, 12, 13, 91, 15, 16]),
        ({"sentinels": "mask"}, [10, 11, 4, 14, 4, 17], [4, 12, 13, 4, 15, 16]),
        (
            {"encoder_eos": True, "mode_tokens": MODES[:2]},
            [50, 51, 10, 11, 90, 14, 91, 17, 1],
            [90, 12, 13, 91, 15, 16],
        ),
    ],
)
def test_a_prompt_with_gaps_is_an_encoder_input_of_the_training(changes, prompt, asked):
    got = UL2((SPANS,), **changes).infilling(np.arange(10, 18), [2, 5], 2, special_tokens=SPECIALS)
    assert got is not None
    assert [part.tolist() for part in got] == [prompt, asked]


def test_no_prompt_with_gaps_of_what_takes_none_away():
    how = {"tokens": np.arange(10, 18), "starts": [2, 5], "span": 2}
    assert UL2().only("suffix_r75").infilling(**how, special_tokens=SPECIALS) is None
    assert UL2((SPANS,)).infilling(**how, special_tokens=dataclasses.replace(SPECIALS, sentinels=1)) is None
    assert UL2((SPANS,), sentinels="cyclic").infilling(**how, special_tokens=dataclasses.replace(SPECIALS, sentinels=1))
