"""The loss head in token tiles: all logits of some tokens at a time.

B rows, T length, D width, V vocabulary; R groups of rows (one per device that rows are sharded over), K tokens of a
tile in one group. A tile's logits are float32 whatever the activations are, and so is everything computed from them,
unless LossConfig.dtype is another type.

For training, gradients are computed in the forward pass, while a tile's logits exist anyway: three matrix products per
tile instead of the four that recomputing logits in a backward pass takes (Liger Kernel, arXiv 2410.10989, section 3.2).

Sharding: rows stay where they are. Each group of rows adds up its own gradient of the table, and the groups are summed
once, after the last tile. With a sharded vocabulary, a maximum and two sums per token are exchanged between devices,
never a row of logits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from t5g2.core.sharding import constrain, sum_groups
from t5g2.models import distillation as distill
from t5g2.models.distillation import Distillation, SoftTargets, SparseDistribution, TeacherOutputs
from t5g2.models.layers import Head
from t5g2.models.loss_config import LossConfig
from t5g2.models.token_groups import merge_tiles, split_into_tiles, token_keys
from t5g2.models.token_scores import (
    TargetMixture,
    TokenLosses,
    cotangent_of_total,
    logit_gradients,
    objective,
    scores,
    softcapped,
    unwrap,
    weighted_total,
)


def token_losses(hidden_BTD, head: Head, targets_BT, teacher: TeacherOutputs | None, config: LossConfig) -> TokenLosses:
    """Returns the losses of single tokens, without the work for gradients."""
    w_VD = _gather_table(head.table_VD, hidden_BTD.dtype)
    tile_targets = _tile_targets_function(teacher, head.table_VD.shape[-2], config)

    def tile(_, inputs):
        x_RKD, targets_RK, teacher_RK = inputs
        logits_RKV = _logits(x_RKD, w_VD, head.softcap)
        return None, _score(logits_RKV, targets_RK, partial(tile_targets, teacher_RK), config).tokens

    inputs = split_into_tiles((hidden_BTD, targets_BT), config.tile_tokens)
    _, tokens = jax.lax.scan(tile, None, (*inputs, _teacher_tiles(teacher, targets_BT.shape, config)))
    return jax.tree.map(lambda x_nRK: merge_tiles(x_nRK, targets_BT.shape), tokens)


def sparse_distributions(
    hidden_BTD: Array,
    head: Head,
    *,
    distillation: Distillation,
    tile_tokens: int,
    key: Array | None = None,
    dtype: Any = jnp.float16,
) -> SparseDistribution:
    """Returns the kept tokens [B, T, N] of a teacher's distributions; those of a cache are float16."""
    w_VD = _gather_table(head.table_VD, hidden_BTD.dtype)

    def tile(_, inputs):
        x_RKD, key = inputs
        return None, distill.sparsify(_logits(x_RKD, w_VD, head.softcap), distillation, key=key, dtype=dtype)

    (x_nRKD,) = split_into_tiles((hidden_BTD,), tile_tokens)
    keys = None if key is None else token_keys(key, hidden_BTD.shape[:2], tile_tokens)
    _, tiles = jax.lax.scan(tile, None, (x_nRKD, keys))
    return jax.tree.map(lambda x: merge_tiles(x, hidden_BTD.shape[:2]), tiles)


def _total_and_gradients(hidden, table, targets, weights, teacher, softcap, config: LossConfig):
    """Returns what `total` returns, and its gradients by hidden_BTD and table_VD; None for one that nobody reads."""
    values, needed = unwrap((hidden, table, targets, weights, teacher))
    hidden_BTD, table_VD, targets_BT, weights_BT, teacher = values
    w_VD = _gather_table(table_VD, hidden_BTD.dtype)
    tile_targets = _tile_targets_function(teacher, table_VD.shape[-2], config)

    def tile(dw_RVD, inputs):
        x_RKD, targets_RK, weights_RK, teacher_RK = inputs
        y_RKV, lse_RK, tokens, mixture = _score(
            _logits(x_RKD, w_VD, softcap), targets_RK, partial(tile_targets, teacher_RK), config
        )
        is_target_RKV = _is_target(targets_RK, y_RKV.shape[-1])
        dy_RKV = logit_gradients(y_RKV, lse_RK, is_target_RKV, weights_RK, mixture, softcap, config)
        # products of float32 gradients would take several times as long where activations are bfloat16
        dy_RKV = constrain(dy_RKV, "groups", None, "vocab_act").astype(x_RKD.dtype)
        dx_RKD = None
        if needed.hidden:
            product = "RKV,VD->RKD" if w_VD.ndim == 2 else "RKV,RVD->RKD"
            dx_RKD = jnp.einsum(product, dy_RKV, w_VD, preferred_element_type=jnp.float32).astype(x_RKD.dtype)
        if dw_RVD is not None:
            dw_RVD = dw_RVD + jnp.einsum("RKV,RKD->RVD", dy_RKV, x_RKD, preferred_element_type=jnp.float32)
            dw_RVD = constrain(dw_RVD, "groups", "vocab_act", None)
        return dw_RVD, (dx_RKD, tokens)

    inputs = split_into_tiles((hidden_BTD, targets_BT, weights_BT), config.tile_tokens)
    teacher_tiles = _teacher_tiles(teacher, targets_BT.shape, config)
    dw_RVD = None
    if needed.table:
        # one sum for each group of rows: a single one would be reduced over devices in every tile
        dw_RVD = jnp.zeros((inputs[0].shape[1], *table_VD.shape[-2:]), jnp.float32)
        dw_RVD = constrain(dw_RVD, "groups", "vocab_act", None)
    dw_RVD, tiles = jax.lax.scan(tile, dw_RVD, (*inputs, teacher_tiles))
    dw_VD = None
    if dw_RVD is not None:
        # of copies for each group the gradients are not summed here, but once with those of lookups
        dw_VD = (sum_groups(dw_RVD) if table_VD.ndim == 2 else dw_RVD).astype(table_VD.dtype)
    dx_BTD, tokens = jax.tree.map(lambda x: merge_tiles(x, targets_BT.shape), tiles)
    return (weighted_total(tokens, weights_BT, teacher, config), tokens), (dx_BTD, dw_VD)


