"""Programs that several tests run: with everything as arguments, what differs in values alone is compiled once."""

from functools import partial

import jax


@partial(jax.jit, static_argnames="compute")
def logits(model, encoder, decoder, images=None, *, compute):
    """The logits of every decoder token."""
    return model.logits(model.hidden(encoder, decoder, images, compute=compute))


@partial(jax.jit, static_argnames="compute")
def hidden(model, encoder, decoder, *, compute):
    """The states of every decoder token."""
    return model.hidden(encoder, decoder, compute=compute)
