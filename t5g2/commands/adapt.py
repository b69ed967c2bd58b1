"""`t5g2 adapt`."""

from t5g2.commands.flags import DTYPE, OUT, Flag, Parsed

FLAGS = {
    "source": Flag(
        None,
        "decoder-only model folder, a Hugging Face or an official Flax one, a GGUF file, or hf://OWNER/NAME[@REVISION]"
        "; or two: ENCODER,DECODER",
        required=True,
    ),
    "target": Flag(
        None, "t5gemma or t5gemma2 (the source's sizes), a size, a model.json; --target.a.b=VALUE", required=True
    ),
    "out": OUT,
    "vision": Flag(None, "folder or hf://OWNER/NAME[@REVISION] whose image tower is used, with a new projector"),
    "encoder_layers": Flag("all", "source layers for the encoder: all, first:N, last:N, every:K, or 0,2,5"),
    "decoder_layers": Flag("all", "source layers for the decoder: as --encoder_layers"),
    "cross_attention": Flag("auto", "separate cross-attention: self (copied), fresh, auto (self if widths are equal)"),
    "cross_norms": Flag(
        "self", "norms of cross-attention: self (copied), fresh (factor 1), none (adds nothing at first)"
    ),
    "vocabulary": Flag("same", "rows of the embedding: same as the source, or resize to the target's"),
    "encoder_scale": Flag(1.0, "factor of the encoder's final norm, above 0 and at most 1: a soft start"),
    "dtype": DTYPE,
    "seed": Flag(0, "seed of the weights that no source has"),
}


def run(flags: Parsed) -> None:
    """Turns a decoder-only model into an encoder-decoder one and prints where every weight comes from.

    Example: t5g2 adapt --source=models/gemma-2-9b,models/gemma-2-2b --target=t5gemma:9b-2b --out=models/adapted
    """
    from t5g2.train import adaptation

    options = {name: flags.values[name] for name in adaptation.CHOICES}
    adaptation.adapt_folder(
        adaptation.from_flags(flags.source, flags.vision, options),
        flags.target,
        flags.out,
        changes=flags.overrides,
        dtype=flags.dtype,
        seed=flags.seed,
    )
