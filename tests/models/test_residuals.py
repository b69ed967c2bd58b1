"""Arrays that the backward pass keeps of the forward pass, in the traced gradient: nothing is compiled."""

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.core.batch import Sequences
from t5g2.models import build
from t5g2.models.config import EncoderDecoderConfig
from tests import tiny

# no size of a weight has a factor in common with the number of rows
ROWS, S, T = 11, 6, 5
DEEP = {"layers": 4}
MODELS = {
    "gemma2": replace(tiny.GEMMA2, **DEEP),
    "t5gemma": replace(
        tiny.T5GEMMA, encoder=replace(tiny.T5GEMMA.encoder, **DEEP), decoder=replace(tiny.T5GEMMA.decoder, **DEEP)
    ),
    "t5gemma2": replace(
        tiny.T5GEMMA2, encoder=replace(tiny.GEMMA3_IMAGES, **DEEP), decoder=replace(tiny.GEMMA3, **DEEP)
    ),
}


def tokens(length: int) -> Sequences:
    return Sequences(*(np.ones((ROWS, length), np.int32) for _ in range(3)))


def scans(jaxpr) -> Iterator:
    """The loops of a program, also of the programs within it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for value in equation.params.values():
            if (inner := getattr(value, "jaxpr", value)) is not value or hasattr(value, "eqns"):
                yield from scans(inner)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loop_over_layers_stacks_no_copy_of_a_weight(name, dtype):
    config = MODELS[name]
    paired = isinstance(config, EncoderDecoderConfig)
    images = jnp.zeros((ROWS, 1, 16, 16, 3)) if config.image_stack.images else None

    def loss(model):
        compute = replace(tiny.FLOAT32, dtype=dtype)
        hidden_BTD = model.hidden(tokens(S) if paired else None, tokens(T), images, compute=compute)
        return jnp.sum(hidden_BTD.astype(jnp.float32))

    gradient = jax.make_jaxpr(jax.grad(loss))(build.abstract(config))
    loops = [equation for equation in scans(gradient.jaxpr) if not equation.params["reverse"]]
    assert len(loops) == (3 if images is not None else 2 if paired else 1)
    for loop in loops:
        stacked = [variable.aval for variable in loop.outvars]
        assert len(stacked) > 10
        copies = [str(aval) for aval in stacked if aval.size % ROWS]
        assert not copies, f"without an axis of {ROWS} rows, so of weights alone: {copies}"
