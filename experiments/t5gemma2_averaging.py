"""The mean of the last five checkpoints, which T5Gemma 2 releases (arXiv 2512.14856v2, section 3.1), against the last.

    t5g2 sweep --sweep=experiments/t5gemma2_averaging.py --workdir=runs/t5gemma2_averaging
    t5g2 sweep --sweep=experiments/t5gemma2_averaging.py:270m-270m --workdir=runs/t5gemma2_averaging_270m

The paper has no number for it. The learning rate of `last` decays as in the paper's recipe; that of `constant` does
not, which is where a mean should help most. `last_mean` and `constant_mean` are scored by a run of one update with a
learning rate of 0, so that they are asked the same as the others. Checkpoints are 10K updates apart in the paper, 2% of
its run, and 5 of 100 updates here.
"""

from dataclasses import replace

import bases

from t5g2.sweep import Step, Sweep

CHECKPOINTS = 5
CONSTANT = {"optim.schedule.final_fraction": 1.0}


def mean_of(base, run):
    """The mean of a run's last checkpoints, and the run that scores it."""
    name, folder = f"{run}_mean", f"{{sweep}}/mean-of-{run}-s{{seed}}"
    command = ("average", f"--workdir={{sweep}}/{run}-s{{seed}}", f"--last={CHECKPOINTS}", f"--out={folder}")
    step = Step(f"mean-of-{run}", command, f"mean-of-{run}-s{{seed}}", (run,), base.seeds)
    # an adapt.source that the config has is taken out
    still = base.tokenizer | {
        "init": {"params": folder},
        "train.steps": 1,
        "optim.schedule": {"kind": "constant", "peak": 0.0},
    }
    return step, base.variant(name, {**still, "save.every_steps": 0, "save.model": False}, after=(step.name,))


def get_sweep(scale=bases.LAPTOP):
    base = bases.t5gemma2(scale)
    tasks = bases.heldout(scale, {"heldout": bases.UL2})
    shared = {"eval.final": [], "eval.tasks": tasks}
    base = replace(base, overrides={**base.overrides, **shared})
    every = {"save.every_steps": 5 if base.laptop else 10_000, "save.keep": CHECKPOINTS}
    runs = base.arms({"last": every, "constant": every | CONSTANT}, tokens=2e12)
    return Sweep(
        title="The mean of the last five checkpoints against the last one",
        parts=(*runs, *mean_of(base, "last"), *mean_of(base, "constant")),
        compare={
            "decayed": {"last": "last", "mean of five": "last_mean"},
            "constant": {"last": "constant", "mean of five": "constant_mean"},
        },
    )
