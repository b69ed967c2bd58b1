"""A probe: a linear head on one state of each text, which predicts a class or a number.

B rows, S tokens of the side that is probed, T tokens or texts that ask, D width, C outputs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from t5g2.core.batch import Batch, Sequences
from t5g2.core.scopes import scope
from t5g2.models import image_embeddings, token_scores
from t5g2.models.config import ProbeConfig
from t5g2.models.layers import Compute, normal, param, zeros
from t5g2.models.loss import LossSums, weighted_sums
from t5g2.models.loss_config import LossConfig
from t5g2.models.token_scores import TokenLosses


class ProbeHead(nnx.Module):
    """The weights of a probe."""

    def __init__(self, config: ProbeConfig, width: int, *, key: jax.Array, param_dtype):
        self.kernel = param(key, (width, config.outputs), axes=("embed", None), init=normal, dtype=param_dtype)
        self.bias = param(None, (config.outputs,), axes=(None,), init=zeros, dtype=param_dtype)

    def predict(self, states_BTD: Float[Array, "B T D"]) -> Float[Array, "B T C"]:
        """Returns float32 logits of the classes, or numbers."""
        kernel_DC, bias_C = self.kernel[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        y_BTC = jnp.einsum("BTD,DC->BTC", states_BTD, kernel_DC, precision="highest")
        return y_BTC + jnp.broadcast_to(bias_C, y_BTC.shape)


def is_of_probe(path: str) -> bool:
    """True for the path of a probe's weight."""
    return path.startswith("probe.")


def outputs(
    model: Any,
    encoder: Sequences | None,
    decoder: Sequences,
    segments_BT: Int[Array, "B T"],
    images: Float[Array, "B I H W 3"] | None = None,
    *,
    compute: Compute,
) -> Float[Array, "B T C"]:
    """Returns the probe's outputs for the text of each segment that is asked for.

    Args:
      model: a language model with a probe; of an encoder-decoder the decoder runs only if its state is probed.
      segments_BT: the segment of the row whose text is meant; at 0 the output is the bias.
    """
    state = model.config.probe.state
    if model.config.is_encoder_decoder and state != "decoder_first":
        side, states_BSD = encoder, model.encode(encoder, images, compute=compute)
    else:
        side, states_BSD = decoder, model.hidden(encoder, decoder, images, compute=compute)
    assert side is not None
    with scope("head"):
        return model.probe.predict(pooled(states_BSD, side, segments_BT, state))


def pooled(
    states_BSD: Float[Array, "B S D"], side: Sequences, segments_BT: Int[Array, "B T"], state: str
) -> Float[Array, "B T D"]:
    """Returns float32[B, T, D], one state, or the mean of all, of the tokens of each segment that is asked for.

    Segments [1 1 2 2 2 0] and segments_BT = [1 2]: the "last" states are those at 1 and 4, the "first" at 0 and 2.
    """
    shares_BTS = (segments_BT[:, :, None] == side.segments[:, None, :]) & (segments_BT > 0)[:, :, None]
    shares_BTS = shares_BTS.astype(jnp.float32)
    sizes_BT1 = jnp.sum(shares_BTS, axis=2, keepdims=True)
    positions_B1S = side.positions[:, None, :].astype(jnp.float32)
    if state == "mean":
        shares_BTS = shares_BTS / jnp.maximum(sizes_BT1, 1.0)
    elif state == "last":
        shares_BTS = jnp.where(positions_B1S == sizes_BT1 - 1.0, shares_BTS, 0.0)
    else:
        shares_BTS = jnp.where(positions_B1S == 0.0, shares_BTS, 0.0)
    # states at padding need not be finite
    states_BSD = jnp.where(side.segments[:, :, None] > 0, states_BSD.astype(jnp.float32), 0.0)
    return jnp.einsum("BTS,BSD->BTD", shares_BTS, states_BSD, precision="highest")


def loss(model: Any, batch: Batch, config: LossConfig, compute: Compute) -> LossSums:
    """Returns the losses and sums of a batch with labels: cross-entropy of classes, in nats, or squared error."""
    assert batch.labels is not None
    images = image_embeddings.normalized(batch.images)
    y_BTC = outputs(model, batch.encoder, batch.decoder, batch.decoder.segments, images, compute=compute)
    with scope("head"):
        tokens = label_losses(y_BTC, batch.labels, model.config.probe)
        return weighted_sums(token_scores.weighted_total(tokens, batch.weights, None, config), tokens, batch.weights)


def label_losses(y_BTC: Float[Array, "B T C"], labels_BT: Float[Array, "B T"], config: ProbeConfig) -> TokenLosses:
    """Returns the loss of each output: cross-entropy with the label's class, or the square of the difference to it.

    A number is never correct, and has no partition function.
    """
    if not config.classes:
        loss_BT = jnp.square(y_BTC[..., 0] - labels_BT)
        return TokenLosses(loss_BT, jnp.zeros_like(loss_BT), jnp.zeros(loss_BT.shape, bool))
    target_BT1 = labels_BT.astype(jnp.int32)[..., None]
    target_BT = jnp.take_along_axis(y_BTC, target_BT1, axis=-1)[..., 0]
    return token_scores.scores(jax.nn.logsumexp(y_BTC, axis=-1), target_BT, jnp.max(y_BTC, axis=-1), jnp.float32)