def _scale_gradients(softcap: float | None, config: LossConfig, gradients, cotangents):
    """Returns the gradients of the forward pass, scaled by the cotangent of the total: the backward pass."""
    del softcap, config
    scale = cotangent_of_total(cotangents)
    scaled = jax.tree.map(lambda x: (scale * x.astype(jnp.float32)).astype(x.dtype), gradients)
    return *scaled, None, None, None  # targets, weights and the teacher's outputs are data


# a gradient of our own: automatic differentiation would keep every tile's logits for the backward pass
total = objective(token_losses)
total.defvjp(_total_and_gradients, _scale_gradients, symbolic_zeros=True)


class _TileTargets(NamedTuple):
    """The soft targets of a tile, and the tokens that have any."""

    has_teacher_RK: Array
    soft: SoftTargets


class _Score(NamedTuple):
    """A tile's logits, their log-sum-exp, the losses (of shape [R, K]), and the teacher's part of the targets."""

    logits_RKV: Array
    lse_RK: Array
    tokens: TokenLosses
    mixture: TargetMixture | None


def _score(logits_RKV, targets_RK, tile_targets: Callable, config: LossConfig) -> _Score:
    """Returns the losses of a tile's tokens from its logits."""
    y_RKV = logits_RKV.astype(config.dtype)
    top_RK = jnp.max(y_RKV, axis=-1)
    lse_RK = top_RK + jnp.log(jnp.sum(jnp.exp(y_RKV - top_RK[..., None]), axis=-1))
    # a sum over V and not a lookup, which would gather the logits of a sharded vocabulary
    target_RK = jnp.sum(jnp.where(_is_target(targets_RK, y_RKV.shape[-1]), y_RKV, 0.0), axis=-1)
    tokens, targets = scores(lse_RK, target_RK, top_RK, config.dtype), tile_targets(y_RKV, lse_RK)
    if targets is None:
        return _Score(y_RKV, lse_RK, tokens, None)
    tokens = tokens._replace(divergence_BT=jnp.where(targets.has_teacher_RK, targets.soft.divergence_RK, 0.0))
    return _Score(y_RKV, lse_RK, tokens, TargetMixture(targets.has_teacher_RK, targets.soft.probs_RKV))


def _logits(x_RKD, w_VD, softcap: float | None):
    product = "RKD,VD->RKV" if w_VD.ndim == 2 else "RKD,RVD->RKV"
    y_RKV = jnp.einsum(product, x_RKD, w_VD, preferred_element_type=jnp.float32)
    return constrain(softcapped(y_RKV, softcap), "groups", None, "vocab_act")


def _teacher_tiles(teacher: TeacherOutputs | None, shape: tuple[int, ...], config: LossConfig) -> Any:
    """Returns the teacher's outputs for each token, in tiles; None without a teacher."""
    if teacher is None:
        return None
    # the head is the same for all tiles, and keys are split for each token
    per_token = teacher._replace(head=None, key=None)
    leaves, tree = jax.tree.flatten(per_token)
    tiles = jax.tree.unflatten(tree, split_into_tiles(tuple(leaves), config.tile_tokens))
    if teacher.key is None:
        return tiles
    return tiles._replace(key=token_keys(teacher.key, shape, config.tile_tokens))


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
    """Returns the table as tiles use it: whole along D, which FSDP shards, and gathered once for all tiles.

    One that lookups share is gathered already, as a copy for each group (lookup.share_tables).
    """
    w_VD = table_VD.astype(dtype)
    return constrain(w_VD, "vocab_act", None) if w_VD.ndim == 2 else w_VD
