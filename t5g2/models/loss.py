"""The loss head: cross-entropy of a large vocabulary, tile by tile, so that all logits never exist at once.

B rows, T length, D width, V vocabulary; R groups of rows (one per device that rows are sharded over), K tokens of a
tile in one group. A tile's logits are float32 whatever the activations are, and so is everything computed from them,
unless LossConfig.dtype is another type.

For training, gradients are computed in the forward pass, while a tile's logits exist anyway: three matrix products per
tile instead of the four that recomputing logits in a backward pass takes (Liger Kernel, arXiv 2410.10989, section 3.2).

Sharding: a tile takes equally many positions of every row, so rows stay where they are. Each group of rows adds up its
own gradient of the table, and the groups are summed once, after the last tile. With a sharded vocabulary, a maximum and
two sums per token are exchanged between devices, never a row of logits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5g2.core import sharding
from t5g2.core.bounds import NotNegative, Size, checked
from t5g2.core.sharding import constrain
from t5g2.models import distillation as distill
from t5g2.models.distillation import Distillation, SoftTargets, SparseDistribution, TeacherOutputs
from t5g2.models.layers import Head, Precision


@dataclass(frozen=True)
@checked
class LossConfig:
    """Settings of the loss.

    Attributes:
      tile_tokens: number of tokens per device whose logits exist at a time; a tile has at least one of every row.
      z_loss: weight of log(Z)^2, which keeps logits from drifting (PaLM, arXiv 2204.02311, section 5: 1e-4).
      dtype: type of logits, their softmax and the loss of a token (Compute.loss_dtype); sums over tokens are float32.
      distillation: settings of the divergence from a teacher; None = there is no teacher.
    """

    tile_tokens: Size = 1024
    z_loss: NotNegative = 0.0
    dtype: Precision = "float32"
    distillation: Distillation | None = None


class TokenLosses(NamedTuple):
    """Losses of single tokens, not weighted; without a gradient.

    Attributes:
      loss_BT: float32, -log p(target), in nats.
      z_BT: float32, the square of the log of the partition function.
      correct_BT: True where no token has a higher logit than the target, so of several highest ones each is correct.
      divergence_BT: float32, from the teacher's distribution, 0 where it has none; None = there is no teacher.
    """

    loss_BT: Float[Array, "B T"]
    z_BT: Float[Array, "B T"]
    correct_BT: Bool[Array, "B T"]
    divergence_BT: Float[Array, "B T"] | None = None


class LossSums(NamedTuple):
    """Weighted sums over tokens, never means, so that they can be added over microbatches, devices and batches.

    Attributes:
      total: float32, loss + z_loss * z: the objective, and the only field that has a gradient. With a teacher, the loss
        of the tokens that it has a distribution for is (1 - weight) * loss + weight * divergence.
      loss, z, correct: float32, the fields of TokenLosses, weighted and summed.
      weight: float32, sum of the weights; the denominator of means.
      divergence: float32, from the teacher, weighted and summed; 0 without a teacher.
      teacher_weight: float32, sum of the weights of the tokens that the teacher has a distribution for; the denominator
        of the mean divergence. 0 without a teacher.
      tokens: the losses of single tokens, not weighted.
    """

    total: Float[Array, ""]
    loss: Float[Array, ""]
    z: Float[Array, ""]
    correct: Float[Array, ""]
    weight: Float[Array, ""]
    divergence: Float[Array, ""]
    teacher_weight: Float[Array, ""]
    tokens: TokenLosses


def tiled_cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    head: Head,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    config: LossConfig,
    *,
    teacher: TeacherOutputs | None = None,
) -> LossSums:
    """Returns the loss of every token and the sums; `total` is differentiable by hidden_BTD and the head's table.

    Args:
      targets_BT: token ids, from 0 to V - 1 also where the weight is 0.
      weights_BT: weight of each token's loss; 0 = the token is in no sum.
      teacher: outputs of the teacher; config.distillation has their use.
    """
    assert teacher is None or config.distillation is not None
    teacher_data = jax.lax.stop_gradient(teacher)
    total_and_tokens: Any = _total(
        hidden_BTD, head.table_VD, targets_BT, weights_BT, teacher_data, head.softcap, config
    )
    total, tokens = total_and_tokens
    # the backward pass ignores cotangents of single losses, so none may be asked for
    tokens = jax.lax.stop_gradient(tokens)

    def weighted_sum(x_BT: Array | None) -> Array:
        return jnp.zeros(()) if x_BT is None else jnp.sum(weights_BT * x_BT.astype(jnp.float32))

    return LossSums(
        total,
        weighted_sum(tokens.loss_BT),
        weighted_sum(tokens.z_BT),
        weighted_sum(tokens.correct_BT),
        jnp.sum(weights_BT),
        weighted_sum(tokens.divergence_BT),
        weighted_sum(None if teacher is None else teacher.has_teacher_BT),
        tokens,
    )


def token_losses(
    hidden_BTD: Float[Array, "B T D"], head: Head, targets_BT: Int[Array, "B T"], config: LossConfig
) -> TokenLosses:
    """Returns the loss of every token, for evaluation: without a teacher, a gradient, or the work for gradients."""
    return jax.lax.stop_gradient(_token_losses(hidden_BTD, head, targets_BT, None, config))


def sparse_distributions(
    hidden_BTD: Float[Array, "B T D"],
    head: Head,
    *,
    distillation: Distillation,
    tile_tokens: int,
    key: Array | None = None,
) -> SparseDistribution:
    """Returns the kept tokens [B, T, N] of a teacher's distributions, to be cached for the training of a student."""
    w_VD = _gather_table(head.table_VD, hidden_BTD.dtype)

    def tile(_, inputs):
        x_RKD, key = inputs
        return None, distill.sparsify(_logits(x_RKD, w_VD, head.softcap), distillation, key=key)

    (x_nRKD,) = _split_into_tiles((hidden_BTD,), tile_tokens)
    keys = None if key is None else _token_keys(key, hidden_BTD.shape[:2], tile_tokens)
    _, tiles = jax.lax.scan(tile, None, (x_nRKD, keys))
    return jax.tree.map(lambda x: _merge_tiles(x, hidden_BTD.shape[:2]), tiles)


