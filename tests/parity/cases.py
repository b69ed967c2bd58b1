"""What is compared with transformers: small models of odd shapes, with inputs that any NumPy makes alike.

NumPy only: the golden files are checked where neither torch nor transformers is installed.
"""

from dataclasses import dataclass, replace

import numpy as np

from t5g2.core.batch import Stream
from t5g2.models.config import EncoderDecoderConfig, ModelConfig, Rope
from tests.tiny import GEMMA3, T5GEMMA2

LENGTH, ENCODER_LENGTH = 13, 17  # past every window below

# the head size is not width / heads, one key/value head serves all, scores have their own scale
ODD = replace(
    GEMMA3,
    layers=5,
    pattern=("local", "local", "global"),
    heads=4,
    kv_heads=1,
    head_size=10,
    window=5,
    query_scalar=13,
    rope_global=Rope(500_000.0, factor=3.0),
    rope_local=Rope(100.0),
    final_softcap=1.5,
)


@dataclass(frozen=True)
class Case:
    """A model, the padding of its inputs ("left", "right" or "none" by side), and whether tokens form blocks."""

    config: ModelConfig
    encoder_padding: str = "none"
    decoder_padding: str = "right"
    blocks: bool = False

    @property
    def vocab_size(self) -> int:
        """V."""
        config = self.config
        return config.decoder.vocab_size if isinstance(config, EncoderDecoderConfig) else config.vocab_size

    @property
    def streams(self) -> tuple[Stream | None, Stream]:
        """Two rows for the encoder, or None, and for the decoder. Positions count padding, as transformers counts."""
        draw = np.random.RandomState(1)
        encoder = None
        if isinstance(self.config, EncoderDecoderConfig):
            encoder = stream(draw, ENCODER_LENGTH, self.encoder_padding)
            encoder.tokens[:, 8] = self.config.eoi_id or 3
        decoder = stream(draw, LENGTH, self.decoder_padding)
        if isinstance(self.config, EncoderDecoderConfig):
            decoder.tokens[:, 5] = self.config.eoi_id or 3
        if self.blocks:
            blocks = np.zeros((2, LENGTH), np.int32)
            blocks[:, 1:8], blocks[:, 9:12] = 1, 2  # the first is longer than the window
            decoder = decoder._replace(blocks=blocks)
        return encoder, decoder


def stream(draw: np.random.RandomState, length: int, padding: str) -> Stream:
    """Two rows, of which the second has four tokens of padding."""
    tokens = draw.randint(10, 97, (2, length)).astype(np.int32)
    segments = np.ones_like(tokens)
    if padding == "right":
        segments[1, -4:] = 0
    elif padding == "left":
        segments[1, :4] = 0
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return Stream(np.where(segments == 1, tokens, 0), segments, positions)


GEMMA = {
    "tiny": Case(GEMMA3),
    "tiny, padded left": Case(GEMMA3, decoder_padding="left"),
    "odd": Case(ODD),
    "whole patterns": Case(replace(GEMMA3, layers=4, window=3)),
    "less than a pattern": Case(replace(GEMMA3, layers=2, pattern=("local",) * 5 + ("global",))),
    "window of one": Case(replace(GEMMA3, window=1)),
    "image blocks": Case(GEMMA3, decoder_padding="none", blocks=True),
}
T5GEMMA = {
    "tiny": Case(T5GEMMA2, "right"),
    "tiny, padded left": Case(T5GEMMA2, "left"),
    "odd": Case(
        EncoderDecoderConfig(encoder=ODD, decoder=replace(ODD, layers=4, window=4, head_size=6), eoi_id=7),
        "right",
        "none",
    ),
    "one side deeper": Case(
        EncoderDecoderConfig(
            encoder=replace(GEMMA3, layers=1, kv_heads=4, window=6), decoder=replace(ODD, final_softcap=None), eoi_id=9
        ),
        "left",
        "none",
    ),
}
GOLDEN = {f"gemma: {n}": GEMMA[n] for n in ("tiny", "odd", "image blocks")}
GOLDEN |= {f"t5gemma: {n}": T5GEMMA[n] for n in ("tiny", "tiny, padded left", "odd")}
GRADIENTS = {"gemma": GEMMA["odd"], "t5gemma": T5GEMMA["tiny"]}
