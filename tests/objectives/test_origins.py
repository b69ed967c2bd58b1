"""The place of every target in the text, by which a teacher that has read the text is asked about it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5g2.core import pairs
from t5g2.objectives import (
    UL2,
    Causal,
    PrefixLM,
    PrefixLMDecoder,
    Seq2Seq,
    SpanCorruption,
    SupervisedFineTuning,
    SupervisedFineTuningDecoder,
    UL2Original,
)
from tests.objectives.arrays import SPECIALS, repeatable

TURNS = {"starts": (50, 51), "ends": (60,)}
OBJECTIVES = {
    "causal": Causal(),
    "causal, context": Causal(eos=False, context=0.5),
    "prefix_lm": PrefixLM(prefix="uniform"),
    "prefix_lm_decoder": PrefixLMDecoder(eos=False),
    "ul2": UL2(sentinels="cyclic"),
    "ul2, mask": UL2(sentinels="mask", encoder_eos=True, eos=False),
    "ul2_original": UL2Original(sentinels="cyclic"),
    "span_corruption": SpanCorruption(sentinels="cyclic"),
    "seq2seq": Seq2Seq(200, 200),
    "seq2seq, eos": Seq2Seq(200, 200, eos=True),
    "sft": SupervisedFineTuning(**TURNS),
    "sft, all": SupervisedFineTuning(**TURNS, turns="all"),
    "sft_decoder": SupervisedFineTuningDecoder(**TURNS, both_ways=True),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@repeatable
@given(length=st.integers(8, 120), cut=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_a_target_is_the_token_of_the_text_that_it_says(name, length, cut, seed):
    """And what is nowhere in the text is a special token; every token of the text is asked for at most once."""
    objective, rng = OBJECTIVES[name], np.random.default_rng(seed)
    tokens = rng.integers(100, 1000, length).astype(np.int32)  # none of them special
    if objective.takes_pairs:
        tokens = pairs.join(tokens[:cut], tokens[cut:])
    if name.startswith("sft"):
        tokens = np.concatenate([[50, 51], tokens[:cut], [60, 50, 51], tokens[cut:], [60, 13]]).astype(np.int32)
    example = objective(tokens, rng, special_tokens=SPECIALS)
    assert example.origins is not None
    assert (example.origins.dtype, example.origins.shape) == (np.int32, example.targets.shape)
    text, there = objective.text(tokens), example.origins >= 0
    np.testing.assert_array_equal(text[example.origins[there]], example.targets[there])
    assert len(set(example.origins[there].tolist())) == there.sum() > 0
    strangers = example.targets[~there]
    assert (SPECIALS.is_sentinel(strangers) | (strangers == SPECIALS.eos)).all()
    if not name.startswith("sft"):
        assert not SPECIALS.is_special(example.targets[there]).any()
