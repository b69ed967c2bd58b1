"""One update: a pure function (state, batch) -> (state, metrics), compiled once.

Losses are sums and counts, added up over microbatches, and divided once by the global sum of weights: neither the
number of microbatches nor of devices changes what is computed. B rows, T decoder length, D width, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from t5g2.core import sharding
from t5g2.core.batch import Batch, Sequences
from t5g2.core.scopes import scope
from t5g2.models import image_embeddings, probe_head
from t5g2.models.layers import Compute
from t5g2.models.lookup import share_tables
from t5g2.models.loss import LossSums, cross_entropy
from t5g2.models.loss_config import LossConfig
from t5g2.train import teachers
from t5g2.train.encoder_offset import EncoderOffset
from t5g2.train.optim import Updater, norms_of
from t5g2.train.state import TrainState, shardings


@dataclass(frozen=True)
class StepOptions:
    """Options of a train step.

    Attributes:
      denoisers, sources: their numbers; losses are reported for each.
      microbatches: parts of the batch, computed one after the other.
      loss: settings of the loss; with `distillation`, there is a teacher.
      seed: seed of the samples from a teacher's distributions.
      skip_nonfinite: an update that is not finite leaves weights and optimizer as they are, and is counted.
      zero1: each device updates the part of the weights whose optimizer state it holds, and the parts are gathered.
      encoder_offset: offset on the scores of the encoder's keys, by update.
    """

    compute: Compute
    denoisers: int = 1
    sources: int = 1
    microbatches: int = 1
    loss: LossConfig = LossConfig()
    seed: int = 0
    skip_nonfinite: bool = False
    zero1: bool = False
    encoder_offset: EncoderOffset | None = None


class StepSums(NamedTuple):
    """Weighted sums over the tokens of some rows, float32 unless stated otherwise.

    Attributes:
      loss, z, correct: weighted sums of the loss head.
      weight: sum of the weights.
      divergence: weighted sum of the divergence from a teacher; 0 without one.
      teacher_weight: sum of the weights of tokens for which a teacher has distributions; 0 without one.
      denoiser_loss, denoiser_weight, source_loss, source_weight: float32[G], loss and weight by denoiser and by source.
      tokens: int32, tokens without padding, encoder and decoder.
      encoder_tokens: int32, those of the encoder.
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
    encoder_tokens: jax.Array


