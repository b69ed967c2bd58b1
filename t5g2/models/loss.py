"""The loss head: cross-entropy of a large vocabulary, tile by tile, so that all logits never exist at once.

B rows, T length, D width, V vocabulary; R groups of rows (one per device that rows are cut over), K tokens of a tile in
one group. A tile's logits are float32, whatever the activations are, and so is everything made of them, unless a
setting says otherwise.

For training, gradients are made in the forward pass, while a tile's logits are there anyway: three matrix products per
tile instead of the four that recomputing logits in a backward pass takes (Liger Kernel, arXiv 2410.10989, section 3.2).

How it is cut over devices: a tile takes equally many positions of every row, so rows stay where they are. Each group of
rows adds up its own gradient of the table, and the groups are summed once, after the last tile. With the vocabulary cut
over devices, what crosses between them is a maximum and two sums per token, never a row of logits.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5g2.core import sharding
from t5g2.core.sharding import constrain
from t5g2.models import distillation as distill
from t5g2.models.distillation import Distillation, Teacher
from t5g2.models.layers import Head, Precision


class TokenLosses(NamedTuple):
    """What the loss is for each token, not weighted; without a gradient.

    Attributes:
      loss_BT: float32, -log p(target), in nats.
      z_BT: float32, the square of the log of the partition function.
      correct_BT: whether no token has a higher logit than the target (of equal ones, each would be correct).
      divergence_BT: float32, from a teacher's distribution, 0 where it has no answer; None = there is no teacher.
    """

    loss_BT: Float[Array, "B T"]
    z_BT: Float[Array, "B T"]
    correct_BT: Bool[Array, "B T"]
    divergence_BT: Float[Array, "B T"] | None = None


class LossSums(NamedTuple):
    """Weighted sums over tokens, never means, so that they can be added over microbatches, devices and batches.

    Attributes:
      total: float32, loss + z_loss * z: what is minimised, and the only field that has a gradient. With a teacher, the
        loss of the tokens that it answers is (1 - weight) * loss + weight * divergence.
      loss, z, correct: float32, the fields of TokenLosses, weighted and summed.
      weight: float32, the sum of the weights, which means are divided by.
      divergence, taught: float32, the divergence from a teacher, weighted and summed, and the sum of the weights of the
        tokens that it answers, which a mean of it is divided by; 0 without one.
      tokens: the losses of single tokens, not weighted.
    """

    total: Float[Array, ""]
    loss: Float[Array, ""]
    z: Float[Array, ""]
    correct: Float[Array, ""]
    weight: Float[Array, ""]
    divergence: Float[Array, ""]
    taught: Float[Array, ""]
    tokens: TokenLosses


class LossSettings(NamedTuple):
    """How the loss is computed.

    Attributes:
      tile_tokens: tokens per device whose logits exist at a time; at least one position of every row.
      z_loss: weight of log(Z)^2, which keeps logits from drifting (PaLM, arXiv 2204.02311, section 5: 1e-4).
      dtype: of logits, their softmax and the loss of a token (Compute.loss_dtype); sums over tokens are float32.
    """

    tile_tokens: int
    z_loss: float = 0.0
    dtype: Precision = "float32"


class _Settings(NamedTuple):
    softcap: float | None
    tile_tokens: int
    z_loss: float = 0.0
    dtype: Precision = "float32"
    distillation: Distillation | None = None


def tiled_cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    head: Head,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    settings: LossSettings,
    *,
    teacher: Teacher | None = None,
    distillation: Distillation | None = None,
) -> LossSums:
    """The loss of every token and its sums; `total` can be differentiated by hidden_BTD and the head's table.

    Args:
      targets_BT: token ids, from 0 to V - 1 also where the weight is 0.
      weights_BT: of each token's loss; 0 = it counts nowhere.
      teacher, distillation: whose distributions are learnt too, and how; both or neither.
    """
    static = _Settings(head.softcap, *settings, None if teacher is None else distillation)
    made: Any = _total(hidden_BTD, head.table_VD, targets_BT, weights_BT, jax.lax.stop_gradient(teacher), static)
    total, tokens = made
    tokens = jax.lax.stop_gradient(tokens)

    def weighed(x_BT: Array | None) -> Array:
        return jnp.zeros(()) if x_BT is None else jnp.sum(weights_BT * x_BT.astype(jnp.float32))

    return LossSums(
        total,
        weighed(tokens.loss_BT),
        weighed(tokens.z_BT),
        weighed(tokens.correct_BT),
        jnp.sum(weights_BT),
        weighed(tokens.divergence_BT),
        weighed(None if teacher is None else teacher.known_BT),
        tokens,
    )


def token_losses(
    hidden_BTD: Float[Array, "B T D"],
    head: Head,
    targets_BT: Int[Array, "B T"],
    *,
    tile_tokens: int,
    dtype: Precision = "float32",
) -> TokenLosses:
    """The loss of every token, for evaluation: as above, without the work for gradients, and without any."""
    settings = _Settings(head.softcap, tile_tokens, dtype=dtype)
    return jax.lax.stop_gradient(_token_losses(hidden_BTD, head.table_VD, targets_BT, None, settings))


def _token_losses(hidden_BTD, table_VD, targets_BT, teacher: Teacher | None, settings: _Settings) -> TokenLosses:
    w_VD, teach = _gathered(table_VD, hidden_BTD.dtype), _lessons(teacher, table_VD.shape[0], settings)

    def tile(_, cut):
        x_RKD, targets_RK, taught = cut
        return None, _score(x_RKD, w_VD, targets_RK, teach(taught), settings).tokens

    taught = _of_tokens(teacher, targets_BT.shape, settings)
    _, tokens = jax.lax.scan(tile, None, (*_cut((hidden_BTD, targets_BT), settings.tile_tokens), taught))
    return jax.tree.map(lambda x_nRK: _join(x_nRK, targets_BT.shape), tokens)


def answers(
    hidden_BTD: Float[Array, "B T D"], head: Head, *, how: Distillation, tile_tokens: int, key: Array | None = None
) -> distill.Answers:
    """What is kept of a model's distributions, to teach another one: [B, T, N], as models/distillation.py has it."""
    w_VD = _gathered(head.table_VD, hidden_BTD.dtype)

    def tile(_, cut):
        x_RKD, key = cut
        return None, distill.answers_of(_logits(x_RKD, w_VD, head.softcap), how, key=key)

    (x_nRKD,) = _cut((hidden_BTD,), tile_tokens)
    keys = None if key is None else _keys(key, hidden_BTD.shape[:2], tile_tokens)
    _, made = jax.lax.scan(tile, None, (x_nRKD, keys))
    return jax.tree.map(lambda x: _join(x, hidden_BTD.shape[:2]), made)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _total(
    hidden_BTD, table_VD, targets_BT, weights_BT, teacher: Teacher | None, settings: _Settings
) -> tuple[Array, TokenLosses]:
    tokens = _token_losses(hidden_BTD, table_VD, targets_BT, teacher, settings)
    return _weigh(tokens, weights_BT, teacher, settings), tokens


