"""Multi-head attention in the encoder, in place of Gemma 2's grouped queries: T5Gemma, section 6 (arXiv 2504.06225v1).

    t5g2 sweep --sweep=experiments/t5gemma_multi_head_encoder.py --workdir=runs/t5gemma_multi_head_encoder
    t5g2 sweep --sweep=experiments/t5gemma_multi_head_encoder.py:2b-2b --workdir=runs/t5gemma_multi_head_encoder_2b

Key and value heads are repeated, as in the paper, so that both encoders compute the same at first. Known deviation:
cross-entropy alone, where the paper's runs distil.
"""

import bases

from t5g2.sweep import Paper, Sweep

HEADS = {bases.LAPTOP: 4, "2b-2b": 8}  # of queries
PAPER = Paper(
    source="T5Gemma, arXiv 2504.06225v1, section 6: 2B-2B, PrefixLM",
    columns=("encoder", "PT", "IT"),
    rows=(("grouped", 49.7, 46.4), ("multi_head", 50.2, 43.5)),
    note="Averages of benchmarks (PT pretrained, IT instruction-tuned), where higher is better; ours is held-out loss, "
    "where lower is better. The paper gives no error bars.",
    printed={"grouped": 49.7, "multi_head": 50.2},
)


def get_sweep(scale=bases.LAPTOP):
    base = bases.t5gemma(scale)
    arms = {"grouped": {}, "multi_head": {"model.encoder.kv_heads": HEADS[scale]}}
    return Sweep(
        title="Grouped-query and multi-head attention in the encoder",
        parts=base.arms(arms, tokens=2e12),
        compare=tuple(arms),
        paper=PAPER,
    )
