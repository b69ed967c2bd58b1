import numpy as np
import pytest

from t5g2.core.errors import UserError
from t5g2.objectives import UL2, Causal
from tests.objectives.arrays import RNG, SPECIALS, assert_example


def test_the_drawn_example():
    example = Causal()(np.array([11, 12, 13, 14], np.int32), RNG, special_tokens=SPECIALS)
    assert_example(
        example,
        encoder_tokens=[],
        decoder_tokens=[2, 11, 12, 13, 14],
        targets=[11, 12, 13, 14, 1],
        weights=[1, 1, 1, 1, 1],
    )
    assert Causal().lengths(4) == (0, 5)


def test_without_eos():
    example = Causal(eos=False)(np.array([11, 12, 13, 14], np.int32), RNG, special_tokens=SPECIALS)
    assert_example(
        example, encoder_tokens=[], decoder_tokens=[2, 11, 12, 13], targets=[11, 12, 13, 14], weights=[1, 1, 1, 1]
    )
    assert Causal(eos=False).lengths(4) == (0, 4)


def test_it_is_its_only_denoiser():
    assert Causal().only("causal") == Causal()
    assert (Causal().denoisers, Causal().weights, Causal().sentinels_needed(9)) == (("causal",), (1.0,), 0)
    with pytest.raises(UserError, match=r"unknown denoiser 'ul2'\. Allowed: causal"):
        Causal().only("ul2")


def test_context_is_read_and_does_not_count():
    example = Causal(context=0.5)(np.array([11, 12, 13, 14], np.int32), RNG, special_tokens=SPECIALS)
    assert example.weights.tolist() == [0, 0, 1, 1, 1]
    assert example.targets.tolist() == [11, 12, 13, 14, 1]
    with pytest.raises(UserError, match=r"context = 1\.0; it must be at least 0 and below 1"):
        Causal(context=1.0)


@pytest.mark.parametrize("length", range(2, 40))
def test_with_context_it_counts_the_very_targets_of_a_suffix(length):
    tokens = np.arange(11, 11 + length, dtype=np.int32)
    causal = Causal(context=0.25)(tokens, RNG, special_tokens=SPECIALS)
    suffix = UL2().only("suffix_r75")(tokens, np.random.default_rng(0), special_tokens=SPECIALS)
    assert causal.targets[causal.weights > 0].tolist() == suffix.targets.tolist()