def _total_and_slopes(hidden_BTD, table_VD, targets_BT, weights_BT, teacher, settings: _Settings):
    """What `_total` returns, and its gradient by the hidden states and by the table."""
    w_VD, teach = _gathered(table_VD, hidden_BTD.dtype), _lessons(teacher, table_VD.shape[0], settings)

    def tile(dw_RVD, cut):
        x_RKD, targets_RK, weights_RK, taught = cut
        score = _score(x_RKD, w_VD, targets_RK, teach(taught), settings)
        # matrix products of float32 slopes would take several times as long where activations are bfloat16
        slope_RKV = _slope(score, targets_RK, weights_RK, settings).astype(x_RKD.dtype)
        dx_RKD = jnp.einsum("RKV,VD->RKD", slope_RKV, w_VD, preferred_element_type=jnp.float32)
        dw_RVD = dw_RVD + jnp.einsum("RKV,RKD->RVD", slope_RKV, x_RKD, preferred_element_type=jnp.float32)
        return constrain(dw_RVD, "rows", "vocab_act", None), (dx_RKD.astype(x_RKD.dtype), score.tokens)

    cut = _cut((hidden_BTD, targets_BT, weights_BT), settings.tile_tokens)
    taught = _of_tokens(teacher, targets_BT.shape, settings)
    zeros_RVD = jnp.zeros((cut[0].shape[1], *table_VD.shape), jnp.float32)
    dw_RVD, made = jax.lax.scan(tile, constrain(zeros_RVD, "rows", "vocab_act", None), (*cut, taught))
    dw_VD = constrain(jnp.sum(dw_RVD, axis=0), "vocab", "embed")
    dx_BTD, tokens = jax.tree.map(lambda x: _join(x, targets_BT.shape), made)
    return (_weigh(tokens, weights_BT, teacher, settings), tokens), (dx_BTD, dw_VD.astype(table_VD.dtype))


