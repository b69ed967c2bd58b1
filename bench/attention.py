"""Attention in blocks against the dense reference: local and global layers of the 270M shape, forward and backward.

One row of 8,192 tokens, 4 query heads and 1 key/value head of 256, float32.
"""

import jax
import jax.numpy as jnp
from measure import measure, table, write

from t5g2.core.batch import Sequences
from t5g2.models import masks
from t5g2.models.backends import blockwise, reference
from t5g2.models.masks import ALL, Keys, Mask

HEADS, SIZE, WINDOW, LENGTH = 4, 256, 512, 8192


def arguments(length: int):
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(
        jax.random.normal(key, (1, length, heads, SIZE)) for key, heads in zip(keys, (HEADS, 1, 1, HEADS), strict=True)
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


def main():
    rows, doubled = [], []
    for kind, mask in KINDS.items():
        whole = arguments(LENGTH)
        costs = measure(
            {
                "dense": (gradients(reference.attend, mask), whole),
                "blockwise": (gradients(blockwise.attend, mask), whole),
                "half": (gradients(blockwise.attend, mask), arguments(LENGTH // 2)),
            },
            calls=2,
        )
        dense, blocks, half = costs.values()
        rows.append(
            (
                kind,
                f"{dense.wall:.2f} / {dense.cpu:.2f} / {dense.temporary / 2**20:.0f}",
                f"{blocks.wall:.2f} / {blocks.cpu:.2f} / {blocks.temporary / 2**20:.0f}",
                f"{dense.wall / blocks.wall:.1f}x",
                f"{dense.cpu / blocks.cpu:.1f}x",
                f"{blocks.temporary / dense.temporary:.3f}x",
            )
        )
        doubled.append((kind, f"{blocks.cpu / half.cpu:.2f}x", f"{blocks.temporary / half.temporary:.2f}x"))
    write(
        "attention",
        f"Attention, forward and backward, {LENGTH} tokens, window {WINDOW}",
        "Seconds by the clock / CPU seconds / MiB of temporary arrays.",
        table(("layer", "dense", "blockwise", "faster", "faster, CPU", "temporary"), rows),
        f"Cost of {LENGTH} tokens over that of {LENGTH // 2}, blockwise:",
        table(("layer", "CPU seconds", "temporary"), doubled),
    )


if __name__ == "__main__":
    main()
