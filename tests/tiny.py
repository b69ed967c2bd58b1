"""The tiny models of the tests: 3 layers, pattern 2 (one whole pattern and a tail), width 32, windows of 4 tokens."""

import dataclasses

from t5g2.models.config import (
    DualEncoderConfig,
    EncoderDecoderConfig,
    ImageConfig,
    Rope,
    SiglipTextConfig,
    TextConfig,
    VisionConfig,
)
from t5g2.models.layers import Compute

FLOAT32 = Compute(dtype="float32")

GEMMA3 = TextConfig(
    vocab_size=97,
    width=32,
    layers=3,
    mlp_width=48,
    heads=4,
    kv_heads=2,
    head_size=8,
    window=4,
    pattern=("local", "global"),
    rope_global=Rope(1_000_000.0, factor=8.0),
)
T5GEMMA2 = EncoderDecoderConfig(encoder=GEMMA3, decoder=dataclasses.replace(GEMMA3, window=5), eoi_id=7)

GEMMA2 = dataclasses.replace(
    GEMMA3,
    qk_norm=False,
    attention_softcap=5.0,
    final_softcap=3.0,
    rope_global=Rope(10_000.0),
    query_scalar=12.0,
)
T5GEMMA = EncoderDecoderConfig(
    encoder=dataclasses.replace(GEMMA2, width=24, window=3),
    decoder=GEMMA2,
    cross="separate",
    tied_embedding=False,
    encoder_window="each_side",
)
# 4 x 4 patches of 4 pixels, averaged to 4 tokens
VISION = VisionConfig(width=16, layers=2, mlp_width=24, heads=2, image_size=16, patch_size=4)
IMAGES = ImageConfig(VISION, token=8, begin=6, end=7, tokens=4)
GEMMA3_IMAGES = dataclasses.replace(GEMMA3, images=IMAGES)
T5GEMMA2_IMAGES = dataclasses.replace(T5GEMMA2, encoder=GEMMA3_IMAGES)
SIGLIP = DualEncoderConfig(
    vision=dataclasses.replace(VISION, pool=True),
    text=SiglipTextConfig(vocab_size=50, length=6, width=20, layers=2, mlp_width=28, heads=4, projection=16),
)
