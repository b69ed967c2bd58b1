"""Attention in blocks against dense attention: local and global layers of the 270M shape, forward and backward.

One row of 8,192 tokens, 4 query heads and 1 key/value head of 256, float32. Dense attention is the reference backend,
and beside it that of jax itself (jax.nn.dot_product_attention with a mask), which nobody here wrote.

Must (aim): local layers 6x (10x) as fast as dense, with 0.1x (0.05x) of the temporary memory, and twice the length at
most 2.2x (2.0x) as dear; global layers 1.3x (1.5x) as fast with 0.1x of the memory. A global layer without a mask is
bound by its matrix products, of which dense attention has six (it keeps the weights) and one in blocks has seven; the
last columns are FLOP/s of these products, over those of a float32 matrix product of the same run.
"""

import jax
import jax.numpy as jnp
from measure import Cost, measure, table, write

from t5g2.core import device
from t5g2.core.batch import Sequences
from t5g2.models import masks
from t5g2.models.backends import blockwise, reference
from t5g2.models.masks import ALL, Keys, Mask

HEADS, SIZE, WINDOW, LENGTH = 4, 256, 512, 8192
NOTES = """Global attention of both sides is not faster in blocks where dense attention fits: each is bound by its
matrix products, of which a block's backward pass computes one more, the scores. Blocks save memory there, and are twice
as fast where half of them are masked (global, causal). A local layer computes what its windows meet, and is faster by
five to ten times; runs of one day have given 0.7 and 1.0 s for the same layer, so its ratio is known to a third."""
PRODUCTS = {"dense": 6, "blockwise": 7}  # of queries x keys x head size: scores and output, and their gradients


def arguments(length: int):
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(
        jax.random.normal(key, (1, length, heads, SIZE)) for key, heads in zip(keys, (HEADS, 1, 1, HEADS), strict=True)
    )


def of_jax(q_BTNH, query, sources, *, scale, softcap, dtype):
    del softcap, dtype
    [(keys, mask)] = sources
    visible_B1TS = reference.visible(query, keys.tokens, mask)[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH, keys.k_BSKH, keys.v_BSKH, mask=visible_B1TS, scale=scale, implementation="xla"
    )


def gradients(attend, mask: Mask):
    """The gradients by queries, keys and values."""

    def run(q_BTNH, k_BSKH, v_BSKH, do_BTNH):
        ones = jnp.ones(q_BTNH.shape[:2], jnp.int32)
        tokens = Sequences(ones, ones, jnp.arange(ones.shape[1])[None])

        def total(q_BTNH, k_BSKH, v_BSKH):
            sources = [(Keys(k_BSKH, v_BSKH, tokens), mask)]
            o_BTNH = attend(q_BTNH, tokens, sources, scale=SIZE**-0.5, softcap=None, dtype="float32")
            return jnp.sum(o_BTNH * do_BTNH)

        return jax.grad(total, argnums=(0, 1, 2))(q_BTNH, k_BSKH, v_BSKH)

    return run


KINDS = {
    "local, both sides": masks.bidirectional(WINDOW),
    "local, causal": masks.causal(WINDOW),
    "global, both sides": ALL,
    "global, causal": masks.causal(),
}


def against_dense(kind: str, matmul: float) -> tuple:
    """The row of a kind of layer."""
    mask, values = KINDS[kind], arguments(LENGTH)
    functions = {"dense": reference.attend, "jax": of_jax, "blockwise": blockwise.attend}
    costs = measure({name: (gradients(attend, mask), values) for name, attend in functions.items()}, calls=2)
    dense, blocks = costs["dense"], costs["blockwise"]
    # what is visible is what a dense layer computes only if nothing is hidden
    shares = ["", ""]
    if mask == ALL:
        flops = 2 * HEADS * SIZE * LENGTH**2
        shares = [f"{count * flops / costs[name].wall / matmul:.0%}" for name, count in PRODUCTS.items()]
    return (
        kind,
        *map(in_figures, costs.values()),
        f"{dense.wall / blocks.wall:.1f}x",
        f"{dense.cpu / blocks.cpu:.1f}x",
        f"{costs['jax'].cpu / blocks.cpu:.1f}x",
        f"{blocks.temporary / dense.temporary:.3f}x",
        *shares,
    )


def in_figures(cost: Cost) -> str:
    return f"{cost.wall:.2f} / {cost.cpu:.2f} / {cost.temporary / 2**20:.0f}"


def doubled(kind: str) -> tuple:
    """The row of a kind of layer: the length against half of it, in turn; the cheaper a call, the more of them."""
    lengths = {"whole": LENGTH, "half": LENGTH // 2}
    run = gradients(blockwise.attend, KINDS[kind])
    calls = 10 if kind.startswith("local") else 2
    costs = measure({name: (run, arguments(length)) for name, length in lengths.items()}, calls=calls)
    whole, half = costs["whole"], costs["half"]
    ratios = (f"{getattr(whole, field) / getattr(half, field):.2f}x" for field in Cost._fields)
    return kind, in_figures(whole), in_figures(half), *ratios


def main():
    matmul = device.measure_matmul(2048)
    write(
        "attention",
        f"Attention, forward and backward, {LENGTH} tokens, window {WINDOW}",
        "Seconds by the clock / CPU seconds / MiB of temporary arrays.",
        table(
            (
                *("layer", "dense", "dense, of jax", "blockwise", "faster", "faster, CPU", "than jax's, CPU"),
                *("temporary", "dense, of matmul", "blockwise, of matmul"),
            ),
            [against_dense(kind, matmul) for kind in KINDS],
        ),
        f"Cost of {LENGTH} tokens over that of {LENGTH // 2}, blockwise:",
        table(
            ("layer", f"{LENGTH}", f"{LENGTH // 2}", "seconds", "CPU seconds", "temporary"),
            [doubled(kind) for kind in KINDS],
        ),
        NOTES,
    )


if __name__ == "__main__":
    main()
