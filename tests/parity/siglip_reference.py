"""transformers' SigLIP with our weights, by names written here once more: not those that import and export use.

Imports torch; only live tests and make_golden_siglip import this file.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
import transformers
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

from t5g2.core import tree
from t5g2.models.config import ImageConfig, SiglipTextConfig, VisionConfig

Arrays = dict[str, np.ndarray]


def tower(model, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A SiglipVisionModel."""
    settings = transformers.SiglipVisionConfig(**_vision(model.config))
    return _filled(transformers.SiglipVisionModel, settings, tower_tensors(leaves(model)), dtype)


def dual_encoder(model, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A SiglipModel."""
    config = model.config
    settings = transformers.SiglipConfig(text_config=_text(config.text), vision_config=_vision(config.vision))
    return _filled(transformers.SiglipModel, settings, dual_tensors(leaves(model)), dtype)


def projector(model, width: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A Gemma3MultiModalProjector."""
    config: ImageConfig = model.config
    settings = transformers.Gemma3Config(
        vision_config=_vision(config.vision) | {"model_type": "siglip_vision_model"},
        text_config={"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 1},
        mm_tokens_per_image=config.tokens,
    )
    made = Gemma3MultiModalProjector(settings)
    made.load_state_dict(_torch(projector_tensors(leaves(model))), strict=True)
    return made.to(dtype).eval()


def leaves(model) -> Mapping[tree.LeafKey, np.ndarray]:
    """Our weights, or gradients by them."""
    return {key: np.asarray(leaf.read()) for key, leaf in tree.leaves(jax.device_get(model)).items()}


def gradients(module: torch.nn.Module) -> Arrays:
    """By transformers' names."""
    return {name: p.grad.numpy() for name, p in module.named_parameters() if p.grad is not None}


def tower_tensors(ours: Mapping[tree.LeafKey, np.ndarray], prefix: str = "") -> Arrays:
    """The tensors of a SiglipVisionModel."""
    part = {(path.removeprefix(prefix), layer): x for (path, layer), x in ours.items() if path.startswith(prefix)}
    made = {
        "embeddings.patch_embedding.weight": part["patches.kernel", None].transpose(3, 2, 0, 1),
        "embeddings.patch_embedding.bias": part["patches.bias", None],
        "embeddings.position_embedding.weight": part["positions", None],
        "post_layernorm.weight": part["final_norm.scale", None],
        "post_layernorm.bias": part["final_norm.bias", None],
    } | _layers(part)
    if ("pool.probe", None) in part:
        width = part["positions", None].shape[1]
        kernels = [part[f"pool.attention.{name}.kernel", None].reshape(width, width).T for name in "qkv"]
        biases = [part[f"pool.attention.{name}.bias", None].ravel() for name in "qkv"]
        made |= {
            "head.probe": part["pool.probe", None][None, None],
            "head.attention.in_proj_weight": np.concatenate(kernels),
            "head.attention.in_proj_bias": np.concatenate(biases),
            "head.attention.out_proj.weight": part["pool.attention.o.kernel", None].reshape(width, width).T,
            "head.attention.out_proj.bias": part["pool.attention.o.bias", None],
            "head.layernorm.weight": part["pool.norm.scale", None],
            "head.layernorm.bias": part["pool.norm.bias", None],
        }
        for theirs, name in (("fc1", "up"), ("fc2", "down")):
            made[f"head.mlp.{theirs}.weight"] = part[f"pool.mlp.{name}.kernel", None].T
            made[f"head.mlp.{theirs}.bias"] = part[f"pool.mlp.{name}.bias", None]
    return made


def dual_tensors(ours: Mapping[tree.LeafKey, np.ndarray]) -> Arrays:
    """The tensors of a SiglipModel."""
    part = {(path.removeprefix("text."), layer): x for (path, layer), x in ours.items() if path.startswith("text.")}
    text = {
        "embeddings.token_embedding.weight": part["embedder.table", None],
        "embeddings.position_embedding.weight": part["positions", None],
        "final_layer_norm.weight": part["final_norm.scale", None],
        "final_layer_norm.bias": part["final_norm.bias", None],
        "head.weight": part["head.kernel", None].T,
        "head.bias": part["head.bias", None],
    } | _layers(part)
    return {
        **{f"vision_model.{name}": x for name, x in tower_tensors(ours, "vision.").items()},
        **{f"text_model.{name}": x for name, x in text.items()},
        "logit_scale": ours["logit_scale", None][None],
        "logit_bias": ours["logit_bias", None][None],
    }


def projector_tensors(ours: Mapping[tree.LeafKey, np.ndarray]) -> Arrays:
    """The tensors of a Gemma3MultiModalProjector."""
    return {"mm_input_projection_weight": ours["kernel", None], "mm_soft_emb_norm.weight": ours["norm.scale", None]}


def _layers(part: Mapping[tree.LeafKey, np.ndarray]) -> Arrays:
    made = {}
    for layer in sorted({layer for _, layer in part if layer is not None}):
        at = f"encoder.layers.{layer}."
        width = part["layers.pre_attention_norm.scale", layer].size
        for theirs, name in (("layer_norm1", "pre_attention_norm"), ("layer_norm2", "pre_mlp_norm")):
            made[f"{at}{theirs}.weight"] = part[f"layers.{name}.scale", layer]
            made[f"{at}{theirs}.bias"] = part[f"layers.{name}.bias", layer]
        for theirs, name in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o")):
            kernel, bias = (part[f"layers.attention.{name}.{what}", layer] for what in ("kernel", "bias"))
            made[f"{at}self_attn.{theirs}.weight"] = kernel.reshape(width, width).T
            made[f"{at}self_attn.{theirs}.bias"] = bias.ravel()
        for theirs, name in (("fc1", "up"), ("fc2", "down")):
            made[f"{at}mlp.{theirs}.weight"] = part[f"layers.mlp.{name}.kernel", layer].T
            made[f"{at}mlp.{theirs}.bias"] = part[f"layers.mlp.{name}.bias", layer]
    return made


def _filled(kind, settings, tensors: Arrays, dtype: torch.dtype) -> torch.nn.Module:
    torch.set_num_threads(1)
    made = kind._from_config(settings, attn_implementation="eager")
    made.load_state_dict(_torch(tensors), strict=True)
    return made.to(dtype).eval()


def _torch(tensors: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(np.ascontiguousarray(x)) for name, x in tensors.items()}


def pixels(images_BHWC: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(images_BHWC.transpose(0, 3, 1, 2)).to(dtype)


def _shape(config: VisionConfig | SiglipTextConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "layer_norm_eps": config.norm_eps,
    }


def _vision(config: VisionConfig) -> dict[str, Any]:
    return _shape(config) | {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "vision_use_head": config.pool,
    }


def _text(config: SiglipTextConfig) -> dict[str, Any]:
    return _shape(config) | {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.length,
        "projection_size": config.projection,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }


def run_tower(module: torch.nn.Module, images_BHWC: np.ndarray) -> torch.Tensor:
    """[B, P, D] or, with a pooling head, [B, P + 1, D]: the image's vector comes last."""
    output = module(pixels(images_BHWC, module.dtype))
    states = output.last_hidden_state
    return states if output.pooler_output is None else torch.cat([states, output.pooler_output[:, None]], dim=1)


def run_projector(module: torch.nn.Module, patches_BPD: np.ndarray) -> torch.Tensor:
    return module(torch.tensor(patches_BPD).to(module.mm_input_projection_weight.dtype))


def run_dual(module: torch.nn.Module, tokens_BT: np.ndarray, images_BHWC: np.ndarray) -> Any:
    """Its answer: embeddings of length 1, logits of all texts with all images; of pairs, also the loss."""
    return module(
        input_ids=torch.tensor(tokens_BT).long(),
        pixel_values=pixels(images_BHWC, module.dtype),
        return_loss=len(tokens_BT) == len(images_BHWC),
    )
