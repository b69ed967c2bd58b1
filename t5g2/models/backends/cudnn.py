"""Attention by cuDNN's kernel (jax.nn.dot_product_attention), on NVIDIA GPUs from Hopper on, forward and backward.

Only where it is exact: bfloat16, heads of at most 256, no soft cap, no window but one before the query in
self-attention. All sources are one sequence of keys under one call, because the log-sum-exp that cuDNN returns has no
gradient, so two calls cannot be combined. Segments are a boolean mask of queries x keys: one byte a pair, which no
layer keeps.

It has not run on a GPU yet. Its arithmetic is compared with the reference through the implementation of the same call
in XLA (tests).

B batch, T queries, S keys of all sources, N query heads, K key/value heads, H head size.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5g2.core.batch import Sequences
from t5g2.models.backends import columns, reference
from t5g2.models.backends.site import Site
from t5g2.models.kept import kept
from t5g2.models.masks import Keys, Mask

MOST_PAIRS = 2**30  # of queries and keys on one device, in the mask of segments: 1 GiB
HOPPER = 9.0  # compute capability; before it, backward is limited to heads of 128


def compute_capability() -> float:
    """Returns the compute capability of the first GPU; without any, as where a dry run simulates them, HOPPER."""
    try:
        devices = jax.devices("gpu")
    except RuntimeError:
        return HOPPER
    return float(devices[0].compute_capability)


def refusal(site: Site) -> str | None:
    """Returns why cuDNN cannot compute attention at this site exactly; None if it can."""
    if (capability := compute_capability()) < HOPPER:
        return f"heads of 256 need compute capability {HOPPER}, and this GPU has {capability}"
    if site.dtype != "bfloat16":
        return f"it computes in bfloat16, and these are {site.dtype}"
    if site.head_size > 256 or site.head_size % 8:
        return f"its heads are multiples of 8 up to 256, and these are {site.head_size}"
    if site.softcap:
        return "it has no soft cap"
    if site.combined:
        return "it cannot combine the parts of a softmax that several devices hold"
    if site.score_offset:
        return "it adds nothing to the scores of a source"
    if site.blocks:
        return "its masks know no blocks of images or prefixes"
    if site.queries % 2 or sum(site.keys) % 2:
        return f"lengths must be even, and these are {site.queries} queries and {sum(site.keys)} keys"
    if any(mask.right is not None for mask in site.masks):
        return "it has no window after the query"
    if site.rows * site.queries * sum(site.keys) > MOST_PAIRS:
        return f"its mask would hold more than {MOST_PAIRS} pairs"
    windowed = any(mask.left is not None for mask in site.masks)
    if windowed and (len(site.masks) > 1 or site.own is None or site.keys != (site.queries,)):
        return "its window is that of self-attention alone, in rows that are whole on a device"
    return None


def attend(
    q_BTNH: Float[Array, "B T N H"],
    query: Sequences,
    sources: Sequence[tuple[Keys, Mask]],
    *,
    scale: float,
    softcap: float | None,
    dtype: str,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """Returns what `reference.attend` returns, up to rounding; the softmax is float32 whatever `dtype` is.

    Args:
      implementation: "xla" for the same arithmetic on any device.
    """
    assert softcap is None, softcap
    assert all(keys.score_offset is None for keys, _ in sources)
    del dtype
    k_BSKH, v_BSKH = columns.join([keys for keys, _ in sources])
    visible_BTS = jnp.concatenate([reference.visible(query, keys.tokens, mask) for keys, mask in sources], axis=2)
    # the same columns as the mask hides, but known to the kernel, which then computes only what is left
    (_, mask), alone = sources[0], len(sources) == 1 and sources[0][0].tokens is query
    in_columns = alone and mask.causal
    # jax's own code mixes types
    with jax.numpy_dtype_promotion("standard"):
        o_BTNH = jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            mask=visible_BTS[:, None],
            scale=scale,
            is_causal=in_columns,
            local_window_size=(mask.left, 0) if in_columns and mask.left is not None else None,
            implementation=implementation,
        )
    # where nothing is visible the kernel's weights mean nothing
    o_BTNH = jnp.where(jnp.any(visible_BTS, axis=-1)[:, :, None, None], o_BTNH, 0)
    return kept(columns.nan_unless_in_order(o_BTNH, query) if in_columns else o_BTNH)
