"""One update: a pure function (state, batch) -> (state, metrics), compiled once.

Losses are sums and counts, added up over microbatches, and divided once by the global sum of weights: neither the
number of microbatches nor of devices changes what is computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from t5g2.core import mesh
from t5g2.core.batch import Batch
from t5g2.models.layers import Compute
from t5g2.models.loss import tiled_cross_entropy
from t5g2.train.state import TrainState, shardings


@dataclass(frozen=True)
class Settings:
    """What a step computes beside the model.

    Attributes:
      denoisers, sources: how many there are; losses are reported by each.
      microbatches: parts of the batch, one after the other.
      tile_tokens: tokens per device whose logits exist at a time.
      z_loss: weight of the squared log of the partition function.
    """

    compute: Compute
    denoisers: int = 1
    sources: int = 1
    microbatches: int = 1
    tile_tokens: int = 1024
    z_loss: float = 0.0


class Metrics(NamedTuple):
    """What an update tells; float32 sums over the global batch unless said otherwise.

    Attributes:
      total: what was minimised, its mean per weighted token.
      loss, correct, weight: weighted losses, right predictions, weights.
      denoiser_loss, denoiser_weight, source_loss, source_weight: the same by denoiser and by source.
      tokens: int32, tokens that are no padding, encoder and decoder.
      gradient_norm: before clipping.
      finite: whether the loss and every gradient is.
    """

    total: jax.Array
    loss: jax.Array
    correct: jax.Array
    weight: jax.Array
    denoiser_loss: jax.Array
    denoiser_weight: jax.Array
    source_loss: jax.Array
    source_weight: jax.Array
    tokens: jax.Array
    gradient_norm: jax.Array
    finite: jax.Array


def make_train_step(optimizer: optax.GradientTransformationExtraArgs, settings: Settings) -> Callable:
    """(state, batch) -> (state, metrics), for jit."""

    def sums(params: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """What is minimised, as a sum over this microbatch, and the sums that are told."""
        hidden_BTD = params.hidden(batch.encoder, batch.decoder, compute=settings.compute)
        loss = tiled_cross_entropy(
            hidden_BTD,
            params.head(),
            batch.targets,
            batch.weights,
            tile_tokens=settings.tile_tokens,
            z_loss=settings.z_loss,
        )
        weighted_BT = jnp.where(batch.weights > 0, batch.weights * loss.tokens.loss_BT, 0.0)
        told = {"loss": loss.loss, "correct": loss.correct, "weight": loss.weight, "tokens": _count(batch)}
        for name, groups_BT, count in (
            ("denoiser", batch.denoisers, settings.denoisers),
            ("source", batch.sources, settings.sources),
        ):
            one_hot_BTG = jax.nn.one_hot(groups_BT, count, dtype=jnp.float32)
            told[f"{name}_loss"] = jnp.einsum("BT,BTG->G", weighted_BT, one_hot_BTG)
            told[f"{name}_weight"] = jnp.einsum("BT,BTG->G", batch.weights, one_hot_BTG)
        return loss.total, told

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradient = jax.value_and_grad(sums, has_aux=True)
        if settings.microbatches == 1:
            (total, told), gradients = gradient(state.params, batch)
        else:

            def add(carry, part):
                return jax.tree.map(jnp.add, carry, gradient(state.params, part)), None

            parts = _parts(batch, settings.microbatches)
            shapes = jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], parts))
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            ((total, told), gradients), _ = jax.lax.scan(add, zero, parts)
        share = 1.0 / jnp.maximum(told["weight"], 1.0)
        gradients = jax.tree.map(lambda g: g * share.astype(g.dtype), gradients)
        norm = optax.global_norm(gradients)
        updates, opt = optimizer.update(gradients, state.opt, state.params, step=state.step)
        params = optax.apply_updates(state.params, updates)
        total = total * share
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        return TrainState(state.step + 1, params, opt), Metrics(total, gradient_norm=norm, finite=finite, **told)

    return train_step


def compile_step(step: Callable, state: TrainState, batch: Batch, *, world: Mesh) -> Any:
    """The compiled step for an abstract state (with shardings) and an abstract batch; the state's memory is reused.

    `.memory_analysis()` and `.cost_analysis()` of what comes back tell what it takes.
    """
    places = shardings(state)
    rows = jax.tree.map(lambda _: mesh.batch_sharding(world), batch)
    jitted = jax.jit(
        step, in_shardings=(places, rows), out_shardings=(places, mesh.replicated(world)), donate_argnums=0
    )
    return jitted.lower(state, batch).compile()


def _count(batch: Batch) -> jax.Array:
    streams = [batch.decoder] if batch.encoder is None else [batch.encoder, batch.decoder]
    return sum((jnp.sum(s.segments > 0, dtype=jnp.int32) for s in streams), jnp.zeros((), jnp.int32))


def _parts(batch: Batch, count: int) -> Batch:
    """The batch with a leading axis of microbatches. Each device's rows are split: none moves."""

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return mesh.constrain(x, None, "rows", *(None,) * (x.ndim - 2))

    return jax.tree.map(split, batch)