# a gradient of our own: automatic differentiation would keep every tile's logits for the backward pass
@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _total(
    hidden_BTD,
    table_VD,
    targets_BT,
    weights_BT,
    teacher: TeacherOutputs | None,
    softcap: float | None,
    config: LossConfig,
) -> tuple[Array, TokenLosses]:
    tokens = _token_losses(hidden_BTD, Head(table_VD, softcap), targets_BT, teacher, config)
    return _weighted_total(tokens, weights_BT, teacher, config), tokens


def _token_losses(
    hidden_BTD, head: Head, targets_BT, teacher: TeacherOutputs | None, config: LossConfig
) -> TokenLosses:
    w_VD = _gather_table(head.table_VD, hidden_BTD.dtype)
    tile_targets = _tile_targets_function(teacher, head.table_VD.shape[0], config)

    def tile(_, inputs):
        x_RKD, targets_RK, teacher_RK = inputs
        logits_RKV = _logits(x_RKD, w_VD, head.softcap)
        return None, _score(logits_RKV, targets_RK, partial(tile_targets, teacher_RK), config).tokens

    inputs = _split_into_tiles((hidden_BTD, targets_BT), config.tile_tokens)
    _, tokens = jax.lax.scan(tile, None, (*inputs, _teacher_tiles(teacher, targets_BT.shape, config)))
    return jax.tree.map(lambda x_nRK: _merge_tiles(x_nRK, targets_BT.shape), tokens)


