"""Adaptation against training from scratch: T5Gemma, table 4 (arXiv 2504.06225), at laptop scale.

    t5g2 sweep --sweep=experiments/t5gemma_table4.py --workdir=runs/t5gemma_table4
    t5g2 sweep --sweep=experiments/t5gemma_table4.py:2b-2b --workdir=runs/t5gemma_table4_2b

Three seeds. A Gemma 2 style decoder-only model is trained on 1M tokens; the T5Gemma that it is adapted to (all weights
copied, cross-attention from self-attention) is trained with PrefixLM on a quarter of that, as the paper adapts on 2T of
8T tokens; the same architecture from scratch on as many as the source had. A seed changes the order of the data and the
new weights. Two arms of one seed see the same batches as long as both run.

How to read the report: at the adapted arm's last step its learning rate has decayed and that of scratch has not, so the
difference there flatters adaptation; each at its end, scratch has had four times the tokens, as in the paper, and the
adapted model, source included, 1.25 times those of scratch. The tokens that scratch needs are read off its own curve.
"""

from dataclasses import replace

import bases

from t5g2.sweep import Paper, Sweep

SCRATCH = {bases.LAPTOP: "configs/t5gemma_small.py:scratch-64", "2b-2b": "configs/t5gemma.py:2b-2b"}
# PT of adapted and scratch; S-S is the size that is nearest to ours
PRINTED = {bases.LAPTOP: (22.8, 24.0), "2b-2b": (49.7, 47.1)}
TABLE4 = Paper(
    source="T5Gemma, arXiv 2504.06225v1, table 4: adaptation (PrefixLM) and training from scratch on 8T tokens",
    columns=("size", "adapt PT", "adapt IT", "adapt SG", "scratch PT", "scratch IT", "scratch SG"),
    rows=(
        ("S-S", 22.8, 9.8, 68.8, 24.0, 9.9, 70.5),
        ("B-B", 26.9, 12.9, 72.3, 28.1, 11.8, 75.5),
        ("L-L", 31.6, 17.5, 78.1, 30.9, 17.1, 78.5),
        ("XL-XL", 39.5, 30.7, 85.7, 37.7, 28.8, 79.5),
        ("2B-2B", 49.7, 46.4, 88.3, 47.1, 43.9, 84.5),
    ),
    note="Averages of benchmarks (PT pretrained, IT instruction-tuned, SG SuperGLUE), where higher is better. Ours is "
    "held-out loss, where lower is better, of a model 600 (S-S) to 11,000 (2B-2B) times smaller. In the paper scratch "
    "is ahead at S and B (but for IT at B), with four times the tokens of the adaptation; from L on adaptation is (but "
    "for SG at L). The paper gives no error bars, and trains with distillation; ours is cross-entropy alone.",
)


def table4(scale):
    return replace(TABLE4, printed=dict(zip(("adapted", "scratch"), PRINTED[scale], strict=True)))


def get_sweep(scale=bases.LAPTOP):
    base = bases.t5gemma(scale)
    names = {arm: f"{arm}-{base.label}" for arm in ("adapted", "scratch")}
    new = base.tokenizer | {"train.steps": 500 if base.laptop else base.updates(8e12)}
    return Sweep(
        title="A decoder-only model, adapted to T5Gemma, against the same encoder-decoder from scratch",
        parts=(
            *base.parts,
            base.adapted(names["adapted"], {}, tokens=2e12),
            base.variant(names["scratch"], new, config=SCRATCH[scale]),
        ),
        compare={base.label: names},
        paper=table4(scale),
    )
