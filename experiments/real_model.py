"""From a released model to an adapted one, step by step: Gemma 3 270M, with ordinary commands.

    make real REAL=DIR        # or: MODELS=DIR t5g2 sweep --sweep=experiments/real_model.py --workdir=DIR/runs

DIR/gemma-3-270m is the model as a Hugging Face folder. It is imported and compared with transformers, adapted to
T5Gemma 2 270M-270M with an account of every weight, trained a little (6 updates, UL2), evaluated and exported; the
report has the held-out loss before and after. experiments/gemma3_270m.py is the comparison with other recipes.
"""

import bases

from t5g2.sweep import Step, Sweep, Variant

SOURCE = f"{bases.MODELS}/gemma-3-270m"
TRAINED = "{sweep}/trained/model"
SHORT = {
    "init.adapt.source": SOURCE,
    "train.steps": 6,
    "optim.schedule.warmup_steps": 2,
    "eval.every_steps": 0,
    "eval.final": ("samples",),
    "save.model": True,
}


def get_sweep():
    return Sweep(
        title="Gemma 3 270M, adapted to T5Gemma 2 270M-270M and trained a little",
        parts=(
            Step("imported", ("import", f"--source={SOURCE}", "--out={sweep}/imported", "--verify"), "imported"),
            Step("adapted", ("adapt", f"--source={SOURCE}", "--target=t5gemma2", "--out={sweep}/adapted"), "adapted"),
            Variant("trained", "configs/gemma3_270m.py:adapted", SHORT),
            Step(
                "evaluated",
                ("evaluate", f"--model={TRAINED}", "--tasks=heldout_text:10", "--out={sweep}/evaluated"),
                out="evaluated/index.html",
                after=("trained",),
            ),
            Step(
                "exported", ("export", f"--model={TRAINED}", "--out={sweep}/exported"), "exported", after=("trained",)
            ),
        ),
    )
