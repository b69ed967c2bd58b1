"""Tensors of the official Flax trees of google-deepmind/gemma: names are those of its modules, joined by "/"."""

from t5g2.checkpoint.names import (
    BATCHED,
    EINSUM,
    EINSUMS,
    GATES,
    GATES_TRANSPOSED,
    PADDED,
    SAME,
    TensorFormat,
    with_prefix,
)

ATTENTION = (
    ("q_einsum/w", "q", EINSUM),
    ("kv_einsum/w", ("k", "v"), EINSUMS),
    ("qkv_einsum/w", ("q", "k", "v"), EINSUMS),  # where there are as many key/value heads as query heads
    ("attn_vec_einsum/w", "o", SAME),
    ("_query_norm/scale", "q_norm.scale", SAME),
    ("_key_norm/scale", "k_norm.scale", SAME),
)
BLOCK = (
    ("pre_attention_norm/scale", "pre_attention_norm.scale", SAME),
    *with_prefix("attn/", "attention.", ATTENTION),
    ("post_attention_norm/scale", "post_attention_norm.scale", SAME),
    ("pre_cross_attention_norm/scale", "pre_cross_norm.scale", SAME),
    *with_prefix("cross_attn/", "cross_attention.", ATTENTION),
    ("post_cross_attention_norm/scale", "post_cross_norm.scale", SAME),
    ("pre_ffw_norm/scale", "pre_mlp_norm.scale", SAME),
    # a tree has one of the two orientations, and the shape decides
    ("mlp/gating_einsum", ("mlp.gate", "mlp.up"), GATES),
    ("mlp/gating_einsum", ("mlp.gate", "mlp.up"), GATES_TRANSPOSED),
    ("mlp/linear", "mlp.down", SAME),
    ("post_ffw_norm/scale", "post_mlp_norm.scale", SAME),
)
STACK = (
    *with_prefix("layer_{i}/", "layers.", BLOCK),
    ("final_norm/scale", "final_norm.scale", SAME),
)
NORM = (("scale", "scale", SAME), ("bias", "bias", SAME))
DENSE = (("kernel", "kernel", SAME), ("bias", "bias", SAME))
VISION = (
    *with_prefix("embedding/", "patches.", DENSE),
    ("pos_embedding", "positions", BATCHED),
    *with_prefix("Transformer/encoderblock_{i}/LayerNorm_0/", "layers.pre_attention_norm.", NORM),
    *with_prefix("Transformer/encoderblock_{i}/MultiHeadDotProductAttention_0/query/", "layers.attention.q.", DENSE),
    *with_prefix("Transformer/encoderblock_{i}/MultiHeadDotProductAttention_0/key/", "layers.attention.k.", DENSE),
    *with_prefix("Transformer/encoderblock_{i}/MultiHeadDotProductAttention_0/value/", "layers.attention.v.", DENSE),
    *with_prefix("Transformer/encoderblock_{i}/MultiHeadDotProductAttention_0/out/", "layers.attention.o.", DENSE),
    *with_prefix("Transformer/encoderblock_{i}/LayerNorm_1/", "layers.pre_mlp_norm.", NORM),
    *with_prefix("Transformer/encoderblock_{i}/MlpBlock_0/Dense_0/", "layers.mlp.up.", DENSE),
    *with_prefix("Transformer/encoderblock_{i}/MlpBlock_0/Dense_1/", "layers.mlp.down.", DENSE),
    *with_prefix("Transformer/encoder_norm/", "final_norm.", NORM),
)
# a table is stored with or without padding rows, and the shape decides
GEMMA = TensorFormat(
    "official Flax Gemma",
    (
        ("embedder/input_embedding", "embedder.table", PADDED),
        ("embedder/input_embedding", "embedder.table", SAME),
        ("embedder/mm_input_projection/w", "projector.kernel", SAME),
        ("embedder/mm_soft_embedding_norm/scale", "projector.norm.scale", SAME),
        *STACK,
        *with_prefix("vision_encoder/siglip_encoder/", "vision.", VISION),
    ),
)
T5GEMMA = TensorFormat(
    "official Flax T5Gemma",
    (
        ("encoder/embedder/input_embedding", "encoder_embedder.table", PADDED),
        ("encoder/embedder/input_embedding", "encoder_embedder.table", SAME),
        ("decoder/embedder/input_embedding", "decoder_embedder.table", PADDED),
        ("decoder/embedder/input_embedding", "decoder_embedder.table", SAME),
        *with_prefix("encoder/", "encoder.", STACK),
        *with_prefix("decoder/", "decoder.", STACK),
    ),
)
