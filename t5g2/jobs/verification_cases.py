"""The inputs on which an imported model is compared with transformers: a case for each thing that can go wrong.

B batch, T length, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from t5g2.models.config import (
    DualEncoderConfig,
    EncoderDecoderConfig,
    LanguageModelConfig,
    TextConfig,
)

SHORT, PAST_WINDOW, NEW_TOKENS, TEXT_TOKENS = 16, 24, 8, 512
BOS = 2  # in every Gemma vocabulary


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of both models: tokens int32[B, T] and their mask bool[B, T] for each side, images for each row.

    Attributes:
      keep: number of last positions whose logits are compared.
      greedy: generation is compared too; not for prompts padded on the right, which transformers continues after the
        padding.
    """

    name: str
    decoder: tuple[np.ndarray, np.ndarray]
    encoder: tuple[np.ndarray, np.ndarray] | None = None
    images: tuple[tuple[np.ndarray, ...], ...] | None = None
    keep: int = SHORT
    greedy: bool = True


@dataclass(frozen=True, eq=False)
class ModelOutput:
    """Output of a model for a case: float32 logits [N, V] of the N positions that are not padding, generated tokens."""

    logits: np.ndarray
    tokens: list[int]


def draw_cases(config: LanguageModelConfig, text: np.ndarray | None = None) -> Iterator[Case]:
    """Yields the cases of a language model; that with images is the last, if the model has any.

    Args:
      text: int32[N], real text, of which up to TEXT_TOKENS are read; None = random ids alone.
    """
    draw = np.random.default_rng(0)
    eoi = config.eoi_id if isinstance(config, EncoderDecoderConfig) else None
    stacks = [stack for stack in (config.decoder_stack, config.encoder_stack) if stack is not None]

    def drawn(stack: TextConfig, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        # no special tokens: their ids are the lowest, and in large vocabularies the highest too
        low, high = (10, stack.vocab_size) if stack.vocab_size < 10_000 else (300, 250_000)
        tokens = draw.integers(low, high, shape).astype(np.int32)
        if eoi is not None:
            tokens[:, shape[1] // 2] = eoi
        return tokens, np.ones(shape, bool)

    def case(name: str, shape: tuple[int, int], padded: slice | None = None, **more: Any) -> Case:
        sides = [drawn(stack, shape) for stack in stacks]
        if padded is not None:
            for tokens, valid in sides:
                valid[1, padded] = False
                tokens[1, padded] = 0
        return Case(name, sides[0], sides[1] if config.is_encoder_decoder else None, **more)

    yield case("no padding", (2, SHORT))
    yield case("padded on the right", (2, SHORT), slice(-5, None), greedy=config.is_encoder_decoder)
    yield case("padded on the left", (2, SHORT), slice(None, 5))
    window = max(stack.window for stack in stacks)
    yield case(f"{PAST_WINDOW} past the window of {window}", (1, window + PAST_WINDOW), keep=PAST_WINDOW)
    if text is not None:
        yield _of_text(config, text[:TEXT_TOKENS])
    images = config.image_stack.images
    if images is not None:
        yield _with_images(case("images", (1, SHORT)), images, draw)


def _of_text(config: LanguageModelConfig, text: np.ndarray) -> Case:
    """Returns the case of a text, all of whose positions are compared; an encoder reads its first half."""

    def side(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        row = tokens.astype(np.int32)[None]
        return row, np.ones_like(row, bool)

    half = len(text) // 2 if config.is_encoder_decoder else 0
    decoder = side(np.append(np.int32(BOS), text[half:-1]))
    encoder = side(text[:half]) if config.is_encoder_decoder else None
    return Case(f"{len(text)} tokens of text", decoder, encoder, keep=len(text) - half)


def _with_images(case: Case, images: Any, draw: np.random.Generator) -> Case:
    """Adds two images to one row; no more, because the released tower takes minutes for each on a CPU."""
    tokens, _ = case.encoder or case.decoder
    image = [images.begin, *[images.token] * images.tokens, images.end]
    row = np.concatenate([tokens[0, :3], image, tokens[0, 3:5], image, tokens[0, 5:]]).astype(np.int32)[None]
    size = images.vision.image_size
    images_of_row = tuple(draw.uniform(-1, 1, (size, size, 3)).astype(np.float32) for _ in range(2))
    side = row, np.ones_like(row, bool)
    if case.encoder is None:
        return replace(case, decoder=side, images=(images_of_row,))
    return replace(case, encoder=side, images=(images_of_row,))


def siglip_inputs(config: DualEncoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns (token ids of 4 texts of full length, 3 images)."""
    draw = np.random.default_rng(0)
    size = config.vision.image_size
    texts = draw.integers(2, config.text.vocab_size, (4, config.text.length)).astype(np.int32)
    texts[:, -1] = 1  # </s>
    return texts, draw.uniform(-1, 1, (3, size, size, 3)).astype(np.float32)
