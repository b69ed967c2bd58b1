"""The shapes that signatures promise hold: every call of a forward, backward and decoding pass is checked.

They are checked where a pass is traced, so nothing is compiled.
"""

import subprocess
import sys

import pytest

PROGRAM = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
from jaxtyping import install_import_hook

with install_import_hook("t5g2.models", "beartype.beartype"):
    import jax
    import jax.numpy as jnp
    from t5g2.core.batch import Sequences
    from t5g2.models import build
    from t5g2.models.config import TextConfig
    from t5g2.models.layers import Compute
    from t5g2.models.loss import cross_entropy
    from t5g2.models.loss_config import LossConfig
    from tests import tiny

compute, T, S = Compute(dtype="float32"), 6, 9
def sequences(length):
    ones = jnp.ones((2, length), jnp.int32)
    return Sequences(ones, ones, jnp.tile(jnp.arange(length, dtype=jnp.int32), (2, 1)))

for config in (tiny.GEMMA3, tiny.GEMMA2, tiny.T5GEMMA2, tiny.T5GEMMA):
    model = build.abstract(config)
    encoder = None if isinstance(config, TextConfig) else sequences(S)
    def loss(model):
        hidden = model.hidden(encoder, sequences(T), compute=compute)
        weights = jnp.ones((2, T), jnp.float32)
        return cross_entropy(hidden, model.head(), sequences(T).tokens, weights, LossConfig(tile_tokens=4)).total
    assert jax.eval_shape(jax.value_and_grad(loss), model)[0].shape == ()
    def decoded(model):
        cache = model.start_cache(2, T, encoder=encoder, compute=compute)
        hidden, cache = model.extend(sequences(T), cache, compute=compute)
        return model.logits(hidden)
    assert jax.eval_shape(decoded, model).shape == (2, T, tiny.GEMMA3.vocab_size)
try:
    jax.eval_shape(lambda model: model.logits(jnp.ones((2, T), jnp.float32)), build.abstract(tiny.GEMMA3))
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.long
def test_annotated_shapes_hold_and_are_checked():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "TypeCheckError"
