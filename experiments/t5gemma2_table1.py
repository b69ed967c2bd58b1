"""Architecture: T5Gemma 2, table 1 (arXiv 2512.14856v2): what tying and merging cost.

    t5g2 sweep --sweep=experiments/t5gemma2_table1.py --workdir=runs/t5gemma2_table1
    t5g2 sweep --sweep=experiments/t5gemma2_table1.py:2b-2b --workdir=runs/t5gemma2_table1_2b

T5Gemma with one change each: one embedding for encoder input, decoder input and softmax; merged attention in place of
self- and cross-attention; cross-attention in global layers only. Every variant starts from the same source and sees the
same batches. 2b-2b has the paper's 400B tokens. Known deviation: cross-entropy alone, where the paper's runs distil.
"""

import bases

from t5g2.sweep import Paper, Sweep

ARMS = {
    "baseline": {},
    "tied": {"model.tied_embedding": True},
    "merged": {"model.cross": "merged"},
    "global_only": {"model.cross_layers": "global"},
}
TABLE1 = Paper(
    source="T5Gemma 2, arXiv 2512.14856v2, table 1: T5Gemma 2B-2B, 400B tokens, PrefixLM with distillation",
    columns=("variant", "score", "parameters", "of them embedding"),
    rows=(
        ("baseline", 47.8, "4417M", "1180M"),
        ("tied", 47.7, "4417M", "590M"),
        ("merged", 47.5, "4049M", "1180M"),
        ("global_only", 46.5, "4233M", "1180M"),
    ),
    note="An average of benchmarks, where higher is better; ours is held-out loss, where lower is better. The paper "
    "gives no error bars. It says one cross-attention every six layers of global_only; its parameters are those of "
    "every second layer, which is Gemma 2's pattern, and ours.",
    printed={"baseline": 47.8, "tied": 47.7, "merged": 47.5, "global_only": 46.5},
)


def get_sweep(scale=bases.LAPTOP):
    return Sweep(
        title="Tied embedding, merged attention, cross-attention in global layers only",
        parts=bases.t5gemma(scale).arms(ARMS, tokens=400e9),
        compare=tuple(ARMS),
        paper=TABLE1,
    )