class Metrics(NamedTuple):
    """Metrics of an update: the fields of StepSums, over the global batch, and those below.

    Attributes:
      total: the loss that was minimised, per unit of weight.
      gradient_norm: norm of the gradients of trained weights, before clipping.
      parameter_norm: norm of all weights, after the update.
      learning_rate: learning rate of this update.
      finite: bool[], True if the loss, the gradients and the updated weights are finite.
      finite_gradients, finite_params: bool[leaves], the same for each stored leaf, in the order of tree.named.
      skipped: int32[], updates so far that were left out because they were not finite.
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
    encoder_tokens: jax.Array
    gradient_norm: jax.Array
    parameter_norm: jax.Array
    learning_rate: jax.Array
    finite: jax.Array
    finite_gradients: jax.Array
    finite_params: jax.Array
    skipped: jax.Array


def make_train_step(optimizer: Updater, options: StepOptions) -> Callable:
    """Returns the train step (state, batch, teacher) -> (state, metrics), for jit; the teacher is a model, or None."""

    def train_step(state: TrainState, batch: Batch, teacher: Any = None) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(options.seed), state.step)
        offset = None if options.encoder_offset is None else options.encoder_offset.at(state.step)
        total, sums, gradients = gradients_of(
            state.params, batch, options, teacher, key, variables=optimizer.variables, encoder_offset=offset
        )
        # the one division by the global count
        with scope("gradients"):
            scale = jnp.where(sums.weight > 0, 1.0 / sums.weight, 0.0)
            gradients = jax.tree.map(lambda g: g * scale, gradients)
        with scope("optimizer"):
            before = sharding.constrain_weights(state.params, zero1=options.zero1)
            params, opt, update = optimizer.apply(before, gradients, state.opt, state.step)
        with scope("metrics"):
            parameter_norm, parameter_norms = norms_of(params)
            # a finite gradient and a wrong learning rate can still make weights that are not finite
            finite = jnp.isfinite(total) & jnp.isfinite(update.gradient_norm) & jnp.isfinite(parameter_norm)
            finite_gradients, finite_params = jnp.isfinite(update.leaf_norms), jnp.isfinite(parameter_norms)
        skipped = state.skipped
        if options.skip_nonfinite:
            # selected in the program: the old state is donated, so the host could not go back to it
            keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
            with scope("optimizer"):
                params, opt = jax.tree.map(keep, (params, opt), (before, state.opt))
            skipped = skipped + jnp.where(finite, 0, 1)
        if options.zero1:
            # gathered here, in the dtype of the weights, and not where they are used
            with scope("optimizer"):
                params = sharding.constrain_weights(sharding.constrain_weights(params, zero1=True))
        metrics = Metrics(
            total=total * scale,
            gradient_norm=update.gradient_norm,
            parameter_norm=parameter_norm,
            learning_rate=update.learning_rate,
            finite=finite,
            finite_gradients=finite_gradients,
            finite_params=finite_params,
            skipped=skipped,
            **sums._asdict(),
        )
        return TrainState(state.step + 1, params, opt, skipped), metrics

    return train_step


def gradients_of(
    params: Any,
    batch: Batch,
    options: StepOptions,
    teacher: Any = None,
    key: jax.Array | None = None,
    *,
    variables: Callable[[Any], Any] = lambda params: params,
    encoder_offset: jax.Array | None = None,
) -> tuple[jax.Array, StepSums, Any]:
    """Returns (the loss that is minimised, as a sum over the batch; the sums that are reported; the gradients).

    Args:
      teacher: a model, if one runs in the step.
      key: random key for samples from the teacher's distributions.
      variables: Updater.variables.
      encoder_offset: float32[], added to the scores of the encoder's keys.
    """
    gradient = jax.value_and_grad(lambda params, *rest: loss_sums(variables(params), *rest), has_aux=True)

    def one_microbatch(rows_and_key: tuple[Batch, jax.Array | None]) -> tuple[jax.Array, StepSums, Any]:
        rows, key = rows_and_key
        (total, sums), gradients = gradient(params, rows, options, teacher, key, encoder_offset)
        # float32 even where weights are bfloat16, because they are added up
        with scope("gradients"):
            gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
            return total, sums, sharding.lay_out_tables(sharding.constrain_weights(gradients, zero1=options.zero1))

    if options.microbatches == 1:
        return one_microbatch((batch, key))
    keys = None if key is None else jax.random.split(key, options.microbatches)
    parts = _microbatches(batch, options.microbatches), keys
    shapes = jax.eval_shape(one_microbatch, jax.tree.map(lambda x: x[0], parts))
    total, sums, gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    # so that the carry of the scan is sharded like the weights from the start
    zeros = total, sums, sharding.constrain_weights(gradients, zero1=options.zero1)

    def add(carry, part):
        terms = one_microbatch(part)
        with scope("gradients"):
            return jax.tree.map(jnp.add, carry, terms), None

    return jax.lax.scan(add, zeros, parts)[0]


def loss_sums(
    params: Any,
    batch: Batch,
    options: StepOptions,
    teacher: Any = None,
    key: jax.Array | None = None,
    encoder_offset: jax.Array | None = None,
) -> tuple[jax.Array, StepSums]:
    """Returns (the loss that is minimised, the reported sums), over these rows; the caller computes means."""
    if batch.labels is None:
        loss = _token_loss(params, batch, options, teacher, key, encoder_offset)
    else:
        loss = probe_head.loss(params, batch, options.loss, options.compute)

    @scope("metrics")
    def sums_by(groups_BT: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        one_hot_BTG = jax.nn.one_hot(groups_BT, count, dtype=jnp.float32)
        values = batch.weights * loss.tokens.loss_BT, batch.weights
        loss_G, weight_G = (jnp.einsum("BT,BTG->G", x_BT, one_hot_BTG) for x_BT in values)
        return loss_G, weight_G

    sums = StepSums(
        loss.loss,
        loss.z,
        loss.correct,
        loss.weight,
        loss.divergence,
        loss.teacher_weight,
        *sums_by(batch.denoisers, options.denoisers),
        *sums_by(batch.sources, options.sources),
        tokens=_tokens(batch.encoder) + _tokens(batch.decoder),
        encoder_tokens=_tokens(batch.encoder),
    )
    return loss.total, sums


def _token_loss(
    params: Any,
    batch: Batch,
    options: StepOptions,
    teacher: Any,
    key: jax.Array | None,
    encoder_offset: jax.Array | None,
) -> LossSums:
    # images travel as bytes and become floats here, on the device
    images = image_embeddings.normalized(batch.images)
    if options.loss.strategy == "tokens":
        with scope("head"):
            params = share_tables(params, batch.targets.shape[0], dtype=options.compute.dtype)
    # decoder-only models have no such argument
    soft_start = {} if encoder_offset is None else {"encoder_offset": encoder_offset}
    hidden_BTD = params.hidden(batch.encoder, batch.decoder, images, compute=options.compute, **soft_start)
    outputs = None
    if options.loss.distillation is not None:
        with scope("teacher"):
            outputs = teachers.outputs(teacher, batch, options.compute, key=key)
    with scope("head"):
        return cross_entropy(
            hidden_BTD,
            params.head(),
            batch.targets,
            batch.weights,
            options.loss,
            teacher=outputs,
        )


def lower_step(step: Callable, state: TrainState, batch: Batch, teacher: Any = None, *, mesh: Mesh) -> Any:
    """Returns the step lowered for an abstract state (with shardings), an abstract batch and an abstract teacher.

    The state is donated. Compiled, it is called with (state, batch, teacher), sharded likewise.
    """
    # declared on both sides, so that the new state can take the memory of the donated one
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


def _tokens(side: Sequences | None) -> jax.Array:
    """Returns the number of tokens of a side that are no padding."""
    return jnp.int32(0) if side is None else jnp.sum(side.segments > 0, dtype=jnp.int32)


def _microbatches(batch: Batch, count: int) -> Batch:
    """Returns the batch with a leading axis of microbatches; part j has the rows j, j + count, ...

    Each device's own rows are split, and no row moves between devices, provided that a part has rows for every device.
    """

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(x, None, "rows", *(None,) * (x.ndim - 2))

    return jax.tree.map(split, batch)