def _scale_slopes(settings: _Settings, slopes, cotangents):
    del settings
    scale, _ = cotangents
    scaled = [(scale * x.astype(jnp.float32)).astype(x.dtype) for x in slopes]
    return *scaled, None, None, None  # targets, weights and a teacher are data


_total.defvjp(_total_and_slopes, _scale_slopes)


class _Lesson(NamedTuple):
    """What a tile is taught of a teacher's, and where."""

    known_RK: Array
    lesson: distill.Lesson


class _Score(NamedTuple):
    logits_RKV: Array
    lse_RK: Array
    tokens: TokenLosses  # of shape [R, K] here
    taught: _Lesson | None


def _score(x_RKD, w_VD, targets_RK, teach: Callable, settings: _Settings) -> _Score:
    """The logits of one tile and the losses of its tokens."""
    y_RKV = _logits(x_RKD, w_VD, settings.softcap).astype(settings.dtype)
    top_RK = jnp.max(y_RKV, axis=-1)
    lse_RK = top_RK + jnp.log(jnp.sum(jnp.exp(y_RKV - top_RK[..., None]), axis=-1))
    # a sum over V and not a lookup, which would bring logits of a cut vocabulary together
    target_RK = jnp.sum(jnp.where(_is_target(targets_RK, y_RKV.shape[-1]), y_RKV, 0.0), axis=-1)
    loss_RK, z_RK = (x_RK.astype(jnp.float32) for x_RK in (lse_RK - target_RK, jnp.square(lse_RK)))
    tokens, taught = TokenLosses(loss_RK, z_RK, target_RK >= top_RK), teach(y_RKV, lse_RK)
    if taught is not None:
        tokens = tokens._replace(divergence_BT=jnp.where(taught.known_RK, taught.lesson.divergence_RK, 0.0))
    return _Score(y_RKV, lse_RK, tokens, taught)


def _logits(x_RKD, w_VD, softcap: float | None):
    y_RKV = jnp.einsum("RKD,VD->RKV", x_RKD, w_VD, preferred_element_type=jnp.float32)
    return constrain(y_RKV if softcap is None else softcap * jnp.tanh(y_RKV / softcap), "rows", None, "vocab_act")


def _slope(score: _Score, targets_RK, weights_RK, settings: _Settings):
    """The gradient of the tile's weighted loss by what its logits were before the softcap."""
    y_RKV, lse_RK, _, taught = score
    p_RKV = jnp.exp(y_RKV - lse_RK[..., None])
    of_target_RK = weights_RK.astype(p_RKV.dtype)
    of_p_RK = of_target_RK * (1.0 + 2.0 * settings.z_loss * lse_RK)
    slope_RKV = of_p_RK[..., None] * p_RKV
    if taught is not None:
        assert settings.distillation is not None
        share_RK = jnp.where(taught.known_RK, settings.distillation.weight, 0.0).astype(p_RKV.dtype)
        slope_RKV = slope_RKV - (share_RK * of_target_RK)[..., None] * taught.lesson.aim_RKV.astype(p_RKV.dtype)
        of_target_RK = (1.0 - share_RK) * of_target_RK
    slope_RKV = jnp.where(_is_target(targets_RK, p_RKV.shape[-1]), slope_RKV - of_target_RK[..., None], slope_RKV)
    if settings.softcap is not None:
        slope_RKV = slope_RKV * (1.0 - jnp.square(y_RKV / settings.softcap))
    return constrain(slope_RKV, "rows", None, "vocab_act")


def _weigh(tokens: TokenLosses, weights_BT, teacher: Teacher | None, settings: _Settings):
    loss_BT = tokens.loss_BT
    if teacher is not None and settings.distillation is not None and tokens.divergence_BT is not None:
        share = settings.distillation.weight
        loss_BT = jnp.where(teacher.known_BT, (1.0 - share) * loss_BT + share * tokens.divergence_BT, loss_BT)
    return jnp.sum(weights_BT * (loss_BT + settings.z_loss * tokens.z_BT))


