"""Fixtures of the tests of checkpoints."""

import jax.numpy as jnp
import pytest

from t5g2.checkpoint.export_folder import export_model
from tests.checkpoint.foreign_folders import save


@pytest.fixture
def hugging_face(tmp_path):
    """A function: a Hugging Face folder of a tiny model, which the test may damage."""

    def make(config, dtype=jnp.float32):
        export_model(save(tmp_path / "ours", config, dtype), tmp_path / "theirs")
        return tmp_path / "theirs"

    return make
