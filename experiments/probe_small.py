"""Encoder or decoder-only model under a probe: T5Gemma's SuperGLUE comparison, table 2 (arXiv 2504.06225v1).

    t5g2 sweep --sweep=experiments/probe_small.py --workdir=runs/probe_small
    t5g2 sweep --sweep=experiments/probe_small.py:2b-2b --workdir=runs/probe_2b

On a laptop the quickstart's decoder-only model and the encoder-decoder adapted from it are each fine-tuned, with a head
on the last state, to tell lines of code from lines of prose; `random` is the same encoder with new weights. Three
seeds, of all runs. The report has accuracy, F1, Matthews correlation and the area under the curve on held-out
documents, each with its mean and interval over seeds.

2b-2b probes models/gemma-2-2b, and models/t5gemma-2b-2b, a model that was adapted from it, on BoolQ: the records
superglue/boolq/train.jsonl and validation.jsonl with passage, question and answer (true or false, as published, or yes
or no). For another task of SuperGLUE change `BOOLQ`. Known deviations: no dropout, and no grid over learning rates and
batches.
"""

from dataclasses import replace

import bases

from t5g2.sweep import Paper, Sweep, Variant

QUICKSTART, PROBE = "configs/quickstart.py", "configs/probe_small.py"
BOOLQ = {
    "template": "{passage}\nQuestion: {question}?",
    "label": "{answer}",
    "classes": ["no", "yes"],
}
RECORDS = bases.text_path("superglue/boolq/{split}.jsonl")
TABLE2 = Paper(
    source="T5Gemma, arXiv 2504.06225v1, table 2b: SuperGLUE, fine-tuned from pretrained models",
    columns=("size", "Gemma 2", "PrefixLM", "UL2"),
    rows=(
        ("S-S", 67.6, 69.8, 69.6),
        ("B-B", 68.6, 71.2, 71.5),
        ("L-L", 68.4, 78.7, 79.7),
        ("XL-XL", 70.7, 84.4, 85.4),
        ("2B-2B", 75.5, 88.1, 88.1),
        ("9B-9B", 82.5, 91.4, 91.8),
    ),
    note="Mean accuracy on the development sets of seven tasks, where higher is better.",
)


def printed(encoder, decoder, metric):
    """The table, with the numbers of a size beside ours."""
    numbers = {"encoder": encoder, "decoder": decoder}
    return replace(TABLE2, printed=numbers, metric=metric, ours_higher_is_better=True)


def get_sweep(scale=bases.LAPTOP):
    return small() if scale == bases.LAPTOP else released(scale)


def small():
    base = bases.t5gemma2(bases.LAPTOP)
    adapted = base.adapted("adapted", {}, tokens=0)

    def probe(name, arm, weights, after=()):
        """A fine-tuning for each seed."""
        origin = {"init.params": weights and bases.trained(weights)}
        return Variant(name, f"{PROBE}:{arm}", origin, after, bases.SEEDS)

    return Sweep(
        title="A probe of an adapted encoder, of the decoder-only model that it comes from, and of a random encoder",
        parts=(
            *base.parts,
            adapted,
            probe("encoder", "full", "adapted", after=("adapted",)),
            probe("decoder", "decoder", "source", after=("source",)),
            probe("random", "full", None),
        ),
        compare=("encoder", "decoder", "random"),
        # S-S is the size that is nearest to ours
        paper=printed(69.6, 67.6, "eval/heldout_lines/accuracy"),
    )


def released(scale):
    base = bases.t5gemma(scale)
    records = {split: {"kind": "jsonl", "path": RECORDS.format(split=split)} for split in ("train", "validation")}
    task = {"kind": "probe", "name": "boolq", "data": records["validation"], "metrics": ["accuracy", "f1", "mcc"]}
    text = {"kind": "labelled", "records": records["train"], **BOOLQ}

    def probe(name, config, weights, *, decoder):
        objective = {"kind": "probe_decoder" if decoder else "probe"}
        overrides = {
            "model.probe": {"classes": BOOLQ["classes"], "state": "last"},
            "init.params": weights,
            "data.sources": [{"text": text, "objective": objective, "name": "boolq"}],
            "data.chunk_tokens": 1024,
            "data.rows": 64,
            "data.encoder_length": 0 if decoder else 2048,
            "data.decoder_length": 2048 if decoder else 64,
            "optim.schedule": {"kind": "cosine", "peak": 1e-5, "warmup_steps": 50},
            "optim.freeze": [],
            "train.steps": 500,
            "eval.every_steps": 100,
            "eval.tasks": [task | {key: BOOLQ[key] for key in ("template", "label")}],
            "save.every_steps": 500,
        }
        return Variant(name, config, overrides, seeds=bases.SEEDS)

    return Sweep(
        title="A probe of an adapted encoder, and of the decoder-only model that it comes from",
        parts=(
            probe("encoder", base.config, f"{bases.MODELS}/t5gemma-{scale}", decoder=False),
            probe("decoder", "configs/gemma.py:gemma2:2b", base.source, decoder=True),
        ),
        compare=("encoder", "decoder"),
        paper=printed(88.1, 75.5, "eval/boolq/accuracy"),
    )
