import numpy as np
import pytest

from t5g2.core.errors import UserError
from t5g2.objectives import Causal
from tests.objectives.arrays import RNG, SPECIALS, assert_example


def test_the_drawn_example():
    example = Causal()(np.array([11, 12, 13, 14], np.int32), RNG, specials=SPECIALS)
    assert_example(
        example,
        encoder_tokens=[],
        decoder_tokens=[2, 11, 12, 13, 14],
        targets=[11, 12, 13, 14, 1],
        weights=[1, 1, 1, 1, 1],
    )
    assert Causal().lengths(4) == (0, 5)


def test_without_eos():
    example = Causal(eos=False)(np.array([11, 12, 13, 14], np.int32), RNG, specials=SPECIALS)
    assert_example(
        example, encoder_tokens=[], decoder_tokens=[2, 11, 12, 13], targets=[11, 12, 13, 14], weights=[1, 1, 1, 1]
    )
    assert Causal(eos=False).lengths(4) == (0, 4)


def test_it_is_its_only_denoiser():
    assert Causal().only("causal") == Causal()
    assert (Causal().denoisers, Causal().weights, Causal().sentinels_needed(9)) == (("causal",), (1.0,), 0)
    with pytest.raises(UserError, match=r"unknown denoiser 'ul2'\. Allowed: causal"):
        Causal().only("ul2")
