"""The outputs of an imported model for each case, in float32."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5g2.api import loading
from t5g2.api import model_inputs as api_inputs
from t5g2.api.dual_encoder import DualEncoder
from t5g2.api.language_model import LanguageModel
from t5g2.core import tree
from t5g2.core.batch import Sequences
from t5g2.eval.generation import GenerationOptions, GenerationSetup, complete
from t5g2.jobs.verification_cases import BOS, NEW_TOKENS, Case, ModelOutput
from t5g2.models import build
from t5g2.models.config import (
    EncoderDecoderConfig,
    EncoderWindow,
    ModelConfig,
    TextConfig,
)
from t5g2.models.layers import Compute

FLOAT32 = Compute(dtype="float32")


def model_outputs(path: Path, cases: list[Case]) -> list[dict[str, ModelOutput]]:
    """Returns the outputs for each case, by the name of the convention if versions of transformers differ in it."""
    model = loading.load(path, dtype="float32", compute=FLOAT32)
    assert isinstance(model, LanguageModel)
    if cases[-1].images is not None:
        model.read_tower()
    params, config = model.params, model.config
    images = config.image_stack.images
    outputs = []
    for case in cases:
        models = {case.name: params}
        if isinstance(config, EncoderDecoderConfig) and config.encoder_window != "around":
            windows: tuple[EncoderWindow, ...] = ("each_side", "each_side_inclusive")
            models = {
                f"{case.name}, {window}": _with_config(params, replace(config, encoder_window=window))
                for window in windows
            }
        elif isinstance(config, TextConfig) and images is not None and case.images and images.tokens > config.window:
            # an image longer than the window: its tokens are bounded by it in training, but not in transformers
            models = {
                f"{case.name}, {name}": _with_config(params, replace(config, images=replace(images, window=bounded)))
                for name, bounded in (("bounded by the window", True), ("not bounded", False))
            }
        outputs.append({name: _model_output(variant, case, images) for name, variant in models.items()})
    return outputs


def _with_config(params: Any, config: ModelConfig) -> Any:
    """Returns the model with the same weights and another config."""
    return tree.refill(build.abstract(config), tree.named(params))


def _model_output(params: Any, case: Case, images: Any) -> ModelOutput:
    # only a decoder-only model has blocks of image tokens: an encoder attends both ways anyway
    image_token = images.token if images is not None and case.encoder is None else None
    sequences = partial(api_inputs.sequences, counted=False, image_token=image_token)
    tokens, valid = case.encoder or case.decoder
    encoder = sequences(tokens, valid) if case.encoder else None
    array = None
    if case.images is not None:
        assert images is not None
        array, _ = api_inputs.images(case.images, len(tokens), images.vision.image_size)
    with jax.default_matmul_precision("highest"):  # an accelerator would round products to fewer bits
        logits = _last_logits(params, encoder, sequences(*case.decoder), array, keep=case.keep)
        generated: list[np.ndarray] = []
        if case.greedy:
            prompts = [row[row_valid] for row, row_valid in zip(tokens, valid, strict=True)]
            options = GenerationOptions(NEW_TOKENS, (), 0, compute=FLOAT32, suppressed_ids=(0,))
            outputs = complete(params, prompts, array, setup=GenerationSetup(options, BOS))
            generated = [output.tokens for output in outputs]
    is_kept = case.decoder[1][:, -case.keep :]
    return ModelOutput(np.asarray(logits)[is_kept], [int(token) for row in generated for token in row])


def model_similarity(path: Path, texts: np.ndarray, images: np.ndarray) -> ModelOutput:
    """Returns the logits of texts [N, length] and images [M, side, side, 3]: [N, M]."""
    model = loading.load(path, dtype="float32", compute=FLOAT32)
    assert isinstance(model, DualEncoder)
    with jax.default_matmul_precision("highest"):
        return ModelOutput(model.similarity(list(images), texts), [])


@partial(jax.jit, static_argnames="keep")
def _last_logits(params: Any, encoder: Sequences | None, decoder: Sequences, images: Any, *, keep: int) -> jax.Array:
    return params.logits(params.hidden(encoder, decoder, images, compute=FLOAT32)[:, -keep:])
