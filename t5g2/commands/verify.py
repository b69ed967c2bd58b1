"""Whether an imported model is the one that transformers has: both run on the same inputs, in float32.

Every layer runs, on inputs padded on either side, longer than the sliding window, and with images. First transformers'
model is loaded, run and let go of, then ours: in memory at a time is one of them, 4 bytes for each parameter, and what
it works with.

B batch, T length, V vocabulary.
"""

import gc
import importlib.util
import json
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

from t5g2 import api, api_inputs
from t5g2.checkpoint import export_folder, import_folder
from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.folder import ModelFolder
from t5g2.checkpoint.hf_config_fields import CONFIG_FILE
from t5g2.core import files, tree
from t5g2.core.batch import Sequences
from t5g2.core.errors import UserError
from t5g2.eval.generation import GenerationOptions, complete
from t5g2.models import build
from t5g2.models.config import DualEncoderConfig, EncoderDecoderConfig, EncoderWindow, ModelConfig, TextConfig
from t5g2.models.layers import Compute

FLOAT32 = Compute(dtype="float32")
SHORT, PAST_WINDOW, NEW_TOKENS = 16, 24, 8
BOS = 2  # in every Gemma vocabulary
# what passes: the largest difference of two logits, in standard deviations of the reference's; the mean
# Kullback-Leibler divergence of what they predict, in nats; the share of positions with the same five likeliest tokens.
# Rounding gives about 1e-5, 1e-11 and all of them; a window or a mask that is off by one, some 1e-1.
ERROR, KL, TOP_5 = 1e-3, 1e-6, 0.95
PACKAGES = ("torch", "transformers")


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of both models: tokens int32[B, T] and where they are (True), for each side; images for each row.

    Attributes:
      keep: logits of the last so many positions are compared.
      greedy: generation is compared too. Not from prompts padded on the right, after which transformers goes on.
    """

    name: str
    decoder: tuple[np.ndarray, np.ndarray]
    encoder: tuple[np.ndarray, np.ndarray] | None = None
    images: tuple[tuple[np.ndarray, ...], ...] | None = None
    keep: int = SHORT
    greedy: bool = True


@dataclass(frozen=True, eq=False)
class ModelOutput:
    """What a model makes of a case: float32 logits [N, V] of N positions that are no padding, tokens generated."""

    logits: np.ndarray
    tokens: list[int]


@dataclass(frozen=True)
class Comparison:
    """A line of the table; `error` is in logits, `spread` the reference's standard deviation."""

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
        """Whether it is within the limits."""
        close = self.error <= ERROR * self.spread and self.kl <= KL and self.top_5 >= TOP_5
        return bool(close and self.same_tokens == self.tokens)


def import_model(
    source: str | PathLike, out: str | PathLike, *, verify: bool = False, image_size: int | None = None, **how: Any
) -> None:
    """Imports a folder as import_folder.import_model does, tells what it is, and verifies it if asked to.

    `how` is what import_folder.import_model takes beside: config, dtype.

    Raises:
      UserError: as import_folder.import_model; transformers or torch is not installed.
      SystemExit: with status 1, it differs from transformers; the folder is left under the name `out`.unverified, which
        is also its name while it is verified.
    """
    if verify:
        _require_packages()
    files.refuse_existing(out)
    target = Path(out).absolute()
    # under its own name only when it is known to be right
    place = target.with_name(f"{target.name}.unverified") if verify else target
    folder = import_folder.import_model(source, place, image_size=image_size, **how)
    parameters = sum(int(np.prod(leaf.shape)) for leaf in folder.leaves.values())
    print(f"wrote {place}: {parameters:,} parameters")
    for note in (folder.provenance or {}).get("notes", ()):
        print(f"  {note}")
    if verify:
        as_it_is = image_size is None and (Path(source) / CONFIG_FILE).is_file()
        _verify(folder, source if as_it_is else None, 4 * parameters)
        place.rename(target)
        print(f"verified, and renamed {target}")


