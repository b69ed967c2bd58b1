"""PrefixLM, then UL2 for the last tenth, and the other way round: T5Gemma, figure 5 (arXiv 2504.06225v1).

    t5g2 sweep --sweep=experiments/t5gemma_two_stages.py --workdir=runs/t5gemma_two_stages
    t5g2 sweep --sweep=experiments/t5gemma_two_stages.py:2b-2b --workdir=runs/t5gemma_two_stages_2b

The second stage takes over the whole state of the first: weights, optimizer, step, position of the data. The learning
rate is constant up to the last tenth and falls there, in all four runs alike, so that nothing but the objective differs
between them. Rows are longer than in the other tables, and fewer, because UL2 may put most of a text on either side.
Every run is scored under both objectives.
"""

import bases

from t5g2.sweep import Paper, Sweep

OBJECTIVES = {"prefix": bases.PREFIX_LM, "ul2": bases.CYCLIC_UL2}
PEAKS = {bases.LAPTOP: (3e-3, 10), "2b-2b": (3e-4, 1000)}  # and updates of the warm-up
PAPER = Paper(
    source="T5Gemma, arXiv 2504.06225v1, figure 5: differences in PT, as others read them off the figure",
    columns=("size", "PrefixLM, then UL2", "UL2, then PrefixLM"),
    rows=(
        ("S-S", -0.3, 0.8),
        ("B-B", -0.9, 0.4),
        ("L-L", -0.5, 0.5),
        ("XL-XL", -0.7, 0.2),
        ("2B-2B", -0.5, -1.2),
        ("9B-2B", -0.2, -0.2),
        ("9B-9B", 1.1, -1.1),
    ),
    note="Differences of averages of benchmarks, where higher is better. The figure does not say from which run; the "
    "text does: PrefixLM, then UL2 mostly hurts, UL2, then PrefixLM helps after instruction tuning.",
)


def get_sweep(scale=bases.LAPTOP):
    base = bases.t5gemma(scale)
    peak, warmup = PEAKS[scale]
    steps = base.updates(2e12)
    shared = bases.rows_for_ul2(scale) | {"eval.tasks": bases.heldout(scale, OBJECTIVES)}
    rate = {"peak": peak, "warmup_steps": warmup}
    constant = {"train.steps": steps - steps // 10, "optim.schedule": {"kind": "constant", **rate}}
    falling = {"optim.schedule": {"kind": "warmup_stable_decay", "decay_fraction": 0.1, **rate}}

    def run(objective, overrides):
        return {"data.sources.0.objective": OBJECTIVES[objective], **shared, **overrides}

    whole = base.arms({name: run(name, falling) for name in OBJECTIVES}, tokens=2e12)
    firsts = [base.adapted(f"{name}_first", run(name, constant), tokens=2e12) for name in OBJECTIVES]
    seconds = [
        base.variant(
            f"{first}_then_{second}",
            run(second, falling)
            | base.tokenizer
            | {"train.steps": steps, "init": {"resume": f"{{sweep}}/{first}_first-s{{seed}}"}},
            after=(f"{first}_first",),
        )
        for first, second in (("prefix", "ul2"), ("ul2", "prefix"))
    ]
    return Sweep(
        title="Two stages: the objective of the last tenth is another",
        parts=(*whole, *firsts, *seconds),
        compare=("prefix", "ul2", "prefix_then_ul2", "ul2_then_prefix"),
        paper=PAPER,
    )
