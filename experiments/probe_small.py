"""Encoder or decoder-only model under a probe: T5Gemma's SuperGLUE comparison (table 2), at laptop scale.

    t5g2 sweep --sweep=experiments/probe_small.py --workdir=runs/probe_small

The quickstart's decoder-only model and the encoder-decoder adapted from it are each fine-tuned, with a head on the last
state, to tell lines of code from lines of prose; `random` is the same encoder with new weights. Three seeds: of the new
head, and of the order of the data. The report has accuracy, F1, Matthews correlation and the area under the curve on
held-out documents, each with its mean and interval over seeds.
"""

from t5g2.sweep import Sweep, Variant

QUICKSTART, PROBE = "configs/quickstart.py", "configs/probe_small.py"
SEEDS = (0, 1, 2)


def probe(name, arm, weights, after=()):
    """A fine-tuning for each seed."""
    overrides = {"init.params": weights}
    return Variant(name, config=f"{PROBE}:{arm}", overrides=overrides, after=after, seeds=SEEDS)


def get_sweep():
    return Sweep(
        title="A probe of an adapted encoder, of the decoder-only model that it comes from, and of a random encoder",
        parts=(
            Variant("source", config=f"{QUICKSTART}:source"),
            Variant(
                "adapted",
                config=f"{QUICKSTART}:adapted",
                overrides={"init.adapt.source": "{sweep}/source/model"},
                after=("source",),
            ),
            probe("encoder", "full", "{sweep}/adapted/model", after=("adapted",)),
            probe("decoder", "decoder", "{sweep}/source/model", after=("source",)),
            probe("random", "full", None),
        ),
        compare=("encoder", "decoder", "random"),
    )