def _total_and_gradients(hidden_BTD, table_VD, targets_BT, weights_BT, teacher, softcap, config: LossConfig):
    """Returns what `_total` returns, and its gradients by hidden_BTD and table_VD."""
    w_VD = _gather_table(table_VD, hidden_BTD.dtype)
    tile_targets = _tile_targets_function(teacher, table_VD.shape[0], config)

    def tile(dw_RVD, inputs):
        x_RKD, targets_RK, weights_RK, teacher_RK = inputs
        logits_RKV = _logits(x_RKD, w_VD, softcap)
        score = _score(logits_RKV, targets_RK, partial(tile_targets, teacher_RK), config)
        dy_RKV = _logit_gradients(score, targets_RK, weights_RK, softcap, config)
        # products of float32 gradients would take several times as long where activations are bfloat16
        dy_RKV = dy_RKV.astype(x_RKD.dtype)
        dx_RKD = jnp.einsum("RKV,VD->RKD", dy_RKV, w_VD, preferred_element_type=jnp.float32)
        dw_RVD = dw_RVD + jnp.einsum("RKV,RKD->RVD", dy_RKV, x_RKD, preferred_element_type=jnp.float32)
        return constrain(dw_RVD, "rows", "vocab_act", None), (dx_RKD.astype(x_RKD.dtype), score.tokens)

    inputs = _split_into_tiles((hidden_BTD, targets_BT, weights_BT), config.tile_tokens)
    teacher_tiles = _teacher_tiles(teacher, targets_BT.shape, config)
    # one sum for each group of rows: a single one would be reduced over devices in every tile
    zeros_RVD = jnp.zeros((inputs[0].shape[1], *table_VD.shape), jnp.float32)
    zeros_RVD = constrain(zeros_RVD, "rows", "vocab_act", None)
    dw_RVD, tiles = jax.lax.scan(tile, zeros_RVD, (*inputs, teacher_tiles))
    dw_VD = constrain(jnp.sum(dw_RVD, axis=0), "vocab", "embed").astype(table_VD.dtype)
    dx_BTD, tokens = jax.tree.map(lambda x: _merge_tiles(x, targets_BT.shape), tiles)
    return (_weighted_total(tokens, weights_BT, teacher, config), tokens), (dx_BTD, dw_VD)


def _scale_gradients(softcap: float | None, config: LossConfig, gradients, cotangents):
    """Returns the gradients of the forward pass, scaled by the cotangent of the total: the backward pass."""
    del softcap, config
    scale, _ = cotangents
    scaled = jax.tree.map(lambda x: (scale * x.astype(jnp.float32)).astype(x.dtype), gradients)
    return *scaled, None, None, None  # targets, weights and the teacher's outputs are data


_total.defvjp(_total_and_gradients, _scale_gradients)


class _TileTargets(NamedTuple):
    """The soft targets of a tile, and the tokens that have any."""

    has_teacher_RK: Array
    soft: SoftTargets


class _Score(NamedTuple):
    """A tile's logits, their log-sum-exp, the losses (of shape [R, K]), and the soft targets."""

    logits_RKV: Array
    lse_RK: Array
    tokens: TokenLosses
    targets: _TileTargets | None


def _score(logits_RKV, targets_RK, tile_targets: Callable, config: LossConfig) -> _Score:
    """Returns the losses of a tile's tokens from its logits."""
    y_RKV = logits_RKV.astype(config.dtype)
    top_RK = jnp.max(y_RKV, axis=-1)
    lse_RK = top_RK + jnp.log(jnp.sum(jnp.exp(y_RKV - top_RK[..., None]), axis=-1))
    # a sum over V and not a lookup, which would gather the logits of a sharded vocabulary
    target_RK = jnp.sum(jnp.where(_is_target(targets_RK, y_RKV.shape[-1]), y_RKV, 0.0), axis=-1)
    loss_RK, z_RK = (x_RK.astype(jnp.float32) for x_RK in (lse_RK - target_RK, jnp.square(lse_RK)))
    tokens, targets = TokenLosses(loss_RK, z_RK, target_RK >= top_RK), tile_targets(y_RKV, lse_RK)
    if targets is not None:
        tokens = tokens._replace(divergence_BT=jnp.where(targets.has_teacher_RK, targets.soft.divergence_RK, 0.0))
    return _Score(y_RKV, lse_RK, tokens, targets)