def _of_tokens(teacher: Teacher | None, shape: tuple[int, ...], settings: _Settings) -> Any:
    """What a teacher has for each token, in tiles; None without a teacher."""
    if teacher is None:
        return None
    per_token = teacher._replace(head=None, key=None)
    leaves, tree = jax.tree.flatten(per_token)
    cut = jax.tree.unflatten(tree, _cut(tuple(leaves), settings.tile_tokens))
    if teacher.key is None:
        return cut
    return cut._replace(key=_keys(teacher.key, shape, settings.tile_tokens))


def _keys(key: Array, shape: tuple[int, ...], tile_tokens: int) -> Array:
    """A key for each token, in tiles: what is drawn for a token is the same however the tokens are cut."""
    data_BTW = jax.random.key_data(jax.random.split(key, shape))
    return jax.random.wrap_key_data(_cut((data_BTW,), tile_tokens)[0], impl=jax.random.key_impl(key))


def _lessons(teacher: Teacher | None, vocab_size: int, settings: _Settings) -> Callable:
    """A function from what a teacher has for a tile to one from the student's logits to the tile's lesson, or None."""
    how, head = settings.distillation, None if teacher is None else teacher.head
    if teacher is None or how is None:
        return lambda _: lambda y_RKV, lse_RK: None
    of_teacher = None
    if head is not None and teacher.hidden_BTD is not None:
        of_teacher = _gathered(head.table_VD[:vocab_size], teacher.hidden_BTD.dtype)

    def teach(taught: Teacher) -> Callable:
        def lesson(y_RKV, lse_RK) -> _Lesson:
            y_RKV, lse_RK = y_RKV.astype(jnp.float32), lse_RK.astype(jnp.float32)
            if taught.answers is not None:
                return _Lesson(taught.known_BT, distill.of_answers(taught.answers, y_RKV, lse_RK, how))
            assert head is not None
            logits_RKV = _logits(taught.hidden_BTD, of_teacher, head.softcap)
            return _Lesson(taught.known_BT, distill.of_logits(logits_RKV, y_RKV, lse_RK, how, key=taught.key))

        return lesson

    return teach


def _is_target(targets_RK, vocab_size: int):
    return targets_RK[..., None] == jnp.arange(vocab_size, dtype=targets_RK.dtype)[None, None, :]


def _gathered(table_VD, dtype):
    """The table as the tiles use it: whole along D, which FSDP cuts, and gathered once for all tiles."""
    return constrain(table_VD.astype(dtype), "vocab_act", None)


def _cut(arrays: tuple[Array, ...], tile_tokens: int) -> tuple[Array, ...]:
    """[B, T, …] as tiles [n, R, K, …] of T / n positions of every row; T is padded with zeros to a multiple of n."""
    rows, length = arrays[0].shape[:2]
    groups = sharding.parts("rows", rows)
    tiles, width = _tiling(rows // groups, length, tile_tokens)

    def cut(x):
        inner = x.shape[2:]
        x = jnp.pad(x, [(0, 0), (0, tiles * width - length)] + [(0, 0)] * len(inner))
        x = jnp.moveaxis(x.reshape(groups, rows // groups, tiles, width, *inner), 2, 0)
        x = x.reshape(tiles, groups, rows // groups * width, *inner)
        return constrain(x, None, "rows", *(None,) * (x.ndim - 2))

    return tuple(cut(x) for x in arrays)


def _join(x, shape: tuple[int, ...]):
    """The inverse of `_cut`: [n, R, K, …] as [B, T, …], without the padding."""
    rows, length = shape
    tiles, groups, _, *inner = x.shape
    x = jnp.moveaxis(x.reshape(tiles, groups, rows // groups, -1, *inner), 0, 2)
    x = x.reshape(rows, -1, *inner)[:, :length]
    return constrain(x, "rows", *(None,) * (x.ndim - 1))


def _tiling(rows: int, length: int, tile_tokens: int) -> tuple[int, int]:
    """How many tiles, and positions of each row in one: as few tiles as tile_tokens allows, all of one size."""
    tiles = math.ceil(length / max(1, min(length, tile_tokens // rows)))
    return tiles, math.ceil(length / tiles)
