"""Every released size, as one literal each.

Sources: the Gemma 3 report (arXiv 2503.19786, table 1), the T5Gemma 2 report (arXiv 2512.14856, table 2), and the
parameter totals of the released files, which tests/models/test_sizes.py reproduces to the last one. Text shapes only.
The rope factor of t5gemma2:1b-1b and 4b-4b is inferred: that of 270m-270m, as in other ports of the two sizes.
"""

from dataclasses import replace

from t5g2.core.errors import unknown
from t5g2.models.config import EncoderDecoderConfig, ModelConfig, Rope, TextConfig

# positions beyond the pretraining length are interpolated: global layers divide them by 8 (Gemma 3 report, section 2)
_EIGHTH = Rope(1_000_000.0, factor=8.0)

_GEMMA3_270M = TextConfig(
    vocab_size=262_144, width=640, layers=18, mlp_width=2048, heads=4, kv_heads=1, head_size=256, window=512
)
_GEMMA3_1B = TextConfig(
    vocab_size=262_144, width=1152, layers=26, mlp_width=6912, heads=4, kv_heads=1, head_size=256, window=512
)
# 64 rows more than the tokenizer has pieces, for the image token
_GEMMA3_4B = TextConfig(
    vocab_size=262_208,
    width=2560,
    layers=34,
    mlp_width=10_240,
    heads=8,
    kv_heads=4,
    head_size=256,
    window=1024,
    rope_global=_EIGHTH,
)
_GEMMA3_12B = replace(_GEMMA3_4B, width=3840, layers=48, mlp_width=15_360, heads=16, kv_heads=8)
_GEMMA3_27B = replace(
    _GEMMA3_4B,
    width=5376,
    layers=62,
    mlp_width=21_504,
    heads=32,
    kv_heads=16,
    head_size=128,
    query_scalar=168.0,  # width / heads, not the head size
)


def _t5gemma2(stack: TextConfig) -> EncoderDecoderConfig:
    stack = replace(stack, vocab_size=262_144, rope_global=_EIGHTH)
    return EncoderDecoderConfig(encoder=stack, decoder=stack, eoi_id=256_000)


SIZES: dict[str, ModelConfig] = {
    "gemma3:270m": _GEMMA3_270M,
    "gemma3:1b": _GEMMA3_1B,
    "gemma3:4b": _GEMMA3_4B,
    "gemma3:12b": _GEMMA3_12B,
    "gemma3:27b": _GEMMA3_27B,
    "t5gemma2:270m-270m": _t5gemma2(_GEMMA3_270M),
    "t5gemma2:1b-1b": _t5gemma2(_GEMMA3_1B),
    "t5gemma2:4b-4b": _t5gemma2(_GEMMA3_4B),
}


def size(name: str) -> ModelConfig:
    """The architecture of a released size, such as "gemma3:1b" or "t5gemma2:1b-1b".

    Raises:
      UserError: no such size; names the nearest, and all.
    """
    if name not in SIZES:
        raise unknown("size", name, SIZES)
    return SIZES[name]
