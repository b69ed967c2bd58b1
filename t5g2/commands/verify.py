"""Verifies an imported model against transformers: both run on the same inputs, in float32.

Every layer runs, on inputs padded on either side, longer than the sliding window, and with images. The model of
transformers is loaded, run and freed before ours is loaded, so memory holds one of them, 4 bytes for each parameter,
and its activations.

B batch, T length, V vocabulary.
"""

import gc
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5g2.api import loading
from t5g2.api import model_inputs as api_inputs
from t5g2.api.dual_encoder import DualEncoder
from t5g2.api.language_model import LanguageModel
from t5g2.checkpoint import export_folder, import_folder
from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.folder import ModelFolder
from t5g2.checkpoint.hf_config_fields import CONFIG_FILE
from t5g2.core import files, tree
from t5g2.core.batch import Sequences
from t5g2.core.errors import UserError
from t5g2.eval.generation import GenerationOptions, complete
from t5g2.models import build
from t5g2.models.config import (
    DualEncoderConfig,
    EncoderDecoderConfig,
    EncoderWindow,
    LanguageModelConfig,
    ModelConfig,
    TextConfig,
)
from t5g2.models.layers import Compute

FLOAT32 = Compute(dtype="float32")
SHORT, PAST_WINDOW, NEW_TOKENS = 16, 24, 8
BOS = 2  # in every Gemma vocabulary
# limits: the largest difference of two logits, in standard deviations of the reference; the mean Kullback-Leibler
# divergence of the predictions, in nats; the share of positions with the same five likeliest tokens. Rounding gives
# about 1e-5, 1e-11 and 100%; a window or a mask that is off by one gives about 1e-1.
ERROR, KL, TOP_5 = 1e-3, 1e-6, 0.95
PACKAGES = ("torch", "transformers")


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


@dataclass(frozen=True)
class OutputDifference:
    """Differences between the outputs of both models for one case.

    Attributes:
      error: largest difference of two logits.
      spread: standard deviation of the reference's logits.
      kl: mean Kullback-Leibler divergence, in nats.
      top_5: share of positions with the same five likeliest tokens.
      same_tokens, tokens: number of equal generated tokens, and of all of them.
    """

    name: str
    positions: int
    error: float
    spread: float
    kl: float
    top_5: float
    same_tokens: int
    tokens: int

    @property
    def passed(self) -> bool:
        """True if the differences are within the limits."""
        close = self.error <= ERROR * self.spread and self.kl <= KL and self.top_5 >= TOP_5
        return bool(close and self.same_tokens == self.tokens)


def import_model(
    source: str | PathLike, out: str | PathLike, *, verify: bool = False, image_size: int | None = None, **options: Any
) -> None:
    """Imports a folder, prints a summary, and verifies it if `verify` is set.

    Args:
      source, out, image_size: as in import_folder.import_model.
      verify: compare the model with transformers; the folder is named `out`.unverified until it passes.
      options: other arguments of import_folder.import_model: config, dtype.

    Raises:
      UserError: as import_folder.import_model; transformers or torch is not installed.
      SystemExit: with status 1, the model differs from transformers; the folder keeps the name `out`.unverified.
    """
    if verify:
        _require_packages()
    files.refuse_existing(out)
    target = Path(out).absolute()
    # the final name is only for a model that has passed
    place = target.with_name(f"{target.name}.unverified") if verify else target
    folder = import_folder.import_model(source, place, image_size=image_size, **options)
    parameters = sum(int(np.prod(leaf.shape)) for leaf in folder.leaves.values())
    print(f"wrote {place}: {parameters:,} parameters")
    for note in (folder.provenance or {}).get("notes", ()):
        print(f"  {note}")
    if verify:
        # the source itself is the reference, unless transformers cannot load it or its tower was changed
        is_reference = image_size is None and (Path(source) / CONFIG_FILE).is_file()
        _verify(folder, source if is_reference else None, 4 * parameters)
        place.rename(target)
        print(f"verified, and renamed {target}")


