"""Texts with images: what is read ends with the last image, what is asked for is the rest."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5g2.core.errors import UserError
from t5g2.data import image_tokens
from t5g2.data.image_tokens import ImageRows
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.objectives import MultimodalPrefixLM, MultimodalPrefixLMDecoder, PrefixLM, PrefixLMDecoder
from tests.objectives.arrays import RNG, assert_example, repeatable
from tests.objectives.arrays import SPECIALS as TEXT

SPECIALS = dataclasses.replace(TEXT, others=(5, 6, 7), image=7, end_of_image=6)
BOTH = (MultimodalPrefixLM, MultimodalPrefixLMDecoder)


def ints(*tokens):
    return np.array(tokens, np.int32)


def test_the_drawn_example():
    assert_example(
        MultimodalPrefixLM()(ints(10, 5, 7, 7, 6, 11, 5, 7, 7, 6, 12, 13), RNG, special_tokens=SPECIALS),
        encoder_tokens=[10, 5, 7, 7, 6, 11, 5, 7, 7, 6],
        decoder_tokens=[2, 12, 13],
        targets=[12, 13, 1],
        weights=[1, 1, 1],
    )


def test_the_drawn_example_of_a_decoder_only_model():
    example = MultimodalPrefixLMDecoder()(ints(10, 5, 7, 7, 6, 11, 12), RNG, special_tokens=SPECIALS)
    assert_example(
        example,
        encoder_tokens=[],
        decoder_tokens=[2, 10, 5, 7, 7, 6, 11, 12],
        targets=[10, 5, 7, 7, 6, 11, 12, 1],
        weights=[0, 0, 0, 0, 0, 1, 1, 1],
    )
    assert example.blocks is not None
    assert example.blocks.tolist() == [1, 1, 1, 1, 1, 1, 0, 0]


def test_without_a_token_behind_it_an_image_ends_with_its_last():
    bare = dataclasses.replace(SPECIALS, end_of_image=-1)
    for tokens, special_tokens, read in (
        (ints(10, 7, 7, 11), SPECIALS, 3),
        (ints(10, 5, 7, 7, 6, 11), bare, 4),
        (ints(7, 11, 6), SPECIALS, 1),
    ):
        assert len(MultimodalPrefixLM()(tokens, RNG, special_tokens=special_tokens).encoder_tokens) == read


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=12)


@pytest.mark.parametrize("objective", BOTH)
@repeatable
@given(parts=st.lists(TEXTS, min_size=1, max_size=4), tokens=st.sampled_from([1, 4, 9]), seed=st.integers(0, 2**16))
def test_inputs_and_targets_are_the_text_and_images_are_never_targets(objective, parts, tokens, seed):
    parts[-1] += "!!"  # something follows
    rows = ImageRows(per_row=3, size=16, tokens=tokens, token=7, begin=5, end=6)
    chunk, tokenizer = image_tokens.encode(Bytes().encode, parts, rows), Bytes()
    made = objective()(chunk, np.random.default_rng(seed), special_tokens=tokenizer.special_tokens)
    together = np.concatenate([made.encoder_tokens, made.targets[:-1]])
    np.testing.assert_array_equal(together, chunk)
    counted = made.targets[made.weights > 0]
    assert not np.isin(counted, (5, 6, 7)).any()
    assert counted[-1] == tokenizer.special_tokens.eos
    encoder, decoder = objective().lengths(len(chunk))
    assert len(made.encoder_tokens) <= encoder
    assert len(made.targets) <= decoder
    if len(parts) > 1:
        assert tokenizer.decode(counted[:-1]) == "\n\n" + parts[-1]
    np.testing.assert_array_equal(chunk[made.origins[made.origins >= 0]], made.targets[made.origins >= 0])


@pytest.mark.parametrize(("ours", "texts"), list(zip(BOTH, (PrefixLM, PrefixLMDecoder), strict=True)))
def test_a_text_without_images_is_split_as_a_text(ours, texts):
    for fields in ({}, {"prefix": "uniform"}, {"prefix": 0.25, "eos": False}):
        made, expected = (
            of(**fields)(ints(11, 12, 13, 14, 15, 16), np.random.default_rng(3), special_tokens=SPECIALS)
            for of in (ours, texts)
        )
        for name in ("encoder_tokens", "decoder_tokens", "targets", "weights", "blocks"):
            np.testing.assert_array_equal(getattr(made, name), getattr(expected, name))


@pytest.mark.parametrize("objective", BOTH)
def test_what_it_cannot_do_is_an_error(objective):
    with pytest.raises(UserError, match="a chunk of 4 tokens ends with an image, so there is no target"):
        objective()(ints(10, 7, 7, 6), RNG, special_tokens=SPECIALS)
    with pytest.raises(
        UserError, match=r'no image token; set the id that the model uses for it: .*ids = \[\["image", 256'
    ):
        objective().check_tokenizer(TEXT, 97)
    objective().check_tokenizer(Bytes().special_tokens, Bytes().vocab_size)
    assert objective().only("multimodal") == objective()
    with pytest.raises(UserError, match="unknown denoiser 'prefix_lm'"):
        objective().only("prefix_lm")
