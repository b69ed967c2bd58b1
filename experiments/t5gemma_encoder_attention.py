"""A causal encoder in place of a bidirectional one: T5Gemma, section 6 (arXiv 2504.06225v1).

    t5g2 sweep --sweep=experiments/t5gemma_encoder_attention.py --workdir=runs/t5gemma_encoder_attention
    t5g2 sweep --sweep=experiments/t5gemma_encoder_attention.py:2b-2b --workdir=runs/t5gemma_encoder_attention_2b

The causal encoder computes at first what the source computes, so it may start ahead; the question is where it ends.
Known deviation: cross-entropy alone, where the paper's runs distil.
"""

import bases

from t5g2.sweep import Paper, Sweep

ARMS = {"bidirectional": {}, "causal": {"model.encoder_attention": "causal"}}
PAPER = Paper(
    source="T5Gemma, arXiv 2504.06225v1, section 6: 2B-2B",
    columns=("encoder", "PT", "IT"),
    rows=(("bidirectional", 49.7, 46.4), ("causal", 45.6, 41.7)),
    note="Averages of benchmarks (PT pretrained, IT instruction-tuned), where higher is better; ours is held-out loss, "
    "where lower is better. The paper gives no error bars.",
    printed={"bidirectional": 49.7, "causal": 45.6},
)


def get_sweep(scale=bases.LAPTOP):
    return Sweep(
        title="A bidirectional and a causal encoder",
        parts=bases.t5gemma(scale).arms(ARMS, tokens=2e12),
        compare=tuple(ARMS),
        paper=PAPER,
    )