def _verify(folder: ModelFolder, reference: str | PathLike | None, size_bytes: int) -> None:
    print(
        f"comparing with transformers: {size_bytes / 2**30:.1f} GiB of weights in float32 at a time, and about "
        f"{_attention_scores_bytes(folder.config) / 2**30:.1f} GiB of activations {_free_memory_note()}",
        flush=True,
    )
    try:
        rows = compare(folder.path, reference)
    except BaseException:
        shutil.rmtree(folder.path, ignore_errors=True)
        raise
    print(table(rows))
    if not all(row.passed for row in rows):
        raise SystemExit(f"t5g2 import: the model differs from transformers'; it is left as {folder.path}")


def compare(model: str | PathLike, reference: str | PathLike | None = None) -> list[OutputDifference]:
    """Compares the outputs of a model folder with those of transformers, for each kind of input.

    Args:
      model: the model folder.
      reference: the Hugging Face folder to compare with; None = an export of the model folder.

    Raises:
      UserError: transformers or torch is not installed.
    """
    _require_packages()
    opened = folders.open_model(model)
    with tempfile.TemporaryDirectory(prefix=".t5g2-verify-", dir=opened.path.parent) as temporary:
        if reference is None:
            reference = Path(temporary) / "exported"
            export_folder.export_model(opened.path, reference)
        if isinstance(opened.config, DualEncoderConfig):
            pairs = _siglip_inputs(opened.config)
            outputs = _reference_similarity(Path(reference), *pairs), _model_similarity(opened.path, *pairs)
            return [_compare_outputs("texts and images", *outputs)]
        cases = list(_cases(opened.config))
        expected = _reference_outputs(Path(reference), opened.config, cases)
    gc.collect()  # torch's model is freed before ours is loaded
    actual = _model_outputs(opened.path, cases)
    return [
        _closest_convention(case.name, reference_output, outputs)
        for case, reference_output, outputs in zip(cases, expected, actual, strict=True)
    ]


