"""`t5g2 import`."""

from t5g2.commands.flags import DTYPE, OUT, Flag, Parsed
from t5g2.core.errors import UserError

FLAGS = {
    "source": Flag(None, "Hugging Face folder, official Flax folder, GGUF file, or hf://OWNER/NAME[@REVISION]", True),
    "out": OUT,
    "config": Flag(None, "architecture, if the folder has no config: a size such as gemma3:1b, or a model.json"),
    "verify": Flag(False, "compare the result with transformers, in float32; requires transformers and torch"),
    "dtype": DTYPE,
    "image_size": Flag(
        None, "side of images in pixels, if not the size that the tower was trained with; 896 or 448", kind=int, least=1
    ),
}


def run(flags: Parsed) -> None:
    """Writes a model folder from a Hugging Face folder, an official Flax one or a GGUF file.

    The first holds config.json and safetensors, the second an Orbax checkpoint.

    Example: t5g2 import --source=downloads/t5gemma-2-270m-270m --out=models/t5gemma2-270m --verify
    """
    if flags.overrides:
        path, _ = flags.overrides[0]
        raise UserError(f"--config.{path} cannot be changed here; write a model.json and give --config=FILE")
    from t5g2.jobs import verification

    options = {"config": flags.config, "dtype": flags.dtype, "image_size": flags.image_size}
    verification.import_model(flags.source, flags.out, verify=flags.verify, **options)
