"""The tiny models of the tests: 3 layers, pattern 2 (one whole pattern and a tail), width 32, windows of 4 tokens."""

import dataclasses

from t5g2.models.config import EncoderDecoderConfig, Rope, TextConfig

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
