"""One update: a pure function (state, batch) -> (state, metrics), compiled once.

Losses are sums and counts, added up over microbatches, and divided once by the global sum of weights: neither the
number of microbatches nor of devices changes what is computed. B rows, T decoder length, D width, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from t5g2.core import sharding
from t5g2.core.batch import Batch
from t5g2.models import image_embeddings
from t5g2.models.layers import Compute
from t5g2.models.loss import LossConfig, tiled_cross_entropy
from t5g2.train import teachers
from t5g2.train.optim import Updates
from t5g2.train.state import TrainState, shardings


@dataclass(frozen=True)
class Settings:
    """What a step computes beside the model.

    Attributes:
      denoisers, sources: how many there are; losses are reported by each.
      microbatches: parts of the batch, one after the other.
      loss: settings of the loss; its `distillation` says whether there is a teacher.
      seed: of what is sampled from a teacher's distributions.
    """

    compute: Compute
    denoisers: int = 1
    sources: int = 1
    microbatches: int = 1
    loss: LossConfig = LossConfig()
    seed: int = 0


class Sums(NamedTuple):
    """What rows add up to: weighted sums over tokens, float32 unless said otherwise.

    Attributes:
      loss, z, correct: of the loss head.
      weight: of the weights.
      divergence: from a teacher; 0 without one.
      teacher_weight: of the weights of the tokens that a teacher has distributions for; 0 without one.
      denoiser_loss, denoiser_weight, source_loss, source_weight: float32[G], by denoiser and by source.
      tokens: int32, tokens that are no padding, encoder and decoder.
    """

    loss: jax.Array
    z: jax.Array
    correct: jax.Array
    weight: jax.Array
    divergence: jax.Array
    teacher_weight: jax.Array
    denoiser_loss: jax.Array
    denoiser_weight: jax.Array
    source_loss: jax.Array
    source_weight: jax.Array
    tokens: jax.Array


class Metrics(NamedTuple):
    """What an update tells: the fields of Sums, over the global batch, and

    Attributes:
      total: what was minimised, per unit of weight.
      gradient_norm: of the gradients that count, before clipping.
      parameter_norm: of all weights, after the update.
      learning_rate: of this update.
      finite: bool, whether the loss and every gradient that counts is.
    """

    total: jax.Array
    loss: jax.Array
    z: jax.Array
    correct: jax.Array
    weight: jax.Array
    divergence: jax.Array
    teacher_weight: jax.Array
    denoiser_loss: jax.Array
    denoiser_weight: jax.Array
    source_loss: jax.Array
    source_weight: jax.Array
    tokens: jax.Array
    gradient_norm: jax.Array
    parameter_norm: jax.Array
    learning_rate: jax.Array
    finite: jax.Array


def make_train_step(optimizer: Updates, settings: Settings) -> Callable:
    """(state, batch, teacher) -> (state, metrics), for jit; the teacher is a model, or None."""

    def train_step(state: TrainState, batch: Batch, teacher: Any = None) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        total, sums, gradients = gradients_of(state.params, batch, settings, teacher, key)
        share = jnp.where(sums.weight > 0, 1.0 / sums.weight, 0.0)
        gradients = jax.tree.map(lambda g: g * share, gradients)
        params, opt, applied = optimizer.apply(state.params, gradients, state.opt, state.step)
        parameter_norm = optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), params))
        # a finite gradient and a wrong learning rate can still make weights that are not finite
        finite = jnp.isfinite(total) & jnp.isfinite(applied.gradient_norm) & jnp.isfinite(parameter_norm)
        metrics = Metrics(
            total=total * share,
            gradient_norm=applied.gradient_norm,
            parameter_norm=parameter_norm,
            learning_rate=applied.learning_rate,
            finite=finite,
            **sums._asdict(),
        )
        return TrainState(state.step + 1, params, opt), metrics

    return train_step


def gradients_of(
    params: Any, batch: Batch, settings: Settings, teacher: Any = None, key: jax.Array | None = None
) -> tuple[jax.Array, Sums, Any]:
    """What is minimised, as a sum over the batch, the sums that are told, and the gradients of the former.

    Args:
      teacher: a model, if there is one and it is asked.
      key: for what is drawn of its distributions.
    """
    gradient = jax.value_and_grad(loss_sums, has_aux=True)

    def of(cut: tuple[Batch, jax.Array | None]) -> tuple[jax.Array, Sums, Any]:
        part, key = cut
        (total, sums), gradients = gradient(params, part, settings, teacher, key)
        # float32 also where weights are not: they are added up
        return total, sums, sharding.constrain_weights(jax.tree.map(lambda g: g.astype(jnp.float32), gradients))

    if settings.microbatches == 1:
        return of((batch, key))
    parts = _parts(batch, settings.microbatches), None if key is None else jax.random.split(key, settings.microbatches)
    shapes = jax.eval_shape(of, jax.tree.map(lambda x: x[0], parts))
    total, sums, gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    start = total, sums, sharding.constrain_weights(gradients)
    return jax.lax.scan(lambda so_far, part: (jax.tree.map(jnp.add, so_far, of(part)), None), start, parts)[0]


def loss_sums(
    params: Any, batch: Batch, settings: Settings, teacher: Any = None, key: jax.Array | None = None
) -> tuple[jax.Array, Sums]:
    """The sum that is minimised, and what is told; means are for who has all rows."""
    images = image_embeddings.normalized(batch.images)
    hidden_BTD = params.hidden(batch.encoder, batch.decoder, images, compute=settings.compute)
    outputs = None
    if settings.loss.distillation is not None:
        outputs = teachers.outputs(teacher, batch, settings.compute, key=key)
    loss = tiled_cross_entropy(
        hidden_BTD,
        params.head(),
        batch.targets,
        batch.weights,
        settings.loss,
        teacher=outputs,
    )

    def by(groups_BT: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        one_hot_BTG = jax.nn.one_hot(groups_BT, count, dtype=jnp.float32)
        values = batch.weights * loss.tokens.loss_BT, batch.weights
        loss_G, weight_G = (jnp.einsum("BT,BTG->G", x_BT, one_hot_BTG) for x_BT in values)
        return loss_G, weight_G

    sums = Sums(
        loss.loss,
        loss.z,
        loss.correct,
        loss.weight,
        loss.divergence,
        loss.teacher_weight,
        *by(batch.denoisers, settings.denoisers),
        *by(batch.sources, settings.sources),
        tokens=_tokens(batch),
    )
    return loss.total, sums


def lower_step(step: Callable, state: TrainState, batch: Batch, teacher: Any = None, *, mesh: Mesh) -> Any:
    """The step lowered for an abstract state (with shardings), an abstract batch and an abstract teacher.

    The state is donated. Compiled, it is called with (state, batch, teacher), sharded likewise.
    """
    state_shardings = shardings(state)
    batch_shardings = jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch)
    jitted = jax.jit(
        step,
        in_shardings=(state_shardings, batch_shardings, shardings(teacher)),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    with jax.set_mesh(mesh):
        return jitted.lower(state, batch, teacher)


def _tokens(batch: Batch) -> jax.Array:
    streams = [batch.decoder] if batch.encoder is None else [batch.encoder, batch.decoder]
    return sum((jnp.sum(s.segments > 0, dtype=jnp.int32) for s in streams), jnp.zeros((), jnp.int32))


def _parts(batch: Batch, count: int) -> Batch:
    """The batch with a leading axis of microbatches; part j has the rows j, j + count, ...

    So each device's rows are split into parts, and none moves, provided that a part has rows for every device.
    """

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(x, None, "rows", *(None,) * (x.ndim - 2))

    return jax.tree.map(split, batch)
