"""The loss head with a large vocabulary: both strategies, with gradients, against all logits at once.

Time is the best of several calls, in turn: CPU seconds where the CPU computes, because its machine is often shared, and
seconds elsewhere. Memory is what XLA sets aside beside arguments and results.

With a teacher: run in the step (its states are given), or cached, 256 tokens each; all relative to all logits at once
without a teacher.
"""

import jax
import jax.numpy as jnp
from measure import measure, table, write

from t5g2.core.logs import log
from t5g2.core.logs import setup as setup_logs
from t5g2.models.distillation import Distillation, TeacherOutputs
from t5g2.models.layers import Head
from t5g2.models.loss import cross_entropy
from t5g2.models.loss_config import LossConfig
from t5g2.models.tiled_loss import sparse_distributions

ROWS = 8
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


def compare(title, functions, arguments, gradients=(0, 1)):
    """Returns a section: times and temporaries relative to all logits at once, and temporaries in MiB."""
    log.info("%s", title)
    costs = measure({name: (jax.value_and_grad(f, gradients), arguments) for name, f in functions.items()})
    whole = costs[NAIVE]
    rows = [
        (
            name,
            f"{cost.cpu / whole.cpu:.2f}",
            f"{cost.wall / whole.wall:.2f}",
            f"{cost.temporary / whole.temporary:.3f}",
            f"{cost.temporary / 2**20:,.1f}",
        )
        for name, cost in costs.items()
    ]
    return "\n\n".join(
        [
            f"## {title}",
            f"All logits at once: {whole.cpu:.1f} CPU s, {whole.wall:.1f} s.",
            table(("loss head", "CPU time", "wall time", "temporaries", "MiB"), rows),
        ]
    )


def tiles(size, **settings):
    return LossConfig(strategy="tokens", tile_tokens=size, **settings)


def blocks(**settings):
    return LossConfig(strategy="vocabulary", **settings)


def without_teacher(tokens, width, vocab):
    functions = {NAIVE: naive}
    functions |= {"tiles of 1024 tokens": total(tiles(1024)), "vocabulary blocks": total(blocks())}
    title = f"{tokens} tokens, width {width}, vocabulary {vocab}"
    return compare(title, functions, arguments(tokens, width, vocab))


def frozen(tokens, width, vocab):
    """Gradients of the states alone."""
    functions = {NAIVE: naive, "tiles of 1024 tokens": total(tiles(1024)), "vocabulary blocks": total(blocks())}
    title = f"{tokens} tokens, width {width}, vocabulary {vocab}, the table frozen"
    return compare(title, functions, arguments(tokens, width, vocab), gradients=(0,))


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
    return compare(f"{tokens} tokens, width {width}, vocabulary {vocab}, with a teacher", functions, values)


def main():
    setup_logs()
    write(
        "loss",
        "The loss head",
        "float32, value and gradients; all numbers but the last are relative to all logits at once.",
        without_teacher(2048, 640, 262144),
        without_teacher(128, 640, 262144),
        frozen(1024, 640, 65536),
        distilled(1024, 256, 65536),
    )


if __name__ == "__main__":
    main()
