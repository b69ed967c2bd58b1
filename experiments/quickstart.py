"""Does adaptation pay? A decoder-only model adapted to an encoder-decoder, against the same architecture from scratch.

    t5g2 sweep --sweep=experiments/quickstart.py --workdir=runs/quickstart        (or: make quickstart)

The two arms see the same batches. The causal source has never seen a sentinel, so the short-span denoisers may start
behind; the mixture, half of which continues a prefix, starts ahead.
"""

from t5g2.sweep import Sweep, Variant

CONFIG = "configs/quickstart.py"


def get_sweep():
    return Sweep(
        title="A decoder-only model, adapted, against the same encoder-decoder from scratch",
        parts=(
            Variant("source", config=f"{CONFIG}:source"),
            Variant(
                "adapted",
                config=f"{CONFIG}:adapted",
                overrides={"init.adapt.source": "{sweep}/source/model"},
                after=("source",),
            ),
            Variant("scratch", config=f"{CONFIG}:scratch"),
        ),
        compare=("adapted", "scratch"),
    )
