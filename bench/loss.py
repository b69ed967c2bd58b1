"""The loss head with a large vocabulary: both strategies, with gradients, against all logits at once.

Time is the best of several calls, in turn: CPU seconds where the CPU computes, because its machine is often shared, and
seconds elsewhere. Memory is what XLA sets aside beside arguments and results.

With a teacher: run in the step (its states are given), or cached, 256 tokens each; all relative to all logits at once
without a teacher.
"""

import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from t5g2.core.logs import log
from t5g2.core.logs import setup as setup_logs
from t5g2.models.distillation import Distillation, TeacherOutputs
from t5g2.models.layers import Head
from t5g2.models.loss import cross_entropy
from t5g2.models.loss_config import LossConfig
from t5g2.models.tiled_loss import sparse_distributions

OUT = Path(__file__).parent / "results" / "loss.md"
ROWS, REPEATS = 8, 3
NAIVE = "all logits"


def naive(x_BTD, w_VD, targets_BT, weights_BT):
    y_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, w_VD, preferred_element_type=jnp.float32)
    picked_BT = jnp.take_along_axis(y_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(weights_BT * (jax.nn.logsumexp(y_BTV, axis=-1) - picked_BT))


def total(config, teacher=None):
    def total(x_BTD, w_VD, targets_BT, weights_BT):
        return cross_entropy(x_BTD, Head(w_VD, None), targets_BT, weights_BT, config, teacher=teacher).total

    return total


def arguments(tokens, width, vocab):
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (ROWS, tokens // ROWS)
    return (
        jax.random.normal(keys[0], (*shape, width)),
        0.05 * jax.random.normal(keys[1], (vocab, width)),
        jax.random.randint(keys[2], shape, 0, vocab),
        jnp.ones(shape),
    )


def measure(functions, arguments, gradients=(0, 1)):
    """Returns {name: (CPU seconds, seconds, bytes of temporaries)}, and the bytes of results."""
    programs = {n: jax.jit(jax.value_and_grad(f, gradients)).lower(*arguments).compile() for n, f in functions.items()}
    best = dict.fromkeys(functions, (float("inf"), float("inf")))
    for _ in range(REPEATS):
        for name, program in programs.items():
            cpu, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(program(*arguments))
            took = time.process_time() - cpu, time.perf_counter() - wall
            best[name] = min(best[name][0], took[0]), min(best[name][1], took[1])
    memory: dict[str, Any] = {name: program.memory_analysis() for name, program in programs.items()}
    return {n: (*best[n], memory[n].temp_size_in_bytes) for n in functions}, memory[NAIVE].output_size_in_bytes


def table(title, functions, arguments, **options):
    """Returns lines of Markdown: times and temporaries relative to all logits at once, and temporaries in MiB."""
    log.info("%s", title)
    results, output = measure(functions, arguments, **options)
    cpu, wall, temporary = results[NAIVE]
    lines = [
        f"\n## {title}\n",
        f"All logits at once: {cpu:.1f} CPU s, {wall:.1f} s, {temporary / 2**20:,.0f} MiB of temporaries; results "
        f"{output / 2**20:,.0f} MiB.\n",
        "| loss head | CPU time | wall time | temporaries | MiB |\n|---|---|---|---|---|",
    ]
    for name, (cpu_s, wall_s, size) in results.items():
        lines.append(
            f"| {name} | {cpu_s / cpu:.2f} | {wall_s / wall:.2f} | {size / temporary:.3f} | {size / 2**20:,.1f} |"
        )
    return lines


def tiles(size, **settings):
    return LossConfig(strategy="tokens", tile_tokens=size, **settings)


def blocks(**settings):
    return LossConfig(strategy="vocabulary", **settings)


def without_teacher(tokens, width, vocab):
    functions = {NAIVE: naive}
    functions |= {"tiles of 1024 tokens": total(tiles(1024)), "vocabulary blocks": total(blocks())}
    title = f"{tokens} tokens, width {width}, vocabulary {vocab}"
    return table(title, functions, arguments(tokens, width, vocab))


def frozen(tokens, width, vocab):
    """Gradients of the states alone."""
    functions = {NAIVE: naive, "tiles of 1024 tokens": total(tiles(1024)), "vocabulary blocks": total(blocks())}
    title = f"{tokens} tokens, width {width}, vocabulary {vocab}, the table frozen"
    return table(title, functions, arguments(tokens, width, vocab), gradients=(0,))


def distilled(tokens, width, vocab):
    """A teacher as wide as the student."""
    keys = jax.random.split(jax.random.key(1), 2)
    values = arguments(tokens, width, vocab)
    hidden_BTD = jax.random.normal(keys[0], values[0].shape)
    head = Head(0.05 * jax.random.normal(keys[1], (vocab, width)), None)
    whole, top = Distillation(), Distillation(method="top_k", per_token=256, tail="together")
    known = jnp.ones(values[2].shape, bool)
    cached = sparse_distributions(hidden_BTD, head, distillation=top, tile_tokens=256)
    teachers = {
        "whole distributions": (whole, TeacherOutputs(known, hidden_BTD=hidden_BTD, head=head)),
        "top 256, in the step": (top, TeacherOutputs(known, hidden_BTD=hidden_BTD, head=head)),
        "top 256, cached": (top, TeacherOutputs(known, cached)),
    }
    functions = {NAIVE: naive}
    for name, (distillation, teacher) in teachers.items():
        functions[f"tiles of 256, {name}"] = total(tiles(256, distillation=distillation), teacher)
        functions[f"vocabulary blocks, {name}"] = total(blocks(distillation=distillation), teacher)
    return table(f"{tokens} tokens, width {width}, vocabulary {vocab}, with a teacher", functions, values)


def main():
    setup_logs()
    device = jax.devices()[0].device_kind
    lines = [
        "# The loss head\n",
        f"Written by `bench/loss.py`: {device}, {os.cpu_count()} cores ({platform.machine()}), jax {jax.__version__}, "
        f"Python {platform.python_version()}, float32; the machine had a load average of "
        f"{os.getloadavg()[0]:.1f} before. Value and gradients; best of {REPEATS}, in turn; all numbers but "
        "the last are relative to all logits at once.",
    ]
    for part, sizes in (
        (without_teacher, (2048, 640, 262144)),
        (without_teacher, (128, 640, 262144)),
        (frozen, (1024, 640, 65536)),
        (distilled, (1024, 256, 65536)),
    ):
        lines += part(*sizes)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text("\n".join(lines) + "\n")
    print(OUT.read_text())


if __name__ == "__main__":
    main()
