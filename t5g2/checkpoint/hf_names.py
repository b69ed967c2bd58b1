"""Tensors of Hugging Face folders. A linear layer's weight is [out, in]; names end in .weight and .bias."""

from t5g2.checkpoint.names import (
    BUFFERS,
    CONV,
    FROM_HEADS,
    HEADS_BIAS,
    LINEAR,
    PACKED,
    PACKED_BIAS,
    PROBE,
    SAME,
    SCALAR,
    TO_HEADS,
    TensorFormat,
    with_prefix,
)

ATTENTION = (
    ("q_proj.weight", "q", TO_HEADS),
    ("k_proj.weight", "k", TO_HEADS),
    ("v_proj.weight", "v", TO_HEADS),
    ("o_proj.weight", "o", FROM_HEADS),
    ("q_norm.weight", "q_norm.scale", SAME),
    ("k_norm.weight", "k_norm.scale", SAME),
)
MLP = (
    ("mlp.gate_proj.weight", "mlp.gate", LINEAR),
    ("mlp.up_proj.weight", "mlp.up", LINEAR),
    ("mlp.down_proj.weight", "mlp.down", LINEAR),
    ("pre_feedforward_layernorm.weight", "pre_mlp_norm.scale", SAME),
    ("post_feedforward_layernorm.weight", "post_mlp_norm.scale", SAME),
)
GEMMA_BLOCK = (
    ("input_layernorm.weight", "pre_attention_norm.scale", SAME),
    *with_prefix("self_attn.", "attention.", ATTENTION),
    ("post_attention_layernorm.weight", "post_attention_norm.scale", SAME),
    *MLP,
)
GEMMA_STACK = (
    ("embed_tokens.weight", "embedder.table", SAME),
    *with_prefix("layers.{i}.", "layers.", GEMMA_BLOCK),
    ("norm.weight", "final_norm.scale", SAME),
)
# T5Gemma names its norms after the attention they belong to; an encoder has no rows of cross-attention
T5GEMMA_STACK = (
    ("layers.{i}.pre_self_attn_layernorm.weight", "layers.pre_attention_norm.scale", SAME),
    *with_prefix("layers.{i}.self_attn.", "layers.attention.", ATTENTION),
    ("layers.{i}.post_self_attn_layernorm.weight", "layers.post_attention_norm.scale", SAME),
    ("layers.{i}.pre_cross_attn_layernorm.weight", "layers.pre_cross_norm.scale", SAME),
    *with_prefix("layers.{i}.cross_attn.", "layers.cross_attention.", ATTENTION),
    ("layers.{i}.post_cross_attn_layernorm.weight", "layers.post_cross_norm.scale", SAME),
    *with_prefix("layers.{i}.", "layers.", MLP),
    ("norm.weight", "final_norm.scale", SAME),
)
NORM = (("weight", "scale", SAME), ("bias", "bias", SAME))
SIGLIP_MLP = (
    ("mlp.fc1.weight", "mlp.up.kernel", LINEAR),
    ("mlp.fc1.bias", "mlp.up.bias", SAME),
    ("mlp.fc2.weight", "mlp.down.kernel", LINEAR),
    ("mlp.fc2.bias", "mlp.down.bias", SAME),
)
SIGLIP_STACK = (
    *with_prefix("layer_norm1.", "pre_attention_norm.", NORM),
    ("self_attn.q_proj.weight", "attention.q.kernel", TO_HEADS),
    ("self_attn.q_proj.bias", "attention.q.bias", HEADS_BIAS),
    ("self_attn.k_proj.weight", "attention.k.kernel", TO_HEADS),
    ("self_attn.k_proj.bias", "attention.k.bias", HEADS_BIAS),
    ("self_attn.v_proj.weight", "attention.v.kernel", TO_HEADS),
    ("self_attn.v_proj.bias", "attention.v.bias", HEADS_BIAS),
    ("self_attn.out_proj.weight", "attention.o.kernel", FROM_HEADS),
    ("self_attn.out_proj.bias", "attention.o.bias", SAME),
    *with_prefix("layer_norm2.", "pre_mlp_norm.", NORM),
    *SIGLIP_MLP,
)
# the pooling head is stored as one torch MultiheadAttention, with packed queries, keys and values
VISION = (
    ("embeddings.patch_embedding.weight", "vision.patches.kernel", CONV),
    ("embeddings.patch_embedding.bias", "vision.patches.bias", SAME),
    ("embeddings.position_embedding.weight", "vision.positions", SAME),
    *with_prefix("encoder.layers.{i}.", "vision.layers.", SIGLIP_STACK),
    *with_prefix("post_layernorm.", "vision.final_norm.", NORM),
    ("head.probe", "vision.pool.probe", PROBE),
    (
        "head.attention.in_proj_weight",
        ("vision.pool.attention.q.kernel", "vision.pool.attention.k.kernel", "vision.pool.attention.v.kernel"),
        PACKED,
    ),
    (
        "head.attention.in_proj_bias",
        ("vision.pool.attention.q.bias", "vision.pool.attention.k.bias", "vision.pool.attention.v.bias"),
        PACKED_BIAS,
    ),
    ("head.attention.out_proj.weight", "vision.pool.attention.o.kernel", FROM_HEADS),
    ("head.attention.out_proj.bias", "vision.pool.attention.o.bias", SAME),
    *with_prefix("head.layernorm.", "vision.pool.norm.", NORM),
    *with_prefix("head.", "vision.pool.", SIGLIP_MLP),
)
PROJECTOR = (
    ("mm_input_projection_weight", "projector.kernel", SAME),
    ("mm_soft_emb_norm.weight", "projector.norm.scale", SAME),
)
# Gemma reads the states of patches, so the pooling head of its tower is never used, though transformers' default has it
UNUSED_POOL = rf"\bvision_tower\.vision_model\.head\.|{BUFFERS}"
# transformers 5 saves towers without this segment; those of the hub have it
WITH_VISION_MODEL = (r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.")
GEMMA = TensorFormat(
    "Hugging Face Gemma",
    (*with_prefix("model.", "", GEMMA_STACK), ("lm_head.weight", "unembedder.table", SAME)),
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    # a stack saved without its head (Gemma3TextModel)
    aliases=((r"^(?=(embed_tokens|layers|norm|rotary_emb\w*)\.)", "model."),),
)
# the names are those of the hub's files; transformers 5 puts the parts of the model under "model."
GEMMA3_IMAGES = TensorFormat(
    "Hugging Face Gemma 3 with images",
    (
        *with_prefix("language_model.model.", "", GEMMA_STACK),
        *with_prefix("vision_tower.vision_model.", "", VISION),
        *with_prefix("multi_modal_projector.", "", PROJECTOR),
        ("lm_head.weight", "unembedder.table", SAME),
    ),
    copies={"lm_head.weight": "language_model.model.embed_tokens.weight"},
    aliases=(
        (r"^model\.language_model\.", "language_model.model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.(?!model\.)", "language_model.model."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        WITH_VISION_MODEL,
    ),
    unused=UNUSED_POOL,
)
T5GEMMA = TensorFormat(
    "Hugging Face T5Gemma",
    (
        ("model.encoder.embed_tokens.weight", "encoder_embedder.table", SAME),
        ("model.decoder.embed_tokens.weight", "decoder_embedder.table", SAME),
        *with_prefix("model.encoder.", "encoder.", T5GEMMA_STACK),
        *with_prefix("model.decoder.", "decoder.", T5GEMMA_STACK),
        ("lm_head.out_proj.weight", "unembedder.table", SAME),
    ),
    copies={"lm_head.out_proj.weight": "model.decoder.embed_tokens.weight"},
    aliases=((r"^(encoder|decoder)\.", r"model.\1."),),
)
# with one tied embedding the leaf is "embedder", else each side has its own; the model's leaves decide
T5GEMMA2 = TensorFormat(
    "Hugging Face T5Gemma 2",
    (
        ("model.encoder.embed_tokens.weight", "embedder.table", SAME),
        ("model.encoder.embed_tokens.eoi_embedding", "embedder.eoi", SAME),
        ("model.encoder.embed_tokens.weight", "encoder_embedder.table", SAME),
        ("model.encoder.embed_tokens.eoi_embedding", "encoder_embedder.eoi", SAME),
        ("model.decoder.embed_tokens.weight", "decoder_embedder.table", SAME),
        ("model.decoder.embed_tokens.eoi_embedding", "decoder_embedder.eoi", SAME),
        *with_prefix("model.encoder.", "encoder.", T5GEMMA_STACK),
        *with_prefix("model.encoder.vision_tower.vision_model.", "", VISION),
        *with_prefix("model.encoder.multi_modal_projector.", "", PROJECTOR),
        *with_prefix("model.decoder.", "decoder.", T5GEMMA_STACK),
        ("lm_head.out_proj.weight", "unembedder.table", SAME),
    ),
    copies={
        "lm_head.out_proj.weight": "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight": "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.eoi_embedding": "model.encoder.embed_tokens.eoi_embedding",
    },
    aliases=(
        (r"^(encoder|decoder)\.", r"model.\1."),
        (r"^model\.encoder\.text_model\.", "model.encoder."),
        WITH_VISION_MODEL,
    ),
    unused=UNUSED_POOL,
)
SIGLIP = TensorFormat(
    "Hugging Face SigLIP",
    (
        *with_prefix("vision_model.", "", VISION),
        ("text_model.embeddings.token_embedding.weight", "text.embedder.table", SAME),
        ("text_model.embeddings.position_embedding.weight", "text.positions", SAME),
        *with_prefix("text_model.encoder.layers.{i}.", "text.layers.", SIGLIP_STACK),
        *with_prefix("text_model.final_layer_norm.", "text.final_norm.", NORM),
        ("text_model.head.weight", "text.head.kernel", LINEAR),
        ("text_model.head.bias", "text.head.bias", SAME),
        ("logit_scale", "logit_scale", SCALAR),
        ("logit_bias", "logit_bias", SCALAR),
    ),
)
SIGLIP_VISION = TensorFormat(
    "Hugging Face SigLIP vision tower",
    with_prefix("vision_model.", "", VISION),
    aliases=((r"^(?!vision_model\.)", "vision_model."),),
)
