"""Memory of long encoder rows of T5Gemma 2 270M-270M (text, float32): weights, results and what XLA sets aside.

    python bench/long_rows.py                  compiles; nothing runs, so it takes seconds
    python bench/long_rows.py 32768 run        forward and backward: prints the time, and the peak of the process
    python bench/long_rows.py 131072 forward   forward alone: half an hour on two cores

Must: 32K forward and backward below 8 GB, 128K forward below 12 GB.
"""

import sys
import time

import jax
import jax.numpy as jnp
from measure import GIB, table, write

from t5g2.core import device
from t5g2.core.batch import Sequences
from t5g2.models import build
from t5g2.models.config import text_only
from t5g2.models.layers import Compute
from t5g2.models.sizes import size

COMPUTE = Compute(dtype="float32", remat="block")
PROGRAMS = [(32768, True), (131072, False), (131072, True)]


def tokens(length: int) -> Sequences:
    ones = jnp.ones((1, length), jnp.int32)
    return Sequences(ones * 9, ones, jnp.arange(length, dtype=jnp.int32)[None])


def forward(model, encoder):
    return jnp.sum(jnp.square(model.encode(encoder, compute=COMPUTE)))


def program(length: int, *, backward: bool):
    """The compiled program: the sum of squares of the encoder's states, or its gradient by the encoder's weights."""
    abstract = build.abstract(text_only(size("t5gemma2:270m-270m")))
    run = jax.grad(forward) if backward else forward
    return jax.jit(run).lower(abstract, jax.eval_shape(lambda: tokens(length))).compile()


def main():
    rows = []
    for length, backward in PROGRAMS:
        memory = program(length, backward=backward).memory_analysis()
        parts = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
        kind = "forward and backward" if backward else "forward"
        rows.append((f"{length:,}", kind, *(f"{part / GIB:.2f}" for part in (*parts, sum(parts)))))
    write(
        "long_rows",
        "Memory of long encoder rows, in GiB",
        table(("tokens", "", "weights", "results", "temporary", "in all"), rows),
    )


def run(length: int, *, backward: bool):
    model = build.make(text_only(size("t5gemma2:270m-270m")), key=jax.random.key(0))
    compiled, start = program(length, backward=backward), time.perf_counter()
    jax.block_until_ready(compiled(model, tokens(length)))
    peak = device.memory_gib()["memory/host_gib"]
    kind = "forward and backward" if backward else "forward"
    print(f"{length} tokens, {kind}: {time.perf_counter() - start:.0f} s, peak {peak:.2f} GiB")


if __name__ == "__main__":
    if sys.argv[2:] in (["run"], ["forward"]):
        run(int(sys.argv[1]), backward=sys.argv[2] == "run")
    else:
        main()
