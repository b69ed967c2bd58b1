"""Architectures of all released sizes, with the image tower where the released model has one.

`config.text_only` removes the tower. Names are those of the released models, FAMILY:SIZE, without the suffix for their
training: google/gemma-3-4b-pt is gemma3:4b, google/t5gemma-9b-2b-ul2 is t5gemma:9b-2b (an encoder of 9B, a decoder of
2B), google/medgemma-27b-text-it is medgemma:27b-text.

Sources: the Gemma 2 report (arXiv 2408.00118, table 1); the Gemma 3 report (arXiv 2503.19786, table 1 and section 2);
T5Gemma (arXiv 2504.06225, table 1; but sizes S to XL from google-deepmind/gemma, gemma/research/t5gemma, where MLPs are
twice as wide as the table's parameter counts imply, and so they are in the released weights); T5Gemma 2 (arXiv
2512.14856, table 2); MedGemma (arXiv 2507.05201, section 2.2). tests/models/test_sizes.py reproduces the parameter
totals of the released files exactly.

Known gaps: the rope factor of t5gemma2:1b-1b and 4b-4b is inferred: that of 270m-270m, which other ports have too.
Vocabularies are those of the Hugging Face files; google-deepmind/gemma stores 256128 rows for Gemma 2 and T5Gemma, and
262144 for Gemma 3. The 262144 rows of medgemma:27b-text follow from its total in keras-hub (gemma3_presets.py).
"""

from dataclasses import replace

from t5g2.core.errors import unknown
from t5g2.models.config import (
    DualEncoderConfig,
    EncoderDecoderConfig,
    ImageConfig,
    ModelConfig,
    Rope,
    SiglipTextConfig,
    TextConfig,
    VisionConfig,
)

# Gemma 2: alternating local and global layers, one rotary base, soft caps instead of norms on queries and keys

_GEMMA2_2B = TextConfig(
    vocab_size=256_000,
    width=2304,
    layers=26,
    mlp_width=9216,
    heads=8,
    kv_heads=4,
    head_size=256,
    window=4096,
    pattern=("local", "global"),
    rope_local=Rope(10_000.0),
    rope_global=Rope(10_000.0),
    qk_norm=False,
    attention_softcap=50.0,
    final_softcap=30.0,
)
_GEMMA2_9B = replace(_GEMMA2_2B, width=3584, layers=42, mlp_width=14_336, heads=16, kv_heads=8)
_GEMMA2_27B = replace(
    _GEMMA2_2B,
    width=4608,
    layers=46,
    mlp_width=36_864,
    heads=32,
    kv_heads=16,
    head_size=128,
    query_scalar=144.0,  # width / heads, not the head size
)

# Gemma 3. SigLIP so400m/14; positions beyond the pretraining length are interpolated: global layers divide them by 8

_SO400M = VisionConfig(width=1152, layers=27, mlp_width=4304, heads=16, image_size=896, patch_size=14)
# the embedding has 64 rows more than the tokenizer has ids; the first of them is the image token's
_GEMMA3_IMAGES = ImageConfig(vision=_SO400M, token=262_144, begin=255_999, end=256_000, tokens=256)
_T5GEMMA2_IMAGES = replace(_GEMMA3_IMAGES, token=256_001)
_EIGHTH = Rope(1_000_000.0, factor=8.0)

_GEMMA3_270M = TextConfig(
    vocab_size=262_144, width=640, layers=18, mlp_width=2048, heads=4, kv_heads=1, head_size=256, window=512
)
_GEMMA3_1B = TextConfig(
    vocab_size=262_144, width=1152, layers=26, mlp_width=6912, heads=4, kv_heads=1, head_size=256, window=512
)
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
    images=_GEMMA3_IMAGES,
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

# T5Gemma in the sizes of T5: Gemma 2 blocks with multi-head attention (kv_heads = heads)

_T5_SMALL = replace(_GEMMA2_2B, width=512, layers=8, mlp_width=1024, heads=8, kv_heads=8, head_size=64)
_T5_BASE = replace(_T5_SMALL, width=768, layers=12, mlp_width=2048, heads=12, kv_heads=12)
_T5_LARGE = replace(_T5_SMALL, width=1024, layers=24, mlp_width=2816, heads=16, kv_heads=16)
_T5_MEDIUM_LARGE = replace(_GEMMA2_2B, width=1152, layers=26, mlp_width=6912, heads=4, kv_heads=4)
_T5_XL = replace(_T5_SMALL, width=2048, layers=24, mlp_width=5120, heads=32, kv_heads=32)


def _t5gemma(encoder: TextConfig, decoder: TextConfig) -> EncoderDecoderConfig:
    return EncoderDecoderConfig(
        encoder=encoder, decoder=decoder, cross="separate", tied_embedding=False, encoder_window="each_side"
    )


def _t5gemma2(stack: TextConfig) -> EncoderDecoderConfig:
    stack = replace(stack, vocab_size=262_144, rope_global=_EIGHTH, images=None)
    return EncoderDecoderConfig(encoder=replace(stack, images=_T5GEMMA2_IMAGES), decoder=stack, eoi_id=256_000)


_MEDSIGLIP = DualEncoderConfig(
    vision=replace(_SO400M, image_size=448, pool=True),
    text=SiglipTextConfig(
        vocab_size=32_000, length=64, width=1152, layers=27, mlp_width=4304, heads=16, projection=1152
    ),
)

SIZES: dict[str, ModelConfig] = {
    "gemma2:2b": _GEMMA2_2B,
    "gemma2:9b": _GEMMA2_9B,
    "gemma2:27b": _GEMMA2_27B,
    "gemma3:270m": _GEMMA3_270M,
    "gemma3:1b": _GEMMA3_1B,
    "gemma3:4b": _GEMMA3_4B,
    "gemma3:12b": _GEMMA3_12B,
    "gemma3:27b": _GEMMA3_27B,
    "medgemma:4b": _GEMMA3_4B,
    "medgemma:27b": _GEMMA3_27B,
    "medgemma:27b-text": replace(_GEMMA3_27B, vocab_size=262_144, images=None),
    "t5gemma:s-s": _t5gemma(_T5_SMALL, _T5_SMALL),
    "t5gemma:b-b": _t5gemma(_T5_BASE, _T5_BASE),
    "t5gemma:l-l": _t5gemma(_T5_LARGE, _T5_LARGE),
    "t5gemma:ml-ml": _t5gemma(_T5_MEDIUM_LARGE, _T5_MEDIUM_LARGE),
    "t5gemma:xl-xl": _t5gemma(_T5_XL, _T5_XL),
    "t5gemma:2b-2b": _t5gemma(_GEMMA2_2B, _GEMMA2_2B),
    "t5gemma:9b-2b": _t5gemma(_GEMMA2_9B, _GEMMA2_2B),
    "t5gemma:9b-9b": _t5gemma(_GEMMA2_9B, _GEMMA2_9B),
    "t5gemma2:270m-270m": _t5gemma2(_GEMMA3_270M),
    "t5gemma2:1b-1b": _t5gemma2(_GEMMA3_1B),
    "t5gemma2:4b-4b": _t5gemma2(_GEMMA3_4B),
    "medsiglip:448": _MEDSIGLIP,
}


def size(name: str) -> ModelConfig:
    """Returns the architecture of a released size, such as "gemma3:1b" or "t5gemma2:1b-1b".

    Raises:
      UserError: there is no such size; the message has the nearest names, and all names.
    """
    if name not in SIZES:
        raise unknown("size", name, SIZES)
    return SIZES[name]
