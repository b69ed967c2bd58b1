"""Is it the additional compute? The source trained further, against its adaptation: T5Gemma, section 6.

    t5g2 sweep --sweep=experiments/t5gemma_extra_compute.py --workdir=runs/t5gemma_extra_compute
    t5g2 sweep --sweep=experiments/t5gemma_extra_compute.py:2b-2b --workdir=runs/t5gemma_extra_compute_2b

Both runs start from the same source and have the same budget of FLOPs (train.flops): that of an adaptation of 125
updates, or of 2T tokens. Both are scored on the second half of the same held-out chunks, given the first. Known
deviation: the paper's source had 6T tokens more (arXiv 2504.06225v1), 2.9 times the adaptation's FLOPs as counted here.
"""

import bases

from t5g2.sweep import Paper, Sweep

DECODERS = {bases.LAPTOP: "configs/t5gemma_small.py:source-64", "2b-2b": "configs/gemma.py:gemma2:2b"}
PAPER = Paper(
    source="T5Gemma, arXiv 2504.06225v1, section 6 and table 2",
    columns=("model", "PT"),
    rows=(("2B-2B", 49.7), ("Gemma 2 2B, 6T tokens more", 48.57)),
    note="Averages of benchmarks, where higher is better; ours is held-out loss, where lower is better. The paper "
    "gives no error bars.",
    printed={"adapted": 49.7, "continued": 48.57},
)


def continued(base, scale, name, overrides):
    """The source, trained further with the budget of the adaptation."""
    start = {"init.params": base.source}
    schedule = {"optim.schedule.warmup_steps": 20 if base.laptop else 1000}
    after = tuple(part.name for part in base.parts)
    return base.variant(name, {**start, **schedule, **overrides}, config=DECODERS[scale], after=after)


def second_half(scale, *, decoder):
    """Chunks of even length, and the loss of their second half, given the first: the same for both kinds of model."""
    suffix = {"kind": "ul2", "tasks": [{"name": "second_half", "rate": 0.5}]}
    return {
        "eval.tasks": bases.heldout(scale, {"heldout": {"kind": "causal", "context": 0.5} if decoder else suffix}),
        "data.chunk_tokens": 126 if scale == bases.LAPTOP else 8190,
        "eval.every_steps": 25 if scale == bases.LAPTOP else 10_000,
    }


def get_sweep(scale=bases.LAPTOP):
    base = bases.t5gemma(scale)
    length = {"train.steps": 0, "train.flops": bases.budget(base, tokens=2e12)}
    return Sweep(
        title="A source that is trained further, and its adaptation, at equal compute",
        parts=(
            *base.arms({"adapted": length | second_half(scale, decoder=False)}, tokens=2e12),
            continued(base, scale, "continued", length | second_half(scale, decoder=True)),
        ),
        compare=("adapted", "continued"),
        paper=PAPER,
    )
