import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5g2.core.errors import UserError
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.objectives import PrefixLM, PrefixLMDecoder
from tests.objectives.arrays import RNG, SPECIALS, assert_example, repeatable

TOKENS = np.array([11, 12, 13, 14, 15], np.int32)


def test_the_drawn_example():
    assert_example(
        PrefixLM()(TOKENS, RNG, special_tokens=SPECIALS),
        encoder_tokens=[11, 12],
        decoder_tokens=[2, 13, 14, 15],
        targets=[13, 14, 15, 1],
        weights=[1, 1, 1, 1],
    )


def test_a_fixed_share():
    example = PrefixLM(prefix=0.8, eos=False)(TOKENS, RNG, special_tokens=SPECIALS)
    assert_example(example, encoder_tokens=[11, 12, 13, 14], decoder_tokens=[2], targets=[15], weights=[1])


def test_every_uniform_split_is_equally_likely():
    rng = np.random.default_rng(0)
    splits = [len(PrefixLM("uniform")(TOKENS, rng, special_tokens=SPECIALS).encoder_tokens) for _ in range(4000)]
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
    example = objective(tokens, np.random.default_rng(seed), special_tokens=SPECIALS)
    np.testing.assert_array_equal(np.concatenate([example.encoder_tokens, example.targets[:-1]]), tokens)
    assert example.targets[-1] == SPECIALS.eos
    assert len(example.encoder_tokens) > 0
    assert len(example.targets) > 1
    assert len(example.encoder_tokens) <= objective.lengths(length)[0]
    assert len(example.targets) <= objective.lengths(length)[1]


def test_the_drawn_example_of_a_decoder_only_model():
    example = PrefixLMDecoder()(TOKENS, RNG, special_tokens=SPECIALS)
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
    with_encoder = one(tokens, np.random.default_rng(seed), special_tokens=SPECIALS)
    alone = other(tokens, np.random.default_rng(seed), special_tokens=SPECIALS)
    np.testing.assert_array_equal(alone.targets[alone.weights > 0], with_encoder.targets)
    np.testing.assert_array_equal(alone.decoder_tokens[alone.blocks > 0][1:], with_encoder.encoder_tokens)
    counted = set(alone.targets[alone.weights > 0].tolist())
    assert not counted & set(alone.decoder_tokens[alone.blocks > 0].tolist())
    assert len(alone.targets) <= other.lengths(length)[1]
    assert (other.uses_blocks, one.uses_blocks, other.lengths(length)[0]) == (True, False, 0)


@pytest.mark.parametrize("prefix", [0.0, 1.0, -0.5])
def test_a_share_is_between_0_and_1(prefix):
    with pytest.raises(UserError, match=rf"prefix = {prefix}; it must be above 0 and below 1, or 'uniform'"):
        PrefixLM(prefix)


BYTES = dataclasses.replace(SPECIALS, first_byte=100, others=(50, 51))


def test_the_drawn_split_that_parts_no_character():
    tokens = np.frombuffer("aéb".encode(), np.uint8).astype(np.int32) + np.int32(100)
    assert tokens.tolist() == [197, 295, 269, 198]
    assert_example(
        PrefixLM(split_at="character")(tokens, RNG, special_tokens=BYTES),
        encoder_tokens=[197],
        decoder_tokens=[2, 295, 269, 198],
        targets=[295, 269, 198, 1],
        weights=[1, 1, 1, 1],
    )
    assert PrefixLM()(tokens, RNG, special_tokens=BYTES).encoder_tokens.tolist() == [197, 295]


@pytest.mark.parametrize(
    ("text", "share", "split"), [("😀a", 0.2, 4), ("a😀", 0.8, 1), ("😀😀", 0.5, 4), ("a😀a", 0.6, 5)]
)
def test_a_split_moves_to_the_nearest_place(text, share, split):
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32) + np.int32(100)
    assert PrefixLM(share, split_at="character").split(tokens, RNG, special_tokens=BYTES) == split


def test_a_split_does_not_part_the_tokens_of_an_image():
    # 50 and 51 are special: places are before the first, after the last, and where a text token stands between
    tokens = np.array([11, 50, 51, 51, 51, 50, 12, 13, 14], np.int32)
    assert PrefixLM(split_at="text").split(tokens, RNG, special_tokens=BYTES) == 6
    assert PrefixLM(0.3, split_at="text").split(tokens, RNG, special_tokens=BYTES) == 1
    assert PrefixLM(split_at="character").split(tokens, RNG, special_tokens=BYTES) == 4
    # none of the places will do
    assert PrefixLM(split_at="text").split(tokens[1:6], RNG, special_tokens=BYTES) == 2


@repeatable
@given(
    text=st.text(min_size=2, max_size=40),
    cut=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    prefix=st.one_of(st.just("uniform"), st.floats(0.01, 0.99)),
    split_at=st.sampled_from(["character", "text"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_both_sides_of_a_split_are_whole_characters(text, cut, prefix, split_at, seed):
    """Of a chunk that begins or ends inside a character too: no other character is parted."""
    tokenizer = Bytes()
    tokens = tokenizer.encode(text)
    tokens = tokens[cut[0] : len(tokens) - cut[1]]
    if len(tokens) < 2:
        return
    for objective in (PrefixLM(prefix, split_at=split_at), PrefixLMDecoder(prefix, split_at=split_at)):
        example = objective(tokens, np.random.default_rng(seed), special_tokens=tokenizer.special_tokens)
        split = objective.split(tokens, np.random.default_rng(seed), special_tokens=tokenizer.special_tokens)
        assert 1 <= split < len(tokens)
        whole = tokenizer.special_tokens.is_continuation(tokens)
        assert not whole[split] or whole[1:].all()
        np.testing.assert_array_equal(np.concatenate([example.encoder_tokens, example.targets[:-1]]), tokens)
        encoder, decoder = objective.lengths(len(tokens))
        assert len(example.encoder_tokens) <= encoder
        assert len(example.targets) <= decoder


@repeatable
@given(tokens=st.lists(st.integers(0, 400), min_size=2, max_size=60), share=st.floats(0.01, 0.99))
def test_the_lengths_bound_splits_of_what_is_no_text_at_all(tokens, share):
    tokens = np.array(tokens, np.int32)
    for split_at in ("token", "character", "text"):
        objective = PrefixLM(share, split_at=split_at)
        example = objective(tokens, RNG, special_tokens=BYTES)
        encoder, decoder = objective.lengths(len(tokens))
        assert 1 <= len(example.encoder_tokens) <= encoder
        assert 2 <= len(example.targets) <= decoder


def test_every_uniform_split_between_characters_is_equally_likely():
    tokens = np.frombuffer("aéb€c".encode(), np.uint8).astype(np.int32) + np.int32(100)
    rng, objective = np.random.default_rng(0), PrefixLM("uniform", split_at="character")
    counts = np.bincount([objective.split(tokens, rng, special_tokens=BYTES) for _ in range(4000)], minlength=8)
    assert np.flatnonzero(counts).tolist() == [1, 3, 4, 7]
    # 1000 each are expected, with a standard deviation of 27
    np.testing.assert_allclose(counts[counts > 0], 1000, atol=110)


def test_characters_of_a_tokenizer_without_bytes():
    with pytest.raises(UserError, match="split_at = 'character', and the tokenizer has no tokens for the 256 bytes"):
        PrefixLM(split_at="character").check_tokenizer(SPECIALS, 400)
    PrefixLM().check_tokenizer(SPECIALS, 400)
    PrefixLMDecoder(split_at="text").check_tokenizer(BYTES, 400)