def _logits(x_RKD, w_VD, softcap: float | None):
    y_RKV = jnp.einsum("RKD,VD->RKV", x_RKD, w_VD, preferred_element_type=jnp.float32)
    return constrain(y_RKV if softcap is None else softcap * jnp.tanh(y_RKV / softcap), "rows", None, "vocab_act")


def _logit_gradients(score: _Score, targets_RK, weights_RK, softcap: float | None, config: LossConfig):
    """Returns the gradient of the tile's weighted loss by its logits before the softcap.

    Without a teacher it is weight * ((1 + 2 z_loss lse) p - onehot); with one, onehot becomes the mixture
    (1 - share) onehot + share * soft targets.
    """
    y_RKV, lse_RK, _, targets = score
    p_RKV = jnp.exp(y_RKV - lse_RK[..., None])
    onehot_weight_RK = weights_RK.astype(p_RKV.dtype)
    # d lse / d logits = p, so the z-loss only scales p
    dy_RKV = (onehot_weight_RK * (1.0 + 2.0 * config.z_loss * lse_RK))[..., None] * p_RKV
    if targets is not None:
        assert config.distillation is not None
        share_RK = jnp.where(targets.has_teacher_RK, config.distillation.weight, 0.0).astype(p_RKV.dtype)
        soft_weight_RK = share_RK * onehot_weight_RK
        dy_RKV = dy_RKV - soft_weight_RK[..., None] * targets.soft.probs_RKV.astype(p_RKV.dtype)
        onehot_weight_RK = (1.0 - share_RK) * onehot_weight_RK
    dy_RKV = jnp.where(_is_target(targets_RK, p_RKV.shape[-1]), dy_RKV - onehot_weight_RK[..., None], dy_RKV)
    if softcap is not None:
        # the derivative of softcap * tanh(x / softcap), by its value y
        dy_RKV = dy_RKV * (1.0 - jnp.square(y_RKV / softcap))
    return constrain(dy_RKV, "rows", None, "vocab_act")


def _weighted_total(tokens: TokenLosses, weights_BT, teacher: TeacherOutputs | None, config: LossConfig):
    loss_BT = tokens.loss_BT
    if teacher is not None and config.distillation is not None and tokens.divergence_BT is not None:
        share = config.distillation.weight
        mixed_BT = (1.0 - share) * loss_BT + share * tokens.divergence_BT
        loss_BT = jnp.where(teacher.has_teacher_BT, mixed_BT, loss_BT)
    return jnp.sum(weights_BT * (loss_BT + config.z_loss * tokens.z_BT))


def _teacher_tiles(teacher: TeacherOutputs | None, shape: tuple[int, ...], config: LossConfig) -> Any:
    """Returns the teacher's outputs for each token, in tiles; None without a teacher."""
    if teacher is None:
        return None
    # the head is the same for all tiles, and keys are split for each token
    per_token = teacher._replace(head=None, key=None)
    leaves, tree = jax.tree.flatten(per_token)
    tiles = jax.tree.unflatten(tree, _split_into_tiles(tuple(leaves), config.tile_tokens))
    if teacher.key is None:
        return tiles
    return tiles._replace(key=_token_keys(teacher.key, shape, config.tile_tokens))


def _token_keys(key: Array, shape: tuple[int, ...], tile_tokens: int) -> Array:
    """Returns a key for each token, in tiles: the sample of a token does not depend on the size of tiles."""
    data_BTW = jax.random.key_data(jax.random.split(key, shape))
    (data_nRKW,) = _split_into_tiles((data_BTW,), tile_tokens)
    return jax.random.wrap_key_data(data_nRKW, impl=jax.random.key_impl(key))


