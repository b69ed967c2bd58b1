"""Encoder-decoder or decoder-only, both with PrefixLM, at equal compute: what T5Gemma and RedLLM ask.

    t5g2 sweep --sweep=experiments/t5gemma_decoder_only.py --workdir=runs/t5gemma_decoder_only
    t5g2 sweep --sweep=experiments/t5gemma_decoder_only.py:2b-2b --workdir=runs/t5gemma_decoder_only_2b

One source; one budget of FLOPs (train.flops); one objective: the first half of a text is read in both directions, the
second is predicted. `encoder_decoder` is the source adapted to T5Gemma (arXiv 2504.06225), with twice its weights;
`prefix_decoder` is the source itself, trained as a prefix language model; `causal_decoder` is trained as it was, and
scored on the same targets (in a text of odd length `prefix_decoder` has one less). Quality against the FLOPs of a query
is experiments/t5gemma_pairs.py.
"""

import bases
from t5gemma_extra_compute import continued, second_half

from t5g2.sweep import Paper, Sweep

PREFIX = {"kind": "prefix_lm_decoder"}
PAPER = Paper(
    source="T5Gemma, arXiv 2504.06225v1, table 2a: pretrained, the source as it is and adapted with PrefixLM",
    columns=("size", "Gemma 2", "PrefixLM"),
    rows=(("S-S", 23.4, 22.8), ("B-B", 26.7, 26.9), ("L-L", 32.3, 31.6), ("XL-XL", 39.7, 39.5), ("2B-2B", 47.9, 49.7)),
    note="Averages of benchmarks, where higher is better; ours is held-out loss, where lower is better. The paper's "
    "sources are not trained further, so nothing of it stands beside ours.",
)


def get_sweep(scale=bases.LAPTOP):
    base = bases.t5gemma(scale)
    length = {"train.steps": 0, "train.flops": bases.budget(base, tokens=2e12)}
    decoder = length | second_half(scale, decoder=True)
    both_ways = decoder | {
        "data.sources.0.objective": PREFIX,
        "eval.tasks": bases.heldout(scale, {"heldout": PREFIX}),
    }
    return Sweep(
        title="Encoder-decoder and decoder-only, of one source, at equal compute",
        parts=(
            *base.arms({"encoder_decoder": length | second_half(scale, decoder=False)}, tokens=2e12),
            continued(base, scale, "prefix_decoder", both_ways),
            continued(base, scale, "causal_decoder", decoder),
        ),
        compare=("encoder_decoder", "prefix_decoder", "causal_decoder"),
        paper=PAPER,
    )
