import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5g2.core.errors import UserError
from t5g2.objectives import PrefixLM, PrefixLMDecoder
from tests.objectives.arrays import RNG, SPECIALS, assert_example

TOKENS = np.array([11, 12, 13, 14, 15], np.int32)


def test_the_drawn_example():
    assert_example(
        PrefixLM()(TOKENS, RNG, specials=SPECIALS),
        encoder_tokens=[11, 12],
        decoder_tokens=[2, 13, 14, 15],
        targets=[13, 14, 15, 1],
        weights=[1, 1, 1, 1],
    )


def test_a_fixed_share():
    example = PrefixLM(prefix=0.8, eos=False)(TOKENS, RNG, specials=SPECIALS)
    assert_example(example, encoder_tokens=[11, 12, 13, 14], decoder_tokens=[2], targets=[15], weights=[1])


def test_every_uniform_split_is_equally_likely():
    rng = np.random.default_rng(0)
    splits = [len(PrefixLM("uniform")(TOKENS, rng, specials=SPECIALS).encoder_tokens) for _ in range(4000)]
    counts = np.bincount(splits, minlength=6)
    assert counts[0] == counts[5] == 0
    # 1000 each are expected, with a standard deviation of 27
    np.testing.assert_allclose(counts[1:5], 1000, atol=110)


@given(
    length=st.integers(2, 60),
    prefix=st.one_of(st.just("uniform"), st.floats(0.01, 0.99)),
    seed=st.integers(0, 2**32 - 1),
)
def test_encoder_and_targets_are_the_text_and_fit_the_lengths(length, prefix, seed):
    tokens, objective = np.arange(100, 100 + length, dtype=np.int32), PrefixLM(prefix)
    example = objective(tokens, np.random.default_rng(seed), specials=SPECIALS)
    np.testing.assert_array_equal(np.concatenate([example.encoder_tokens, example.targets[:-1]]), tokens)
    assert example.targets[-1] == SPECIALS.eos
    assert len(example.encoder_tokens) > 0
    assert len(example.targets) > 1
    assert len(example.encoder_tokens) <= objective.lengths(length)[0]
    assert len(example.targets) <= objective.lengths(length)[1]


def test_the_drawn_example_of_a_decoder_only_model():
    example = PrefixLMDecoder()(TOKENS, RNG, specials=SPECIALS)
    assert_example(
        example,
        encoder_tokens=[],
        decoder_tokens=[2, 11, 12, 13, 14, 15],
        targets=[11, 12, 13, 14, 15, 1],
        weights=[0, 0, 1, 1, 1, 1],
    )
    assert example.blocks.dtype == np.int32
    np.testing.assert_array_equal(example.blocks, [1, 1, 1, 0, 0, 0])


@given(
    length=st.integers(2, 60),
    prefix=st.one_of(st.just("uniform"), st.floats(0.01, 0.99)),
    seed=st.integers(0, 2**32 - 1),
    eos=st.booleans(),
)
def test_both_ask_for_the_same_targets_of_the_same_example(length, prefix, seed, eos):
    """And no counted target is an input of the block that sees it."""
    tokens = np.arange(100, 100 + length, dtype=np.int32)
    one, other = PrefixLM(prefix, eos), PrefixLMDecoder(prefix, eos)
    with_encoder = one(tokens, np.random.default_rng(seed), specials=SPECIALS)
    alone = other(tokens, np.random.default_rng(seed), specials=SPECIALS)
    np.testing.assert_array_equal(alone.targets[alone.weights > 0], with_encoder.targets)
    np.testing.assert_array_equal(alone.decoder_tokens[alone.blocks > 0][1:], with_encoder.encoder_tokens)
    counted = set(alone.targets[alone.weights > 0].tolist())
    assert not counted & set(alone.decoder_tokens[alone.blocks > 0].tolist())
    assert len(alone.targets) <= other.lengths(length)[1]
    assert (other.uses_blocks, one.uses_blocks, other.lengths(length)[0]) == (True, False, 0)


@pytest.mark.parametrize("prefix", [0.0, 1.0, -0.5])
def test_a_share_is_between_0_and_1(prefix):
    with pytest.raises(UserError, match=rf"prefix = {prefix}; it is a share of the tokens between 0 and 1"):
        PrefixLM(prefix)
