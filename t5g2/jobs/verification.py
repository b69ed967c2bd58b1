"""Verifies an imported model against transformers: both run on the same inputs, in float32.

The reference is the source itself, which transformers reads on its own: a Hugging Face folder or a GGUF file. Of a
source that it cannot read it is an export of the import; then only the computation is compared, and that is said.
Every layer runs, on random ids padded on either side and longer than the sliding window, on real text where the folder
has a tokenizer, and with images. The model of transformers is loaded, run and freed before ours is loaded, so memory
holds one of them, 4 bytes for each parameter, and its activations.

B batch, T length, V vocabulary.
"""

import gc
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from t5g2.checkpoint import export_folder, gguf_folder, import_folder, source_folder
from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.folder import ModelFolder
from t5g2.checkpoint.hf_config_fields import CONFIG_FILE
from t5g2.core import files
from t5g2.core.device import GIB
from t5g2.data.tokenizers import registry as tokenizers
from t5g2.jobs import reference_model
from t5g2.jobs.imported_model import model_outputs, model_similarity
from t5g2.jobs.reference_model import reference_outputs, reference_similarity, require_packages
from t5g2.jobs.verification_cases import PAST_WINDOW, TEXT_TOKENS, ModelOutput, draw_cases, siglip_inputs
from t5g2.jobs.verification_text import TEXT
from t5g2.models.config import (
    DualEncoderConfig,
    ModelConfig,
)

# limits: the largest difference of two logits, in standard deviations of the reference; the mean Kullback-Leibler
# divergence of the predictions, in nats; the share of positions with the same five likeliest tokens. Rounding gives
# about 1e-5, 1e-11 and 100%; a window or a mask that is off by one gives about 1e-1.
ERROR, KL, TOP_5 = 1e-3, 1e-6, 0.95
POSITIONS_AT_A_TIME = 32


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
    target = Path(out).absolute()
    # the final name is only for a model that has passed
    place = target.with_name(f"{target.name}.unverified") if verify else target
    # both before the reference is looked for, which may be gigabytes at the hub
    for path in dict.fromkeys((target, place)):
        files.refuse_existing(path)
    reference = _reference_of(source, image_size) if verify else None
    folder = import_folder.import_model(source, place, image_size=image_size, **options)
    parameters = sum(int(np.prod(leaf.shape)) for leaf in folder.leaves.values())
    print(f"wrote {place}: {parameters:,} parameters")
    for note in folder.notes:
        print(f"  {note}")
    if verify:
        _verify(folder, reference, options.get("dtype"), size_bytes=4 * parameters)
        place.rename(target)
        print(f"verified, and renamed {target}")


def _reference_of(source: str | PathLike, image_size: int | None) -> Path | None:
    """Returns the folder or file that transformers reads to be compared with; None = it reads none, or another model.

    Raises:
      UserError: a package that it needs is not installed; the hub has no such model.
    """
    require_packages()
    path = Path(source_folder.local(source)).expanduser().absolute()
    file = gguf_folder.file_of(path)
    if file is not None:
        require_packages(gguf=True)
        return file
    return path if image_size is None and (path / CONFIG_FILE).is_file() else None


def _verify(folder: ModelFolder, reference: Path | None, dtype: Any, *, size_bytes: int) -> None:
    try:
        print("\n".join(_description(folder, reference)))
        print(
            f"comparing with transformers: {size_bytes / GIB:.1f} GiB of weights in float32 at a time, and about "
            f"{_activation_bytes(folder.config) / GIB:.1f} GiB of activations {_free_memory_note()}",
            flush=True,
        )
        rows = compare(folder.path, reference, dtype=dtype)
    except BaseException:
        shutil.rmtree(folder.path, ignore_errors=True)
        raise
    print(table(rows))
    if not all(row.passed for row in rows):
        raise SystemExit(f"t5g2 import: the model differs from transformers'; it is left as {folder.path}")


def _description(folder: ModelFolder, reference: Path | None) -> list[str]:
    """Returns what the reference is, in words."""
    if reference is None:
        return [
            "the reference is an export of this import, because transformers does not read the source, or not with "
            "images of this size: only the computation is compared, and not what was read"
        ]
    if not reference.is_file():
        return [f"the reference is {reference}, as transformers reads it"]
    lines = reference_model.other_settings(reference, folder.config)
    return [
        f"the reference is {reference}, as transformers' own reader of GGUF files reads its weights",
        *(["settings that this reader has not, or has otherwise, are those of the import:"] if lines else []),
        *(f"  {line}" for line in lines),
    ]


