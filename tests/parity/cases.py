"""The cases that are compared with transformers: small models of odd shapes, with inputs that any NumPy makes alike.

NumPy only: the golden files are checked where neither torch nor transformers is installed.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from t5g2.core.batch import Sequences, image_blocks
from t5g2.models.config import EncoderDecoderConfig, ImageConfig, ModelConfig, Rope, TextConfig
from tests.tiny import GEMMA2, GEMMA3, T5GEMMA, T5GEMMA2, VISION

LENGTH, ENCODER_LENGTH = 13, 17  # past every window below
WITH_IMAGES = 22
BEGIN, END, SOFT = 6, 7, 8


@dataclass(frozen=True)
class Case:
    """A model, the padding of its inputs ("left", "right" or "none" by side), and whether tokens form blocks."""

    config: ModelConfig
    encoder_padding: str = "none"
    decoder_padding: str = "right"
    blocks: bool = False

    @property
    def sides(self) -> tuple[TextConfig | None, TextConfig]:
        """The encoder, or None, and the decoder."""
        config = self.config
        return (config.encoder, config.decoder) if isinstance(config, EncoderDecoderConfig) else (None, config)

    @property
    def streams(self) -> tuple[Sequences | None, Sequences]:
        """Two rows for the encoder, or None, and for the decoder. Positions count padding, as transformers counts."""
        draw = np.random.RandomState(1)
        encoder_config, decoder_config = self.sides
        eoi = (self.config.eoi_id if isinstance(self.config, EncoderDecoderConfig) else None) or 3
        encoder = None
        if encoder_config is not None:
            encoder = self._stream(draw, encoder_config, ENCODER_LENGTH, self.encoder_padding)
            encoder.tokens[:, 8] = eoi if encoder_config.images is None else encoder.tokens[:, 8]
        decoder = self._stream(draw, decoder_config, LENGTH, self.decoder_padding)
        if encoder_config is not None:
            decoder.tokens[:, 5] = eoi
        if self.blocks:
            blocks = np.zeros((2, LENGTH), np.int32)
            blocks[:, 1:8], blocks[:, 9:12] = 1, 2  # the first is longer than the window
            decoder = decoder._replace(blocks=blocks)
        if decoder_config.images is not None:
            decoder = decoder._replace(blocks=image_blocks(decoder.tokens, decoder_config.images.token))
        return encoder, decoder

    @property
    def images_config(self) -> ImageConfig | None:
        """The config of images, for whichever side."""
        encoder, decoder = self.sides
        return decoder.images if encoder is None else encoder.images

    @property
    def images(self) -> np.ndarray | None:
        """float32[2, 2, size, size, 3]: two images for the first row, one for the second (its other is not used)."""
        config = self.images_config
        if config is None:
            return None
        size = config.vision.image_size
        return np.random.RandomState(3).uniform(-1, 1, (2, 2, size, size, 3)).astype(np.float32)

    def _stream(self, draw: np.random.RandomState, config: TextConfig, length: int, padding: str) -> Sequences:
        """Two rows, of which the second has four tokens of padding."""
        if config.images is not None:
            length = WITH_IMAGES
        tokens = draw.randint(10, 90, (2, length)).astype(np.int32)
        segments = np.ones_like(tokens)
        if padding == "right":
            segments[1, -4:] = 0
        elif padding == "left":
            segments[1, :4] = 0
        if config.images is not None:
            span = [config.images.begin, *[config.images.token] * config.images.tokens, config.images.end]
            for row, start in ((0, 1), (0, 11), (1, 8)):
                tokens[row, start : start + len(span)] = span
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        return Sequences(np.where(segments == 1, tokens, 0), segments, positions)


def _pair(config: EncoderDecoderConfig, both: dict[str, Any], **sides: dict[str, Any]) -> EncoderDecoderConfig:
    """The config with these settings on both sides, and on one."""
    return replace(config, **{s: replace(getattr(config, s), **(both | sides.get(s, {}))) for s in SIDES})


SIDES = ("encoder", "decoder")
LOCAL_LOCAL_GLOBAL = ("local", "local", "global")
# the head size is not width / heads, one key/value head serves all, scores have their own scale
ODD_SHAPES = {"layers": 5, "pattern": LOCAL_LOCAL_GLOBAL, "heads": 4, "kv_heads": 1, "head_size": 10, "window": 5}
ODD_SHAPES |= {"query_scalar": 13.0}
ODD = replace(GEMMA3, **ODD_SHAPES, rope_global=Rope(5e5, factor=3.0), rope_local=Rope(100.0), final_softcap=1.5)

GEMMA2_CASES = {
    "tiny": Case(GEMMA2),
    "padded left": Case(GEMMA2, decoder_padding="left"),
    "odd": Case(replace(GEMMA2, **ODD_SHAPES, rope_local=Rope(500.0), rope_global=Rope(500.0))),
    "every head its own keys": Case(replace(GEMMA2, heads=2, kv_heads=2, head_size=6, query_scalar=None, window=7)),
    "no caps": Case(replace(GEMMA2, attention_softcap=None, final_softcap=None, layers=2)),
    "tight caps": Case(replace(GEMMA2, attention_softcap=0.5, final_softcap=0.7, kv_heads=1)),
    "one layer, window of one": Case(replace(GEMMA2, layers=1, window=1), decoder_padding="none"),
    "global first": Case(replace(GEMMA2, layers=4, pattern=("global", "local"), window=3, query_scalar=40.0)),
    "own head": Case(replace(GEMMA2, tied_head=False, window=6)),
}
GEMMA3_CASES = {
    "tiny": Case(GEMMA3),
    "padded left": Case(GEMMA3, decoder_padding="left"),
    "odd": Case(ODD),
    "whole patterns": Case(replace(GEMMA3, layers=4, window=3)),
    "less than a pattern": Case(replace(GEMMA3, layers=2, pattern=("local",) * 5 + ("global",))),
    "window of one": Case(replace(GEMMA3, window=1)),
    "image blocks": Case(GEMMA3, decoder_padding="none", blocks=True),
    "every head its own keys": Case(replace(GEMMA3, heads=2, kv_heads=2, head_size=6, rope_global=Rope(1e6))),
    "own head": Case(replace(GEMMA3, tied_head=False, kv_heads=1, window=6)),
}
IMAGES = ImageConfig(VISION, token=SOFT, begin=BEGIN, end=END, tokens=4, window=False)
OTHER_TOWER = replace(VISION, width=12, layers=1, mlp_width=20, heads=3, image_size=18, patch_size=3)
GEMMA3_IMAGE_CASES = {
    "tiny": Case(replace(GEMMA3, images=IMAGES)),
    "padded left": Case(replace(GEMMA3, images=IMAGES), decoder_padding="left"),
    "window below an image": Case(replace(GEMMA3, images=IMAGES, window=2), decoder_padding="none"),
    "odd window": Case(replace(GEMMA3, images=IMAGES, window=7, kv_heads=1)),
    "token past the vocabulary": Case(replace(GEMMA3, images=replace(IMAGES, token=97))),
    "other tower": Case(replace(GEMMA3, images=replace(IMAGES, vision=OTHER_TOWER))),
    "odd": Case(replace(ODD, images=replace(IMAGES, vision=OTHER_TOWER), final_softcap=None)),
    "one token an image": Case(replace(GEMMA3, images=replace(IMAGES, tokens=1), heads=2, kv_heads=2, layers=2)),
}
# as transformers has it since 5.8; as the weights were trained, its window is one narrower (test_live.py)
PAIR = replace(T5GEMMA, encoder_window="each_side_inclusive")
T5GEMMA_CASES = {
    "tiny": Case(PAIR, "right"),
    "padded left": Case(PAIR, "left"),
    "equal widths": Case(replace(PAIR, encoder=GEMMA2, decoder=replace(GEMMA2, window=6)), "none", "none"),
    "odd": Case(_pair(PAIR, ODD_SHAPES), "right", "none"),
    "deep encoder": Case(_pair(PAIR, {}, encoder={"layers": 5, "width": 40, "kv_heads": 4, "window": 4}), "left"),
    "deep decoder": Case(_pair(PAIR, {"window": 7}, decoder={"layers": 4, "kv_heads": 1}), "right"),
    "shapes apart": Case(
        _pair(PAIR, {}, encoder={"heads": 2, "kv_heads": 2, "head_size": 6, "query_scalar": None, "mlp_width": 20}),
        "right",
    ),
    "caps": Case(_pair(PAIR, {"attention_softcap": 0.5}, encoder={"attention_softcap": None}), "left"),
    "own head": Case(_pair(PAIR, {}, decoder={"tied_head": False, "final_softcap": None, "layers": 1}), "none"),
    "one layer each": Case(_pair(PAIR, {"layers": 1, "window": 1}), "right"),
}
T5GEMMA2_CASES = {
    "tiny": Case(T5GEMMA2, "right"),
    "padded left": Case(T5GEMMA2, "left"),
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
    "even windows": Case(_pair(T5GEMMA2, {}, encoder={"window": 6}, decoder={"window": 2}), "right"),
    "odd windows": Case(_pair(T5GEMMA2, {"query_scalar": 20.0}, encoder={"window": 7}, decoder={"window": 3}), "left"),
    "every head its own keys": Case(_pair(T5GEMMA2, {"heads": 2, "kv_heads": 2, "head_size": 6, "layers": 2}), "none"),
    "one key for all heads": Case(_pair(T5GEMMA2, {"kv_heads": 1, "rope_global": Rope(1e4, factor=2.0)}), "right"),
    "nothing tied": Case(replace(_pair(T5GEMMA2, {}, decoder={"tied_head": False}), tied_embedding=False), "right"),
}
READER = _pair(T5GEMMA2, {}, encoder={"images": IMAGES})
T5GEMMA2_IMAGE_CASES = {
    "tiny": Case(READER, "right"),
    "padded left": Case(READER, "left"),
    "window below an image": Case(_pair(READER, {"window": 3}), "none"),
    "other tower": Case(
        _pair(READER, {"heads": 2, "kv_heads": 2}, encoder={"images": replace(IMAGES, vision=OTHER_TOWER)}), "right"
    ),
    "one token an image": Case(_pair(READER, {"kv_heads": 1}, encoder={"images": replace(IMAGES, tokens=1)}), "left"),
    "deep encoder": Case(_pair(READER, {}, encoder={"layers": 5, "window": 6}), "right"),
    "deep decoder": Case(_pair(READER, {"query_scalar": 20.0}, decoder={"layers": 4, "window": 2}), "none", "none"),
    "odd": Case(
        EncoderDecoderConfig(encoder=replace(ODD, images=IMAGES), decoder=replace(ODD, layers=4), eoi_id=7), "right"
    ),
}

FAMILIES = {
    "gemma 2": GEMMA2_CASES,
    "gemma 3": GEMMA3_CASES,
    "gemma 3 with images": GEMMA3_IMAGE_CASES,
    "t5gemma": T5GEMMA_CASES,
    "t5gemma 2": T5GEMMA2_CASES,
    "t5gemma 2 with images": T5GEMMA2_IMAGE_CASES,
}
ALL = {f"{family}: {name}": case for family, cases in FAMILIES.items() for name, case in cases.items()}
GOLDEN_NAMES = ("tiny", "odd", "padded left", "image blocks", "window below an image", "deep encoder", "nothing tied")
GOLDEN = {name: case for name, case in ALL.items() if name.split(": ")[1] in GOLDEN_NAMES}
GRADIENTS = {f"{family}: odd": ALL[f"{family}: odd"] for family in FAMILIES}
