"""`t5g2 export`."""

from t5g2.commands.flags import DTYPE, MODEL, Flag, Parsed

FLAGS = {
    "model": MODEL,
    "out": Flag(None, "folder to write; it must not exist; default: none is kept, where --push is given"),
    "push": Flag(None, "hf://OWNER/NAME[@BRANCH]: the repository of Hugging Face's hub to upload the result to"),
    "dtype": DTYPE,
}


def run(flags: Parsed) -> None:
    """Writes a model folder as a Hugging Face folder, which transformers loads.

    With --push it is uploaded to the Hugging Face hub.

    Example: t5g2 export --model=runs/quickstart/adapted/model --out=models/adapted-hf
    """
    from t5g2.jobs import exported_model

    exported_model.export(flags.model, out=flags.out, push=flags.push, dtype=flags.dtype)