def compare(
    model: str | PathLike, reference: str | PathLike | None = None, *, dtype: Any = None
) -> list[OutputDifference]:
    """Compares the outputs of a model folder with those of transformers, for each kind of input.

    Args:
      model: the model folder.
      reference: the Hugging Face folder or the GGUF file to compare with; None = an export of the model folder.
      dtype: dtype that the import has cast the reference's weights to; None = none.

    Raises:
      UserError: transformers or torch is not installed.
    """
    require_packages(gguf=Path(reference or "").is_file())
    opened = folders.open_model(model)
    with tempfile.TemporaryDirectory(prefix=".t5g2-verify-", dir=opened.path.parent) as temporary:
        if reference is None:
            reference = Path(temporary) / "exported"
            export_folder.export_model(opened.path, reference)
        if isinstance(opened.config, DualEncoderConfig):
            pairs = siglip_inputs(opened.config)
            theirs = reference_similarity(Path(reference), opened.config, *pairs, dtype=dtype)
            return [_compare_outputs("texts and images", theirs, model_similarity(opened.path, *pairs))]
        cases = list(draw_cases(opened.config, _text(opened)))
        expected = reference_outputs(Path(reference), opened.config, cases, dtype=dtype)
    gc.collect()  # torch's model is freed before ours is loaded
    actual = model_outputs(opened.path, cases)
    return [
        _closest_convention(case.name, reference_output, outputs)
        for case, reference_output, outputs in zip(cases, expected, actual, strict=True)
    ]


def _text(folder: ModelFolder) -> np.ndarray | None:
    """Returns the ids of the real text; None if the folder has no tokenizer, or one with more ids than the model."""
    if folder.tokenizer is None:
        return None
    assert not isinstance(folder.config, DualEncoderConfig)
    text = tokenizers.from_dict(folder.tokenizer, folder.path).encode(TEXT)
    sides = filter(None, (folder.config.encoder_stack, folder.config.decoder_stack))
    return text if text.max() < min(side.vocab_size for side in sides) else None


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


def _compare_outputs(name: str, reference: ModelOutput, output: ModelOutput) -> OutputDifference:
    """Returns the differences between two outputs for one case."""
    assert reference.logits.shape == output.logits.shape, (reference.logits.shape, output.logits.shape)
    errors, kls, same, moments = [], [], [], []
    # some positions at a time: in float64 all of a text would be gigabytes
    for first in range(0, len(reference.logits), POSITIONS_AT_A_TIME):
        part = slice(first, first + POSITIONS_AT_A_TIME)
        expected, actual = (x.logits[part].astype(np.float64) for x in (reference, output))
        logs = [x - x.max(-1, keepdims=True) for x in (expected, actual)]
        logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logs]
        five = min(5, expected.shape[-1])
        likeliest = [np.sort(np.argpartition(-x, five - 1, axis=-1)[:, :five], axis=-1) for x in (expected, actual)]
        errors.append(np.abs(expected - actual).max())
        kls.append((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1))
        same.append((likeliest[0] == likeliest[1]).all(-1))
        moments.append((expected.sum(), np.square(expected).sum()))
    mean, square = np.sum(moments, axis=0) / reference.logits.size
    return OutputDifference(
        name,
        positions=len(reference.logits),
        error=float(np.max(errors)),
        spread=float(np.sqrt(square - mean**2)),
        kl=float(np.concatenate(kls).mean()),
        top_5=float(np.concatenate(same).mean()),
        same_tokens=sum(a == b for a, b in zip(reference.tokens, output.tokens, strict=True)),
        tokens=len(reference.tokens),
    )


def _closest_convention(name: str, reference: ModelOutput, outputs: dict[str, ModelOutput]) -> OutputDifference:
    """Returns the comparison of the convention that the installed transformers has, if there are several."""
    rows = [_compare_outputs(convention, reference, output) for convention, output in outputs.items()]
    closest = min(rows, key=lambda row: row.error)
    return closest if len({row.error for row in rows}) > 1 else replace(closest, name=name)


def _activation_bytes(config: ModelConfig) -> int:
    """Returns the size of the largest attention scores, before and after the softmax, and of the logits of a text.

    The logits are those of transformers, a copy without padding, and ours.
    """
    if isinstance(config, DualEncoderConfig):
        return 2 * 4 * 3 * config.vision.heads * config.vision.patches**2
    images = config.image_stack.images
    towers = [] if images is None else [(2, images.vision.heads, images.vision.patches)]
    stacks = [stack for stack in (config.encoder_stack, config.decoder_stack) if stack is not None]
    towers += [(len(stacks), stack.heads, max(stack.window + PAST_WINDOW, TEXT_TOKENS)) for stack in stacks]
    scores = max(2 * 4 * rows * heads * length**2 for rows, heads, length in towers)
    return scores + 3 * 4 * TEXT_TOKENS // len(stacks) * config.decoder_stack.vocab_size


def _free_memory_note() -> str:
    """Returns a note on the free memory of the machine, empty if the system does not report it."""
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return ""
    return f"(free now: {pages / GIB:.1f} GiB)"
