"""`t5g2 export`."""

from t5g2.commands.flags import DTYPE, MODEL, OUT, Parsed

FLAGS = {"model": MODEL, "out": OUT, "dtype": DTYPE}


def run(flags: Parsed) -> None:
    """Writes a model folder as a Hugging Face folder, which transformers loads.

    Example: t5g2 export --model=runs/adapted/model --out=models/adapted-hf
    """
    from t5g2.checkpoint import export_folder

    deviations = export_folder.export_model(flags.model, flags.out, dtype=flags.dtype)
    print(f"wrote {flags.out}")
    for deviation in deviations:
        print(f"transformers computes this model differently for {deviation}")