def table(rows: list[OutputDifference]) -> str:
    """Returns the comparisons as a table."""
    head = ("inputs", "positions", "max |d|", "in sd", "KL", "top 5", "greedy", "")
    lines = [
        (
            row.name,
            str(row.positions),
            f"{row.error:.1e}",
            f"{row.error / row.spread:.1e}",
            f"{row.kl:.1e}",
            f"{row.top_5:.0%}",
            f"{row.same_tokens}/{row.tokens}" if row.tokens else "-",
            "ok" if row.passed else "DIFFERS",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in (head, *lines))
    text = "\n".join("  ".join(line).rstrip() for line in padded)
    return f"{text}\nlimits: {ERROR:g} sd, KL {KL:g}, top 5 {TOP_5:.0%}, every greedy token"


# ---- inputs ----
def _cases(config: LanguageModelConfig) -> Iterator[Case]:
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
    images = config.image_stack.images
    if images is not None:
        yield _with_images(case("images", (1, SHORT)), images, draw)


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


def _siglip_inputs(config: DualEncoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns (token ids of 4 texts of full length, 3 images)."""
    draw = np.random.default_rng(0)
    size = config.vision.image_size
    texts = draw.integers(2, config.text.vocab_size, (4, config.text.length)).astype(np.int32)
    texts[:, -1] = 1  # </s>
    return texts, draw.uniform(-1, 1, (3, size, size, 3)).astype(np.float32)


# ---- transformers ----
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


def _reference_outputs(path: Path, config: ModelConfig, cases: list[Case]) -> list[ModelOutput]:
    import torch

    model = _load_reference(path)
    outputs = []
    for case in cases:
        inputs = _tensors(*(case.encoder or case.decoder))
        if case.images is not None:
            flat = [image.transpose(2, 0, 1) for row in case.images for image in row]
            inputs["pixel_values"] = torch.tensor(np.stack(flat))
            if isinstance(config, TextConfig) and config.images is not None:
                # marks image tokens, which attend to each other both ways
                inputs["token_type_ids"] = (inputs["input_ids"] == config.images.token).long()
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


def _reference_similarity(path: Path, texts: np.ndarray, images: np.ndarray) -> ModelOutput:
    import torch

    with torch.no_grad():
        pixels = torch.tensor(images.transpose(0, 3, 1, 2).copy())
        outputs = _load_reference(path)(input_ids=torch.tensor(texts).long(), pixel_values=pixels)
    return ModelOutput(outputs.logits_per_text.numpy(), [])


def _tensors(tokens: np.ndarray, valid: np.ndarray) -> dict[str, Any]:
    import torch

    return {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(valid).long()}


# ---- the imported model ----
def _model_outputs(path: Path, cases: list[Case]) -> list[dict[str, ModelOutput]]:
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
            generated = complete(params, prompts, array, bos=BOS, options=options)
    is_kept = case.decoder[1][:, -case.keep :]
    return ModelOutput(np.asarray(logits)[is_kept], [int(token) for row in generated for token in row])


def _model_similarity(path: Path, texts: np.ndarray, images: np.ndarray) -> ModelOutput:
    model = loading.load(path, dtype="float32", compute=FLOAT32)
    assert isinstance(model, DualEncoder)
    with jax.default_matmul_precision("highest"):
        return ModelOutput(model.similarity(list(images), texts), [])


@partial(jax.jit, static_argnames="keep")
def _last_logits(params: Any, encoder: Sequences | None, decoder: Sequences, images: Any, *, keep: int) -> jax.Array:
    return params.logits(params.hidden(encoder, decoder, images, compute=FLOAT32)[:, -keep:])


# ---- comparison ----
def _compare_outputs(name: str, reference: ModelOutput, output: ModelOutput) -> OutputDifference:
    """Returns the differences between two outputs for one case."""
    expected, actual = reference.logits.astype(np.float64), output.logits.astype(np.float64)
    assert expected.shape == actual.shape, (expected.shape, actual.shape)
    logs = [x - x.max(-1, keepdims=True) for x in (expected, actual)]
    logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logs]
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    five = min(5, expected.shape[-1])
    likeliest = [np.sort(np.argpartition(-x, five - 1, axis=-1)[:, :five], axis=-1) for x in (expected, actual)]
    return OutputDifference(
        name,
        positions=len(expected),
        error=float(np.abs(expected - actual).max()),
        spread=float(expected.std()),
        kl=float(kl),
        top_5=float((likeliest[0] == likeliest[1]).all(-1).mean()),
        same_tokens=sum(a == b for a, b in zip(reference.tokens, output.tokens, strict=True)),
        tokens=len(reference.tokens),
    )


def _closest_convention(name: str, reference: ModelOutput, outputs: dict[str, ModelOutput]) -> OutputDifference:
    """Returns the comparison of the convention that the installed transformers has, if there are several."""
    rows = [_compare_outputs(convention, reference, output) for convention, output in outputs.items()]
    closest = min(rows, key=lambda row: row.error)
    return closest if len({row.error for row in rows}) > 1 else replace(closest, name=name)


def _require_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"verifying compares with transformers, and {' and '.join(missing)} is not installed; install them "
            f"(pip install 't5g2[hf]' torch), or import without --verify"
        )


def _attention_scores_bytes(config: ModelConfig) -> int:
    """Returns the size of the largest attention scores, which transformers holds before and after the softmax."""
    if isinstance(config, DualEncoderConfig):
        towers = [(3, config.vision.heads, config.vision.patches)]
    else:
        images = config.image_stack.images
        towers = [] if images is None else [(2, images.vision.heads, images.vision.patches)]
        stacks = [stack for stack in (config.encoder_stack, config.decoder_stack) if stack is not None]
        towers += [(len(stacks), stack.heads, stack.window + PAST_WINDOW) for stack in stacks]
    return max(2 * 4 * rows * heads * length**2 for rows, heads, length in towers)


def _free_memory_note() -> str:
    """Returns a note on the free memory of the machine, empty if the system does not report it."""
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return ""
    return f"(free now: {pages / 2**30:.1f} GiB)"
