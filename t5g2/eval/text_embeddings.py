"""Embeddings of texts by a language model: its states, pooled over the tokens of each text.

B texts of a batch, T tokens, D width.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from t5g2.core.batch import Sequences
from t5g2.core.errors import unknown
from t5g2.core.sharding import constrain
from t5g2.eval.decoding import LanguageModule
from t5g2.eval.generation import batches_by_length, pad_rows
from t5g2.models.layers import Compute

Pooling = Literal["mean", "first", "last"]


def embed(
    model: LanguageModule,
    token_rows: Sequence[np.ndarray],
    *,
    pooling: Pooling,
    rows: int,
    pad: int,
    compute: Compute,
) -> Float[np.ndarray, "N D"]:
    """Returns float32[N, D], vectors of length 1: the states of the encoder, or of a decoder-only model, pooled.

    Args:
      token_rows: int32 tokens of each text, at least one.
      pooling: "mean" of the states of all tokens, or the state of the "first" or the "last".
      rows: texts of a batch; every batch has as many, filled up with empty rows.

    Raises:
      UserError: unknown pooling.
    """
    if pooling not in get_args(Pooling):
        raise unknown("pooling", str(pooling), get_args(Pooling))
    stack = model.config.encoder_stack or model.config.decoder_stack
    vectors = np.zeros((len(token_rows), stack.width), np.float32)
    for batch in batches_by_length([len(tokens) for tokens in token_rows], rows):
        empty = [np.zeros(0, np.int32)] * (rows - len(batch))
        tokens = pad_rows([*(token_rows[i] for i in batch), *empty], pad=pad, left=False)
        vectors[batch] = np.asarray(_pooled(model, tokens, pooling=pooling, compute=compute))[: len(batch)]
    return vectors


@functools.partial(jax.jit, static_argnames=("pooling", "compute"))
def _pooled(model: Any, tokens: Sequences, *, pooling: Pooling, compute: Compute) -> Float[Array, "B D"]:
    if model.config.is_encoder_decoder:
        states_BTD = model.encode(tokens, compute=compute)
    else:
        states_BTD = model.hidden(None, tokens, compute=compute)
    states_BTD, valid_BT = states_BTD.astype(jnp.float32), tokens.segments != 0
    if pooling == "mean":
        # a sum, because its length does not matter; states at padding are undefined
        pooled_BD = jnp.sum(jnp.where(valid_BT[:, :, None], states_BTD, 0), axis=1)
    else:
        place_B = jnp.zeros(len(states_BTD), int) if pooling == "first" else jnp.sum(valid_BT, axis=1) - 1
        pooled_BD = jax.vmap(lambda states_TD, place: states_TD[place])(states_BTD, place_B)
    unit_BD = pooled_BD / jnp.maximum(jnp.linalg.norm(pooled_BD, axis=-1, keepdims=True), 1e-12)
    return constrain(unit_BD, None, None)  # replicated, so that every process can read them
