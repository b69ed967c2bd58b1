"""The outputs of transformers' model for each case, in float32."""

from pathlib import Path
from typing import Any

import numpy as np

from t5g2.checkpoint.hf_config_fields import CONFIG_FILE
from t5g2.core import files
from t5g2.core.errors import UserError
from t5g2.core.optional import require
from t5g2.jobs.verification_cases import BOS, NEW_TOKENS, Case, ModelOutput
from t5g2.models.config import LanguageModelConfig

PACKAGES = ("torch", "transformers")


def require_packages() -> None:
    """Imports torch and transformers; raises UserError if one of them is not installed."""
    for package in PACKAGES:
        require(package, "hf", otherwise="import without --verify")


def _load_reference(path: Path) -> Any:
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    data = files.read_json_object(path / CONFIG_FILE, fix="download it again")
    names = data.get("architectures") or [""]
    if not hasattr(transformers, names[0]):
        raise UserError(
            f"{path / CONFIG_FILE} has architectures = {names}, which transformers {transformers.__version__} does "
            f"not have; install one that has it"
        )
    model = getattr(transformers, names[0]).from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def reference_outputs(path: Path, config: LanguageModelConfig, cases: list[Case]) -> list[ModelOutput]:
    """Returns the outputs of the model in a Hugging Face folder, for each case."""
    import torch

    model = _load_reference(path)
    outputs = []
    for case in cases:
        inputs = _tensors(*(case.encoder or case.decoder))
        if case.images is not None:
            flat = [image.transpose(2, 0, 1) for row in case.images for image in row]
            inputs["pixel_values"] = torch.tensor(np.stack(flat))
            images = config.image_stack.images
            if case.encoder is None and images is not None:
                # marks image tokens, which attend to each other both ways
                inputs["token_type_ids"] = (inputs["input_ids"] == images.token).long()
        decoder = {f"decoder_{name}": x for name, x in _tensors(*case.decoder).items()} if case.encoder else {}
        with torch.no_grad():
            logits = model(**inputs, **decoder, use_cache=False, logits_to_keep=case.keep).logits
            tokens = _reference_tokens(model, inputs, bool(case.encoder)) if case.greedy else []
        is_kept = case.decoder[1][:, -case.keep :]  # outputs at padding are undefined
        outputs.append(ModelOutput(logits.float().numpy()[is_kept], tokens))
    return outputs


def _reference_tokens(model: Any, inputs: dict[str, Any], has_encoder: bool) -> list[int]:
    import torch

    rows, length = inputs["input_ids"].shape
    start = {"decoder_input_ids": torch.full((rows, 1), BOS)} if has_encoder else {}
    # exactly NEW_TOKENS are compared, so that neither EOS nor padding ends a row before
    model.generation_config.eos_token_id = None
    generated = model.generate(
        **inputs, **start, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, pad_token_id=0, suppress_tokens=[0]
    )
    return generated[:, 1 if has_encoder else length :].flatten().tolist()


def reference_similarity(path: Path, texts: np.ndarray, images: np.ndarray) -> ModelOutput:
    """Returns the logits of texts [N, length] and images [M, side, side, 3]: [N, M]."""
    import torch

    with torch.no_grad():
        pixels = torch.tensor(images.transpose(0, 3, 1, 2).copy())
        outputs = _load_reference(path)(input_ids=torch.tensor(texts).long(), pixel_values=pixels)
    return ModelOutput(outputs.logits_per_text.numpy(), [])


def _tensors(tokens: np.ndarray, valid: np.ndarray) -> dict[str, Any]:
    import torch

    return {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(valid).long()}
