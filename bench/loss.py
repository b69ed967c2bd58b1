"""The loss head with a large vocabulary: in tiles against all logits at once, gradients by states and table included.

Time is the best of several calls, in turn, in CPU seconds where the CPU computes (its machine is often shared) and in
seconds elsewhere. Memory is what XLA sets aside beside arguments and results; on CPU, tiles have the size of the
table's gradient in it, because there a product cannot be added to what is already in memory.

With a teacher: run in the step (its states are given, its logits computed tile by tile), or cached, 256 tokens each.
"""

import time

import jax
import jax.numpy as jnp

from t5g2.models.distillation import Distillation, TeacherOutputs
from t5g2.models.layers import Head
from t5g2.models.loss import cross_entropy
from t5g2.models.loss_config import LossConfig
from t5g2.models.tiled_loss import sparse_distributions

ROWS, LENGTH, WIDTH, VOCAB = 8, 128, 256, 65536
TILES = (1024, 256, 128)


def naive(x_BTD, w_VD, targets_BT, weights_BT):
    y_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, w_VD, preferred_element_type=jnp.float32)
    picked_BT = jnp.take_along_axis(y_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(weights_BT * (jax.nn.logsumexp(y_BTV, axis=-1) - picked_BT))


def tiled(tile_tokens):
    def total(x_BTD, w_VD, targets_BT, weights_BT):
        return cross_entropy(x_BTD, Head(w_VD, None), targets_BT, weights_BT, LossConfig(tile_tokens=tile_tokens)).total

    return total


def distilled(how, *, cached: bool):
    """The largest tiles, and a teacher as wide as the student."""
    keys = jax.random.split(jax.random.key(1), 2)
    teacher = TeacherOutputs(
        jnp.ones((ROWS, LENGTH), bool),
        hidden_BTD=jax.random.normal(keys[0], (ROWS, LENGTH, WIDTH)),
        head=Head(0.05 * jax.random.normal(keys[1], (VOCAB, WIDTH)), None),
    )
    if cached:
        kept = sparse_distributions(teacher.hidden_BTD, teacher.head, distillation=how, tile_tokens=TILES[1])
        teacher = TeacherOutputs(teacher.has_teacher_BT, kept)

    def total(x_BTD, w_VD, targets_BT, weights_BT):
        config = LossConfig(tile_tokens=TILES[1], distillation=how)
        head = Head(w_VD, None)
        return cross_entropy(x_BTD, head, targets_BT, weights_BT, config, teacher=teacher).total

    return total


def main():
    keys = jax.random.split(jax.random.key(0), 3)
    arguments = (
        jax.random.normal(keys[0], (ROWS, LENGTH, WIDTH)),
        0.05 * jax.random.normal(keys[1], (VOCAB, WIDTH)),
        jax.random.randint(keys[2], (ROWS, LENGTH), 0, VOCAB),
        jnp.ones((ROWS, LENGTH)),
    )
    functions = {"all logits": naive} | {f"tiles of {tile} tokens": tiled(tile) for tile in TILES}
    top_k = Distillation(method="top_k", per_token=256, tail="together")
    functions |= {
        f"tiles of {TILES[1]}, whole distributions": distilled(Distillation(), cached=False),
        f"tiles of {TILES[1]}, top 256, in the step": distilled(top_k, cached=False),
        f"tiles of {TILES[1]}, top 256, cached": distilled(top_k, cached=True),
    }
    compiled = {n: jax.jit(jax.value_and_grad(f, (0, 1))).lower(*arguments).compile() for n, f in functions.items()}
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(4):
        for name, program in compiled.items():
            start = clock()
            jax.block_until_ready(program(*arguments))
            best[name] = min(best[name], clock() - start)
    memory = {name: program.memory_analysis() for name, program in compiled.items()}
    base = memory["all logits"].temp_size_in_bytes
    print(f"{ROWS * LENGTH} tokens, width {WIDTH}, vocabulary {VOCAB}, {jax.devices()[0].device_kind}")
    results, logits = memory["all logits"].output_size_in_bytes, 4 * ROWS * LENGTH * VOCAB
    print(f"results {results / 2**20:.0f} MiB, logits {logits / 2**20:.0f} MiB\n")
    print("| loss head | time | temporary memory | MiB |\n|---|---|---|---|")
    for name, seconds in best.items():
        size = memory[name].temp_size_in_bytes
        print(f"| {name} | {seconds / best['all logits']:.2f} | {size / base:.2f} | {size / 2**20:.0f} |")


if __name__ == "__main__":
    main()
