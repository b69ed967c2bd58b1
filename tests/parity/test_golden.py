"""Our models against stored outputs of transformers (make_golden.py): runs everywhere."""

from pathlib import Path

import jax
import numpy as np
import pytest

from tests import weights
from tests.parity import cases
from tests.tiny import FLOAT32

FILE = Path(__file__).parent / "golden" / "logits.npz"


@pytest.fixture(scope="module")
def golden():
    return np.load(FILE)


@pytest.mark.parametrize("name", cases.GOLDEN)
def test_logits(name, golden):
    case = cases.GOLDEN[name]
    assert golden[f"{name}: weights"] == weights.checksum(case.config), "stored outputs are of other weights"
    encoder, decoder = case.streams
    answer = jax.jit(lambda model: model.logits(model.hidden(encoder, decoder, case.images, compute=FLOAT32)))
    got = np.asarray(answer(weights.model(case.config)))
    valid = decoder.segments == 1
    np.testing.assert_allclose(got[valid], golden[name][valid], atol=1e-5, rtol=0)


def test_the_reference_is_the_release_we_name(golden):
    assert str(golden["transformers"]) == "5.23.0"
    assert sum(file.stat().st_size for file in FILE.parent.iterdir()) < 2_000_000