def _tile_targets_function(teacher: TeacherOutputs | None, vocab_size: int, config: LossConfig) -> Callable:
    """Returns the function that computes the soft targets of a tile; without a teacher it returns None.

    Its arguments are the tile of the teacher's outputs, the student's logits, and their log-sum-exp.
    """
    distillation, head = config.distillation, None if teacher is None else teacher.head
    if teacher is None or distillation is None:
        return lambda *_: None
    table_VD = None
    if head is not None and teacher.hidden_BTD is not None:
        # rows past the student's vocabulary are left out: both distributions are over the same tokens
        table_VD = _gather_table(head.table_VD[:vocab_size], teacher.hidden_BTD.dtype)

    def tile_targets(tile: TeacherOutputs, y_RKV, lse_RK) -> _TileTargets:
        # float32 whatever config.dtype is: the divergence is a difference of nearly equal numbers
        y_RKV, lse_RK = y_RKV.astype(jnp.float32), lse_RK.astype(jnp.float32)
        if tile.cached is not None:
            soft = distill.soft_targets_from_sparse(tile.cached, y_RKV, lse_RK, distillation)
        else:
            assert head is not None
            logits_RKV = _logits(tile.hidden_BTD, table_VD, head.softcap)
            soft = distill.soft_targets_from_logits(logits_RKV, y_RKV, lse_RK, distillation, key=tile.key)
        return _TileTargets(tile.has_teacher_BT, soft)

    return tile_targets


def _is_target(targets_RK, vocab_size: int):
    return targets_RK[..., None] == jnp.arange(vocab_size, dtype=targets_RK.dtype)[None, None, :]


def _gather_table(table_VD, dtype):
    """Returns the table as tiles use it: whole along D, which FSDP shards, and gathered once for all tiles."""
    return constrain(table_VD.astype(dtype), "vocab_act", None)


def _split_into_tiles(arrays: tuple[Array, ...], tile_tokens: int) -> tuple[Array, ...]:
    """Returns [B, T, …] as tiles [n, R, K, …] of T / n positions of every row; zeros pad T to a multiple of n."""
    rows, length = arrays[0].shape[:2]
    groups = sharding.parts("rows", rows)
    tiles, width = _tile_shape(rows // groups, length, tile_tokens)

    def split(x):
        inner = x.shape[2:]
        x = jnp.pad(x, [(0, 0), (0, tiles * width - length)] + [(0, 0)] * len(inner))
        # [R, B/R, n, T/n, …], then the axis of tiles first: every tile has positions of all rows, and no row moves
        x = jnp.moveaxis(x.reshape(groups, rows // groups, tiles, width, *inner), 2, 0)
        x = x.reshape(tiles, groups, rows // groups * width, *inner)
        return constrain(x, None, "rows", *(None,) * (x.ndim - 2))

    return tuple(split(x) for x in arrays)


def _merge_tiles(x, shape: tuple[int, ...]):
    """Returns [n, R, K, …] as [B, T, …] without the padding: the inverse of `_split_into_tiles`."""
    rows, length = shape
    tiles, groups, _, *inner = x.shape
    x = jnp.moveaxis(x.reshape(tiles, groups, rows // groups, -1, *inner), 0, 2)
    x = x.reshape(rows, -1, *inner)[:, :length]
    return constrain(x, "rows", *(None,) * (x.ndim - 1))


def _tile_shape(rows: int, length: int, tile_tokens: int) -> tuple[int, int]:
    """Returns the number of tiles and their positions per row: as few equal tiles as tile_tokens allows."""
    tiles = math.ceil(length / max(1, min(length, tile_tokens // rows)))
    return tiles, math.ceil(length / tiles)
