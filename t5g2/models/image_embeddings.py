"""Images in a language model: the outputs of the tower and the projector replace the embeddings of image tokens.

B rows, I images per row, K tokens per image, T length, D width. The j-th image of a row replaces the j-th group of K
image tokens in the row; a row may have fewer groups than others, and surplus images are not used. Images are counted by
row, not over the whole batch as in transformers, so a row's images are on the device of the row.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from t5g2.core.batch import Sequences
from t5g2.core.scopes import scope
from t5g2.core.sharding import constrain
from t5g2.models.config import ImageConfig
from t5g2.models.layers import Compute, Embedder
from t5g2.models.siglip import Projector, VisionTower

# 1 / 127.5 as a sum; the first term has 16 bits, so its product with a byte is exact in float32
LARGE = np.float32(32896 / 2**22)
SMALL = np.float32(1 / 127.5 - 32896 / 2**22)


@scope("vision")
def normalized(images_BIHWC: UInt8[Array, "B I H W 3"] | None) -> Float[Array, "B I H W 3"] | None:
    """Returns x / 127.5 - 1, in [-1, 1], equal to data.images.preprocess bit for bit; None if there are no images."""
    if images_BIHWC is None:
        return None
    # XLA would replace a division by a product with 1 / 127.5, which differs for 111 of the 256 bytes
    x_BIHWC = images_BIHWC.astype(jnp.float32)
    return x_BIHWC * LARGE + x_BIHWC * SMALL - jnp.float32(1)


@scope("embed")
def embed(
    model: Any,
    embedder: Embedder,
    config: ImageConfig | None,
    tokens_BT: Int[Array, "B T"],
    images_BIHWC: Float[Array, "B I H W 3"] | None,
    *,
    axis: str = "length",
    compute: Compute,
) -> Float[Array, "B T D"]:
    """Returns token embeddings, with images in the place of image tokens.

    Args:
      model: has `vision` and `projector`, if there are images.
      axis: logical axis of the tokens.

    Raises:
      ValueError: images for a model without a vision tower.
    """
    lookup_BT = tokens_BT
    if config is not None and config.token >= embedder.vocab_size:
        # the image token has no row in the table, and its embedding is not used
        lookup_BT = jnp.where(tokens_BT == config.token, 0, tokens_BT)
    x_BTD = embedder.embed(lookup_BT, axis=axis, dtype=jnp.dtype(compute.dtype))
    if images_BIHWC is not None:
        if config is None:
            raise ValueError("images were given to a model without a vision tower; build it with config.images")
        soft_BKD = soft_tokens(model.vision, model.projector, images_BIHWC, compute=compute)
        x_BTD = insert(x_BTD, tokens_BT, soft_BKD, token=config.token)
    return constrain(x_BTD, "rows", axis, "embed_act")


def with_blocks(tokens: Sequences, config: ImageConfig) -> Sequences:
    """Returns the tokens with each image as a block; tokens that have blocks already are returned unchanged.

    The same as core.batch.image_blocks, but works under jit.
    """
    if tokens.blocks is not None:
        return tokens
    image_BT = jnp.asarray(tokens.tokens) == config.token
    starts_BT = image_BT & ~jnp.pad(image_BT[:, :-1], ((0, 0), (1, 0)))
    return tokens._replace(blocks=jnp.where(image_BT, jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32), 0))


def soft_tokens(
    tower: VisionTower, projector: Projector, images_BIHWC: Float[Array, "B I H W 3"], *, compute: Compute
) -> Float[Array, "B IK D"]:
    """Returns the embeddings of each row's images, concatenated, in compute.dtype; not scaled by sqrt(D)."""
    rows, per_row = images_BIHWC.shape[:2]
    patches_NPD = tower.encode(images_BIHWC.reshape(rows * per_row, *images_BIHWC.shape[2:]), compute=compute)
    soft_NKD = projector.project(patches_NPD, compute=compute)
    soft_BKD = soft_NKD.reshape(rows, -1, soft_NKD.shape[-1]).astype(compute.dtype)
    return constrain(soft_BKD, "rows", "length", "embed_act")


def insert(
    x_BTD: Float[Array, "B T D"], tokens_BT: Int[Array, "B T"], soft_BKD: Float[Array, "B IK D"], *, token: int
) -> Float[Array, "B T D"]:
    """Returns x with the k-th occurrence of `token` in each row replaced by the row's k-th soft token.

    tokens [5 8 8 9 8], token = 8: positions 1, 2 and 4 get the row's soft tokens 0, 1 and 2.
    """
    image_BT = tokens_BT == token
    # clipped to valid indices; soft tokens that are gathered at other tokens are not used
    index_BT = jnp.clip(jnp.cumsum(image_BT, axis=1) - 1, 0, soft_BKD.shape[1] - 1)
    gathered_BTD = jnp.take_along_axis(soft_BKD, index_BT[:, :, None], axis=1)
    return jnp.where(image_BT[:, :, None], gathered_BTD, x_BTD)
