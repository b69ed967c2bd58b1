"""Shared by the objectives' tests: literal special ids and the comparison with drawn arrays."""

import numpy as np
from hypothesis import settings

from t5g2.core.batch import Example
from t5g2.core.special_tokens import SpecialTokens

SPECIALS = SpecialTokens(pad=0, eos=1, bos=2, unk=3, mask=4, first_sentinel=90, sentinels=10)
RNG = np.random.default_rng(0)

# the same cases in every run, on a busy machine too
repeatable = settings(derandomize=True, deadline=None)


def assert_example(example: Example, *, encoder_tokens, decoder_tokens, targets, weights) -> None:
    """The arrays are these, and of the types that the contract says."""
    expected = {
        "encoder_tokens": np.array(encoder_tokens, np.int32),
        "decoder_tokens": np.array(decoder_tokens, np.int32),
        "targets": np.array(targets, np.int32),
        "weights": np.array(weights, np.float32),
    }
    for name, array in expected.items():
        got = getattr(example, name)
        assert got.dtype == array.dtype, name
        np.testing.assert_array_equal(got, array, err_msg=name)