def _verify(folder: ModelFolder, reference: str | PathLike | None, size_bytes: int) -> None:
    print(
        f"comparing with transformers: {size_bytes / 2**30:.1f} GiB of weights in float32 at a time, and about "
        f"{_attention_scores_bytes(folder.config) / 2**30:.1f} GiB to work with {_free_memory_note()}",
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


def compare(model: str | PathLike, reference: str | PathLike | None = None) -> list[Comparison]:
    """How a model folder's answers differ from those of transformers, a row for each kind of input.

    Args:
      reference: the Hugging Face folder to compare with; None = what the model folder is exported as.

    Raises:
      UserError: transformers or torch is not installed.
    """
    _require_packages()
    opened = folders.open_model(model)
    with tempfile.TemporaryDirectory(prefix=".t5g2-verify-", dir=opened.path.parent) as beside:
        if reference is None:
            reference = Path(beside) / "exported"
            export_folder.export_model(opened.path, reference)
        if isinstance(opened.config, DualEncoderConfig):
            pairs = _siglip_inputs(opened.config)
            answers = _reference_similarity(Path(reference), *pairs), _model_similarity(opened.path, *pairs)
            return [_compare_outputs("texts and images", *answers)]
        cases = list(_cases(opened.config))
        expected = _reference_outputs(Path(reference), opened.config, cases)
    gc.collect()  # torch's model goes before ours comes
    got = _model_outputs(opened.path, cases)
    return [
        _closest_convention(case.name, theirs, ours) for case, theirs, ours in zip(cases, expected, got, strict=True)
    ]


def table(rows: list[Comparison]) -> str:
    """The rows as text."""
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
def _cases(config: ModelConfig) -> Iterator[Case]:
    draw = np.random.default_rng(0)
    encoder, decoder, eoi = None, config, None
    if isinstance(config, EncoderDecoderConfig):
        encoder, decoder, eoi = config.encoder, config.decoder, config.eoi_id
    stacks = [stack for stack in (decoder, encoder) if isinstance(stack, TextConfig)]
    both = len(stacks) == 2

    def drawn(stack: TextConfig, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        # ids that are no special tokens: those stand below, or, in large vocabularies, at the end too
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
        return Case(name, sides[0], sides[1] if both else None, **more)

    yield case("no padding", (2, SHORT))
    yield case("padded on the right", (2, SHORT), slice(-5, None), greedy=both)
    yield case("padded on the left", (2, SHORT), slice(None, 5))
    window = max(stack.window for stack in stacks)
    yield case(f"{PAST_WINDOW} past the window of {window}", (1, window + PAST_WINDOW), keep=PAST_WINDOW)
    images = api_inputs.images_of(config)
    if images is not None:
        yield _with_images(case("images", (1, SHORT)), images, draw)


def _with_images(case: Case, images: Any, draw: np.random.Generator) -> Case:
    """Two images in one row, for the released tower takes minutes for each on a CPU."""
    tokens, _ = case.encoder or case.decoder
    image = [images.begin, *[images.token] * images.tokens, images.end]
    row = np.concatenate([tokens[0, :3], image, tokens[0, 3:5], image, tokens[0, 5:]]).astype(np.int32)[None]
    size = images.vision.image_size
    pictures = tuple(draw.uniform(-1, 1, (size, size, 3)).astype(np.float32) for _ in range(2))
    side = row, np.ones_like(row, bool)
    if case.encoder is None:
        return replace(case, decoder=side, images=(pictures,))
    return replace(case, encoder=side, images=(pictures,))


def _siglip_inputs(config: DualEncoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of 4 texts, full, and 3 images."""
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
    names = json.loads((path / CONFIG_FILE).read_text()).get("architectures") or [""]
    if not hasattr(transformers, names[0]):
        raise UserError(
            f"{path / CONFIG_FILE} says architectures = {names}, which transformers {transformers.__version__} does "
            f"not have; install one that has it"
        )
    made = getattr(transformers, names[0]).from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return made.eval()


def _reference_outputs(path: Path, config: ModelConfig, cases: list[Case]) -> list[ModelOutput]:
    import torch

    model = _load_reference(path)
    answers = []
    for case in cases:
        read = _tensors(*(case.encoder or case.decoder))
        if case.images is not None:
            flat = [image.transpose(2, 0, 1) for row in case.images for image in row]
            read["pixel_values"] = torch.tensor(np.stack(flat))
            if isinstance(config, TextConfig) and config.images is not None:
                read["token_type_ids"] = (read["input_ids"] == config.images.token).long()
        decoder = {f"decoder_{name}": x for name, x in _tensors(*case.decoder).items()} if case.encoder else {}
        with torch.no_grad():
            said = model(**read, **decoder, use_cache=False, logits_to_keep=case.keep).logits
            tokens = _reference_tokens(model, read, bool(case.encoder)) if case.greedy else []
        answers.append(ModelOutput(said.float().numpy()[case.decoder[1][:, -case.keep :]], tokens))
    return answers


def _reference_tokens(model: Any, read: dict[str, Any], has_encoder: bool) -> list[int]:
    import torch

    rows, length = read["input_ids"].shape
    start = {"decoder_input_ids": torch.full((rows, 1), BOS)} if has_encoder else {}
    model.generation_config.eos_token_id = None
    made = model.generate(
        **read, **start, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, pad_token_id=0, suppress_tokens=[0]
    )
    return made[:, 1 if has_encoder else length :].flatten().tolist()


def _reference_similarity(path: Path, texts: np.ndarray, images: np.ndarray) -> ModelOutput:
    import torch

    with torch.no_grad():
        pixels = torch.tensor(images.transpose(0, 3, 1, 2).copy())
        said = _load_reference(path)(input_ids=torch.tensor(texts).long(), pixel_values=pixels).logits_per_text
    return ModelOutput(said.numpy(), [])


def _tensors(tokens: np.ndarray, valid: np.ndarray) -> dict[str, Any]:
    import torch

    return {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(valid).long()}


# ---- ours ----
def _model_outputs(path: Path, cases: list[Case]) -> list[dict[str, ModelOutput]]:
    """The answers by name: several where the reference has changed its mind."""
    model = api.load(path, dtype="float32", compute=FLOAT32)
    assert isinstance(model, api.LanguageModel)
    if cases[-1].images is not None:
        model.read_tower()
    params, config = model.params, model.config
    images = api_inputs.images_of(config)
    answers = []
    for case in cases:
        models = {case.name: params}
        if isinstance(config, EncoderDecoderConfig) and config.encoder_window != "around":
            ways: tuple[EncoderWindow, ...] = ("each_side", "each_side_inclusive")
            models = {f"{case.name}, {way}": _with_config(params, replace(config, encoder_window=way)) for way in ways}
        elif isinstance(config, TextConfig) and images is not None and case.images and images.tokens > config.window:
            # an image longer than the window: as trained its tokens are bounded by it, in transformers they are not
            models = {
                f"{case.name}, {said}": _with_config(params, replace(config, images=replace(images, window=bounded)))
                for said, bounded in (("bounded by the window", True), ("not bounded", False))
            }
        answers.append({name: _model_output(one, case, images) for name, one in models.items()})
    return answers


def _with_config(params: Any, config: ModelConfig) -> Any:
    """The same weights under another config."""
    return tree.refill(build.abstract(config), tree.named(params))


def _model_output(params: Any, case: Case, images: Any) -> ModelOutput:
    def stream(tokens: np.ndarray, valid: np.ndarray, read: bool) -> Sequences:
        token = images.token if images is not None and read and case.encoder is None else None
        return api_inputs.sequences(tokens, valid, counted=False, image_token=token)

    tokens, valid = read = case.encoder or case.decoder
    encoder = stream(*read, True) if case.encoder else None
    array = None
    if case.images is not None:
        array, _ = api_inputs.images(case.images, len(tokens), images.vision.image_size)
    with jax.default_matmul_precision("highest"):  # an accelerator would round products to fewer bits
        said = _last_logits(params, encoder, stream(*case.decoder, True), array, keep=case.keep)
        made: list[np.ndarray] = []
        if case.greedy:
            prompts = [row[here] for row, here in zip(tokens, valid, strict=True)]
            decoding = GenerationOptions(NEW_TOKENS, (), 0, compute=FLOAT32, suppressed_ids=(0,))
            made = complete(params, prompts, array, bos=BOS, options=decoding)
    kept = case.decoder[1][:, -case.keep :]
    return ModelOutput(np.asarray(said)[kept], [int(token) for row in made for token in row])


def _model_similarity(path: Path, texts: np.ndarray, images: np.ndarray) -> ModelOutput:
    model = api.load(path, dtype="float32", compute=FLOAT32)
    assert isinstance(model, api.DualEncoder)
    with jax.default_matmul_precision("highest"):
        return ModelOutput(model.similarity(list(images), texts), [])


@partial(jax.jit, static_argnames="keep")
def _last_logits(params: Any, encoder: Sequences | None, decoder: Sequences, images: Any, *, keep: int) -> jax.Array:
    return params.logits(params.hidden(encoder, decoder, images, compute=FLOAT32)[:, -keep:])


# ---- both ----
def _compare_outputs(name: str, theirs: ModelOutput, ours: ModelOutput) -> Comparison:
    """How far apart two answers to the same case are."""
    expected, got = theirs.logits.astype(np.float64), ours.logits.astype(np.float64)
    assert expected.shape == got.shape, (expected.shape, got.shape)
    logs = [x - x.max(-1, keepdims=True) for x in (expected, got)]
    logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logs]
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    five = min(5, expected.shape[-1])
    likeliest = [np.sort(np.argpartition(-x, five - 1, axis=-1)[:, :five], axis=-1) for x in (expected, got)]
    return Comparison(
        name,
        positions=len(expected),
        error=float(np.abs(expected - got).max()),
        spread=float(expected.std()),
        kl=float(kl),
        top_5=float((likeliest[0] == likeliest[1]).all(-1).mean()),
        same_tokens=sum(a == b for a, b in zip(theirs.tokens, ours.tokens, strict=True)),
        tokens=len(theirs.tokens),
    )


def _closest_convention(name: str, theirs: ModelOutput, ours: dict[str, ModelOutput]) -> Comparison:
    """Where there are several conventions and they differ here, the one that the installed transformers has."""
    rows = [_compare_outputs(of, theirs, answer) for of, answer in ours.items()]
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
    """What the largest attention scores of the cases take: transformers holds them whole, before and after softmax."""
    if isinstance(config, DualEncoderConfig):
        towers = [(3, config.vision.heads, config.vision.patches)]
    else:
        images = api_inputs.images_of(config)
        towers = [] if images is None else [(2, images.vision.heads, images.vision.patches)]
        sides = (config.encoder, config.decoder) if isinstance(config, EncoderDecoderConfig) else (config,)
        towers += [(len(sides), side.heads, side.window + PAST_WINDOW) for side in sides]
    return max(2 * 4 * rows * heads * length**2 for rows, heads, length in towers)


def _free_memory_note() -> str:
    """How much memory the machine says is free, where it says so."""
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return ""
    return f"(free now: {pages / 2**30:.1f} GiB)"
