"""Cross-attention that is trained alone at first, in an unbalanced pair: T5Gemma, section 6 (arXiv 2504.06225v1).

    t5g2 sweep --sweep=experiments/t5gemma_cross_warmup.py --workdir=runs/t5gemma_cross_warmup
    t5g2 sweep --sweep=experiments/t5gemma_cross_warmup.py:9b-2b --workdir=runs/t5gemma_cross_warmup_9b

Encoder and decoder differ in width, so cross-attention is new. All else is frozen for the first K updates: 0, 1000 or
5000 of about 190,000 in the paper (800B tokens, UL2), and here 0, 10 or 50 of 125, a larger share of a run that has
few. Known deviation of the laptop's scale: PrefixLM, not UL2.
"""

import bases

from t5g2.sweep import Paper, Sweep

UPDATES = {bases.LAPTOP: (10, 0, 50), "9b-2b": (1000, 0, 5000)}  # of short, none and long
PAPER = Paper(
    source="T5Gemma, arXiv 2504.06225v1, section 6: 9B-2B, UL2, 800B tokens",
    columns=("updates of cross-attention alone", "mean of BoolQ and GSM8K"),
    rows=((1000, 62.5), (0, 61.8), (5000, 60.2)),
    note="Scores, where higher is better; ours is held-out loss, where lower is better. The paper gives no error bars.",
    printed={"short": 62.5, "none": 61.8, "long": 60.2},
)


def get_sweep(scale=bases.LAPTOP):
    if scale != bases.LAPTOP:
        bases.released(scale, ("9b-2b",))
    base = bases.pair(scale, "96-64" if scale == bases.LAPTOP else scale)
    arms = dict(zip(("short", "none", "long"), UPDATES[scale], strict=True))
    ul2 = {} if base.laptop else {"data.sources.0.objective": bases.CYCLIC_UL2, **bases.rows_for_ul2(scale)}
    overrides = {name: {"optim.freeze": bases.cross_attention_alone(k) if k else [], **ul2} for name, k in arms.items()}
    return Sweep(
        title="Updates of new cross-attention alone, before all weights are trained",
        parts=base.arms(overrides, tokens=800e9),
        compare=tuple(arms),
        paper=PAPER,
    )
