"""The reference: transformers' models with our weights. Imports torch; only what is live imports this file."""

from typing import Any

import numpy as np
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, T5Gemma2Config, T5Gemma2ForConditionalGeneration
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model

from t5g2.core import tree
from t5g2.core.batch import Stream
from t5g2.models.config import EncoderDecoderConfig, ModelConfig, TextConfig
from tests.parity.cases import Case
from tests.weights import weights

KINDS = {"local": "sliding_attention", "global": "full_attention"}
BLOCK = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm.scale": "self_attn.q_norm",
    "attention.k_norm.scale": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
NORMS = {
    "gemma": {
        "pre_attention_norm.scale": "input_layernorm",
        "post_attention_norm.scale": "post_attention_layernorm",
        "pre_mlp_norm.scale": "pre_feedforward_layernorm",
        "post_mlp_norm.scale": "post_feedforward_layernorm",
    },
    "t5gemma": {
        "pre_attention_norm.scale": "pre_self_attn_layernorm",
        "post_attention_norm.scale": "post_self_attn_layernorm",
        "pre_mlp_norm.scale": "pre_feedforward_layernorm",
        "post_mlp_norm.scale": "post_feedforward_layernorm",
    },
}
OUTSIDE = {
    "gemma": {"embedder.table": "model.embed_tokens.weight", "final_norm.scale": "model.norm.weight"},
    "t5gemma": {
        "embedder.table": "model.encoder.text_model.embed_tokens.weight",
        "embedder.eoi": "model.encoder.text_model.embed_tokens.eoi_embedding",
        "encoder.final_norm.scale": "model.encoder.text_model.norm.weight",
        "decoder.final_norm.scale": "model.decoder.norm.weight",
    },
}
STACKS = {
    "layers": "model.layers",
    "encoder.layers": "model.encoder.text_model.layers",
    "decoder.layers": "model.decoder.layers",
}


def name(key: tree.LeafKey, family: str) -> str:
    """The name of a leaf's tensor in transformers."""
    path, layer = key
    if layer is None:
        return OUTSIDE[family][path]
    stack, leaf = path.split("layers.", 1)
    return f"{STACKS[stack + 'layers']}.{layer}.{(BLOCK | NORMS[family])[leaf]}.weight"


def to_theirs(key: tree.LeafKey, ours: np.ndarray) -> np.ndarray:
    """Our array as torch holds it: linear layers are [out, in] matrices."""
    if key[1] is None or ours.ndim == 1:
        return ours
    inputs = 2 if key[0].endswith("attention.o") else 1
    return ours.reshape(int(np.prod(ours.shape[:inputs])), -1).T


def make(config: ModelConfig) -> torch.nn.Module:
    """transformers' model of this config with the weights of the cases; every text parameter is accounted for."""
    torch.set_num_threads(2)
    model = _t5gemma(config) if isinstance(config, EncoderDecoderConfig) else _gemma(config)
    model.eval()
    theirs = {n: p for n, p in model.named_parameters() if "vision" not in n and "multi_modal" not in n}
    ours = {name(key, family(config)): to_theirs(key, array) for key, array in weights(config).items()}
    assert theirs.keys() == ours.keys(), theirs.keys() ^ ours.keys()
    with torch.no_grad():
        for tensor_name, parameter in theirs.items():
            assert parameter.shape == ours[tensor_name].shape, tensor_name
            parameter.copy_(torch.tensor(ours[tensor_name]))
    return model


def run(model: torch.nn.Module, case: Case) -> torch.Tensor:
    """Its logits [B, T, V] for the inputs of the case, all masks given."""
    encoder, decoder = case.streams
    tokens, mask = _tensors(decoder)
    if encoder is None:
        if decoder.blocks is not None:
            mask = _block_masks(model, decoder, mask)
        return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    encoder_tokens, encoder_mask = _tensors(encoder)
    return model(
        input_ids=encoder_tokens,
        attention_mask=encoder_mask,
        decoder_input_ids=tokens,
        decoder_attention_mask=mask,
        use_cache=False,
    ).logits


def gradients(model: torch.nn.Module, case: Case, loss_weights: np.ndarray) -> dict[tree.LeafKey, np.ndarray]:
    """Gradients of sum(logits * loss_weights), under our names, in torch's shapes."""
    model.zero_grad()
    (run(model, case) * torch.tensor(loss_weights)).sum().backward()
    theirs = dict(model.named_parameters())
    return {key: theirs[name(key, family(case.config))].grad.numpy() for key in weights(case.config)}


def family(config: ModelConfig) -> str:
    return "t5gemma" if isinstance(config, EncoderDecoderConfig) else "gemma"


def _tensors(stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(stream.tokens).long(), torch.tensor(stream.segments).long()


def _block_masks(model, decoder: Stream, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The masks that transformers makes for images; a causal model without a vision tower takes them ready made."""
    return create_masks_for_vision_model(
        config=model.config,
        inputs_embeds=torch.zeros(*decoder.tokens.shape, model.config.hidden_size),
        attention_mask=mask,
        past_key_values=None,
        position_ids=None,
        block_sequence_ids=torch.tensor(decoder.blocks).long() - 1,
    )


def _text(config: TextConfig) -> dict[str, Any]:
    def rope(parameters):
        return {"rope_type": "linear", "rope_theta": parameters.base, "factor": parameters.factor}

    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "query_pre_attn_scalar": config.query_scalar or config.head_size,
        "sliding_window": config.window,
        "layer_types": [KINDS[config.kind(layer)] for layer in range(config.layers)],
        "rope_parameters": {KINDS["local"]: rope(config.rope_local), KINDS["global"]: rope(config.rope_global)},
        "final_logit_softcapping": config.final_softcap,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": 64,
    }


def _gemma(config: TextConfig) -> Gemma3ForCausalLM:
    return Gemma3ForCausalLM._from_config(Gemma3TextConfig(**_text(config)), attn_implementation="eager")


def _t5gemma(config: EncoderDecoderConfig) -> T5Gemma2ForConditionalGeneration:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
    }
    encoder = {
        "text_config": _text(config.encoder),
        "vision_config": vision,
        "mm_tokens_per_image": 4,
        "eoi_token_index": config.eoi_id,
        "boi_token_index": 6,
    }
    settings = T5Gemma2Config(encoder=encoder, decoder=_text(config.decoder), image_token_index=8)
    return T5Gemma2ForConditionalGeneration._from_config(settings, attn_implementation="eager")
