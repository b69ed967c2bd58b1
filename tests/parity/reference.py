"""The reference: transformers' models, loaded from what we export. Imports torch; only live tests import this file."""

import copy
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model

from t5g2.checkpoint import hf_config_writer, names
from t5g2.checkpoint.export_folder import export_model
from t5g2.checkpoint.folder import save_model
from t5g2.core import tree
from t5g2.core.batch import Sequences
from t5g2.models import build
from t5g2.models.config import ModelConfig
from tests.parity.cases import Case


def make(model, folder: Path) -> torch.nn.Module:
    """transformers' model with the weights of ours, in float32, by way of two folders that are written into `folder`.

    Every tensor is accounted for by transformers itself.
    """
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    save_model(folder / "ours", model)
    export_model(folder / "ours", folder / "hf")
    settings = transformers.AutoConfig.from_pretrained(folder / "hf")
    loader = getattr(transformers, settings.architectures[0])
    made, loading_info = loader.from_pretrained(
        folder / "hf", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading_info.values()), loading_info
    return made.eval()


def in_dtype(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A copy with all weights in this dtype, as transformers casts them when it loads; buffers stay in float32."""
    cast = copy.deepcopy(model)
    for parameter in cast.parameters():
        parameter.data = parameter.data.to(dtype)
    return cast


def run(model: torch.nn.Module, case: Case) -> torch.Tensor:
    """Its logits [B, T, V] for the inputs of the case, all masks given."""
    encoder, decoder = case.streams
    tokens, mask = _tensors(decoder)
    images = {} if case.images is None else {"pixel_values": _pixels(model, case)}
    if encoder is None:
        if decoder.blocks is not None and not images:
            mask = _block_masks(model, decoder, mask)
        if images:
            images["token_type_ids"] = torch.tensor(decoder.blocks > 0).long()
        return model(input_ids=tokens, attention_mask=mask, use_cache=False, **images).logits
    encoder_tokens, encoder_mask = _tensors(encoder)
    return model(
        input_ids=encoder_tokens,
        attention_mask=encoder_mask,
        decoder_input_ids=tokens,
        decoder_attention_mask=mask,
        use_cache=False,
        **images,
    ).logits


def gradients(
    model: torch.nn.Module, case: Case, labels_BT: np.ndarray
) -> tuple[float, dict[tree.LeafKey, np.ndarray]]:
    """The mean cross-entropy of the labels that are not -100, by transformers' own loss, and its gradients as ours are:
    by (path, layer), in our shapes. Nothing is shifted: labels_BT[b, t] is predicted at position t.
    """
    model.zero_grad()
    logits = run(model, case)
    labels = torch.tensor(labels_BT).long()
    loss = ForCausalLMLoss(logits, labels, logits.shape[-1], shift_labels=labels)
    loss.backward()
    theirs = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for one in _tied(case.config):
        grad = theirs[_live(one.name, theirs)].grad.numpy()
        for index, key in enumerate(one.keys):
            found[key] = one.axes.to_leaf(grad, one.shapes, index)
    return loss.item(), found


def _tied(config: ModelConfig) -> list[names.TensorMatch]:
    layout, _ = hf_config_writer.write(config, dtype="float32")
    return names.match_tensors(layout, tree.leaves(build.abstract(config)))


def _live(stored: str, theirs) -> str:
    """The name in memory of a tensor that has this one in files."""
    options = (
        stored,
        stored.replace("model.encoder.", "model.encoder.text_model."),
        stored.replace("vision_model.", ""),
        stored.replace("language_model.model.", "model.language_model."),
        f"model.{stored}",
        f"model.{stored}".replace("vision_model.", ""),
    )
    return next(name for name in options if name in theirs)


def _pixels(model: torch.nn.Module, case: Case) -> torch.Tensor:
    """[3, 3, H, W]: the images in use, in the order of the whole batch."""
    assert case.images is not None
    used = np.stack([case.images[0, 0], case.images[0, 1], case.images[1, 0]])
    return torch.tensor(used.transpose(0, 3, 1, 2)).to(model.dtype)


def _tensors(stream: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(stream.tokens).long(), torch.tensor(stream.segments).long()


def _block_masks(model, decoder: Sequences, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The masks that transformers makes for images; a causal model without a vision tower takes them ready made."""
    return create_masks_for_vision_model(
        config=model.config,
        inputs_embeds=torch.zeros(*decoder.tokens.shape, model.config.hidden_size, dtype=model.dtype),
        attention_mask=mask,
        past_key_values=None,
        position_ids=None,
        block_sequence_ids=torch.tensor(decoder.blocks).long() - 1,
    )
