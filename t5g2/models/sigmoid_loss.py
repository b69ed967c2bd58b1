"""The sigmoid loss of image-text pairs, block by block, so that the logits of all pairs never exist at once.

N pairs of the global batch, of which each of R devices holds M = N / R; C texts of a tile, D width. Source: SigLIP
(arXiv 2303.15343), equation 1 and section 3.3.

    loss = 1/N * sum over i, j of log(1 + exp(-z_ij * (exp(scale) * text_i . image_j + bias)))
    z_ij = 1 if i = j else -1

How it is cut over devices: images stay where they are, and texts go round. In each of R rounds a device scores its M
images against the M texts it holds, C of them at a time, and hands the texts on to its neighbour. With R = 3, the texts
that a device holds, by their first owner:

    round       0  1  2
    device 0    0  1  2
    device 1    1  2  0
    device 2    2  0  1

The gradients are made in the same sweep, while a tile's logits are there: that of the texts travels with them and is
home after the last round. So a device holds logits [M, C] and embeddings [M, D], never [M, N] or [N, D].
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from t5g2.core import sharding as meshes


def sigmoid_loss(
    texts_ND: Float[Array, "N D"],
    images_ND: Float[Array, "N D"],
    *,
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    chunk: int,
) -> Float[Array, ""]:
    """float32: the mean over rows of the sum over columns of every pair's loss, in nats.

    It depends on the batch as a whole, because every row is a negative of every other: microbatches have another loss.
    Computed in float32, products in full precision whatever the accelerator's default is.

    Args:
      texts_ND, images_ND: embeddings of length 1; row i of both is a pair. Cut over the devices of the mesh that is set
        as core/sharding.py cuts rows, or over fewer of its axes if their number does not divide N.
      logit_scale, logit_bias: the model's scalars; the scale is a logarithm.
      chunk: C, texts that are scored at a time on each device.

    Raises:
      ValueError: texts and images do not pair up, or chunk is below 1.
    """
    if texts_ND.shape != images_ND.shape or texts_ND.ndim != 2:
        raise ValueError(
            f"texts {texts_ND.shape} and images {images_ND.shape}; both must be [N, D], row i of both a pair"
        )
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}; it must be at least 1")
    return _loss(texts_ND, images_ND, logit_scale, logit_bias, chunk)


class _Plan(NamedTuple):
    """How the pairs are gone through, and whether gradients are made on the way.

    Attributes:
      axes: of the mesh, over which the rows are cut.
      pairs, chunk: N and C.
    """

    axes: tuple[str, ...]
    pairs: int
    chunk: int
    slopes: bool


class _Sums(NamedTuple):
    """Of all pairs that were scored: the loss and what it changes by."""

    loss: Array
    images: Array
    scale: Array
    bias: Array


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(texts_ND, images_ND, logit_scale, logit_bias, chunk: int) -> Array:
    return _sweep(texts_ND, images_ND, logit_scale, logit_bias, chunk=chunk, slopes=False)[0]


def _loss_and_slopes(texts_ND, images_ND, logit_scale, logit_bias, chunk: int):
    loss, *slopes = _sweep(texts_ND, images_ND, logit_scale, logit_bias, chunk=chunk, slopes=True)
    inputs = (texts_ND, images_ND, logit_scale, logit_bias)
    return loss, tuple(slope.astype(x.dtype) for slope, x in zip(slopes, inputs, strict=True))


def _scale_slopes(chunk: int, slopes, cotangent):
    del chunk
    return tuple((cotangent * slope.astype(jnp.float32)).astype(slope.dtype) for slope in slopes)


_loss.defvjp(_loss_and_slopes, _scale_slopes)


def _sweep(texts_ND, images_ND, logit_scale, logit_bias, *, chunk: int, slopes: bool) -> tuple[Array, ...]:
    """The loss, and with `slopes` what it changes by: texts, images, scale and bias."""
    inputs = [x.astype(jnp.float32) for x in (texts_ND, images_ND, logit_scale, logit_bias)]
    pairs = len(texts_ND)
    plan = _Plan(_axes(pairs), pairs, chunk, slopes)
    rounds = partial(_rounds, plan=plan)
    if not plan.axes:
        return rounds(*inputs)
    rows, whole = P(plan.axes), P()
    out = (whole, rows, rows, whole, whole) if slopes else (whole,)
    # nothing is differentiated in there, so that nothing need be known of what varies over which axis
    return jax.shard_map(rounds, in_specs=(rows, rows, whole, whole), out_specs=out, check_vma=False)(*inputs)


def _rounds(texts_MD, images_MD, scale, bias, *, plan: _Plan) -> tuple[Array, ...]:
    """What one device does; the sums of all of them."""
    axes, pairs, rows = plan.axes, plan.pairs, len(texts_MD)
    devices = pairs // rows
    plan = plan._replace(chunk=min(plan.chunk, rows))
    texts_MD = jnp.pad(texts_MD, ((0, -rows % plan.chunk), (0, 0)))  # whole tiles; what is added counts nowhere
    onward = [((device + 1) % devices, device) for device in range(devices)]

    def hand_on(x):
        return jax.lax.ppermute(x, axes, onward) if axes else x

    def one_round(carry, number):
        sums, texts_MD, slope_MD = carry
        coming_MD = hand_on(texts_MD)  # on its way while these are scored
        sums, made_MD = _tiles(sums, texts_MD, images_MD, (scale, bias), own=number == 0, plan=plan)
        return (sums, coming_MD, hand_on(slope_MD + made_MD) if plan.slopes else slope_MD), None

    zero = jnp.zeros((), jnp.float32)
    start = _Sums(zero, jnp.zeros_like(images_MD) if plan.slopes else zero, zero, zero)
    slope_MD = jnp.zeros_like(texts_MD) if plan.slopes else zero
    (sums, _, slope_MD), _ = jax.lax.scan(one_round, (start, texts_MD, slope_MD), jnp.arange(devices))

    def total(x):
        return (jax.lax.psum(x, axes) if axes else x) / pairs

    if not plan.slopes:
        return (total(sums.loss),)
    return total(sums.loss), slope_MD[:rows] / pairs, sums.images / pairs, total(sums.scale), total(sums.bias)


def _tiles(
    sums: _Sums, texts_MD, images_MD, scalars: tuple[Array, Array], *, own: Array, plan: _Plan
) -> tuple[_Sums, Any]:
    """The sums with these texts added; and what the loss changes by with each of them, [M, D], None without slopes.

    `own` = the texts are those of the images, in order: the i-th of both is a pair.
    """
    rows, width = images_MD.shape
    factor, bias = jnp.exp(scalars[0]), scalars[1]
    product = partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)

    def tile(sums, cut):
        text_CD, number = cut
        column_C = number * plan.chunk + jnp.arange(plan.chunk)
        pair_MC = own & (jnp.arange(rows)[:, None] == column_C[None, :])
        counts_MC = jnp.broadcast_to((column_C < rows)[None, :], pair_MC.shape)
        cosine_MC = product("MD,CD->MC", images_MD, text_CD)
        sign_MC = jnp.where(pair_MC, 1.0, -1.0)
        y_MC = sign_MC * (cosine_MC * factor + bias)
        sums = sums._replace(loss=sums.loss + jnp.sum(jnp.where(counts_MC, jax.nn.softplus(-y_MC), 0.0)))
        if not plan.slopes:
            return sums, None
        slope_MC = jnp.where(counts_MC, -sign_MC * jax.nn.sigmoid(-y_MC), 0.0)
        sums = sums._replace(
            images=sums.images + factor * product("MC,CD->MD", slope_MC, text_CD),
            scale=sums.scale + factor * jnp.sum(slope_MC * cosine_MC),
            bias=sums.bias + jnp.sum(slope_MC),
        )
        return sums, factor * product("MC,MD->CD", slope_MC, images_MD)

    cut = (texts_MD.reshape(-1, plan.chunk, width), jnp.arange(len(texts_MD) // plan.chunk))
    made: Any
    sums, made = jax.lax.scan(tile, sums, cut)
    return sums, made.reshape(texts_MD.shape) if plan.slopes else None


def _axes(pairs: int) -> tuple[str, ...]:
    """The axes of the mesh that is set over which so many rows are cut."""
    mesh = jax.sharding.get_abstract_mesh().shape
    axes, devices = (), meshes.parts("rows", pairs)
    for axis in meshes.RULES["rows"]:
        if devices > 1 and axis in mesh and mesh[axis] > 1:
            axes, devices = (*axes, axis), devices // mesh[axis]
    return axes
