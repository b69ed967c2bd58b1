"""Checks that a foreign folder holds exactly the tensors that its architecture needs, each under its canonical name."""

import hashlib
import re
from collections.abc import Mapping

import numpy as np

from t5g2.checkpoint import hf_config_writer
from t5g2.checkpoint.hf_config_fields import CONFIG_FILE
from t5g2.checkpoint.names import TensorFormat, TensorMatch
from t5g2.checkpoint.tensor import Tensor
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.models.config import ModelConfig

# embedding tables, whose shape shows vocab_size and hidden_size
TABLES = ("embed_tokens.weight", "input_embedding", "token_embedding.weight")


def with_canonical_names(
    where: str, tensor_format: TensorFormat, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns (the tensors under the names of the format's table, notes on renamed and unused tensors).

    Args:
      where: folder or file, for messages.

    Raises:
      UserError: two stored names are aliases of one tensor.
    """
    stored_names: dict[str, str] = {}
    unused = []
    for name in tensors:
        canonical = tensor_format.canonical_name(name)
        if re.search(tensor_format.unused, canonical):
            unused.append(name)
            continue
        if canonical in stored_names:
            raise UserError(
                f"{where} holds {stored_names[canonical]} and {name}, which are two names of one tensor; remove one of "
                f"them"
            )
        stored_names[canonical] = name
    renamed = sum(canonical != name for canonical, name in stored_names.items())
    notes = [f"{renamed} tensors are stored under aliases of their names"] if renamed else []
    if unused:
        notes.append(
            f"{len(unused)} tensors that the model does not use were left out: {', '.join(sorted(unused)[:3])}"
        )
    return {canonical: tensors[name] for canonical, name in stored_names.items()}, notes


def with_originals(
    tensor_format: TensorFormat, matches: list[TensorMatch], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns (the tensors, in which a tied weight that is stored only as its copy has its own name; notes on it).

    Args:
      matches: the needed tensors.
      tensors: the stored ones by canonical name.
    """
    needed, tensors, notes = {match.name for match in matches}, dict(tensors), []
    for copy, original in tensor_format.copies.items():
        if copy in tensors and copy not in needed and original in needed and original not in tensors:
            tensors[original] = tensors.pop(copy)
            notes.append(f"{original} is stored as {copy}, to which it is tied")
    return tensors, notes


def check_tensors(
    where: str,
    tensor_format: TensorFormat,
    config: ModelConfig | None,
    matches: list[TensorMatch],
    tensors: Mapping[str, Tensor],
) -> list[str]:
    """Checks the tensors against those that the architecture needs; returns notes on unused tensors and rows.

    Args:
      where: folder and source of the architecture, for messages.
      config: the architecture, None for an image tower alone.
      matches: the needed tensors.
      tensors: the stored ones by canonical name.

    Raises:
      UserError: a tensor is missing, surplus or of another shape, with the difference; copies of a tied weight differ.
    """
    needed = {match.name: list(match.shape) for match in matches}
    stored = {name: list(tensor.shape) for name, tensor in tensors.items()}
    notes = []
    # tensors that a folder may hold beyond the needed ones are removed first, so that any other surplus is an error
    for copy, original in tensor_format.copies.items():
        if copy in tensors and copy not in needed and original in tensors:
            _compare_copies(where, copy, original, tensors)
            notes.append(f"{copy} repeats {original}")
            del stored[copy]
    shapes = hf_config_writer.placeholders(tensor_format, config)
    left_out = [name for name, shape in shapes.items() if stored.get(name) == list(shape) and name not in needed]
    for name in left_out:
        del stored[name]
    notes += _placeholder_notes(left_out)
    if needed != stored:
        raise UserError(
            f"the tensors in {where}, are not those of {tensor_format.title} (needed -> stored):\n"
            f"{tree.difference(needed, stored)}{_config_hints(tensor_format, needed, stored)}"
        )
    return notes + _cut_row_notes(matches)


def _placeholder_notes(left_out: list[str]) -> list[str]:
    """Returns a line for each thing that the model has not, and whose tensors were left out."""
    embeddings = [name for name in left_out if name.endswith("eoi_embedding")]
    tower = len(left_out) - len(embeddings)
    notes = [f"{tower} tensors of an empty image tower, which transformers always has, were left out"] if tower else []
    if embeddings:
        notes.append(f"{' and '.join(embeddings)}, which transformers always has, left out: there is no such token")
    return notes


def _cut_row_notes(matches: list[TensorMatch]) -> list[str]:
    """Returns a line for each table that is stored with more rows than the vocabulary has."""
    notes = []
    for match in matches:
        rows, kept = match.shape[0] if match.shape else 0, match.shapes[0][0] if match.shapes[0] else 0
        if match.axes.rows and rows != kept:
            notes.append(
                f"{match.name} has {rows} rows, of which the first {kept} are the vocabulary; the others were cut"
            )
    return notes


def _config_hints(tensor_format: TensorFormat, needed: Mapping[str, list[int]], stored: Mapping[str, list[int]]) -> str:
    """Returns lines that name the config.json fields which would explain a difference."""
    hints = ""
    for name, shape in needed.items():
        if name.endswith(TABLES) and stored.get(name, shape) != shape:
            hints += f"\nvocab_size = {shape[0]} and hidden_size = {shape[1]} contradict {name}, {stored[name]}"
    for copy in tensor_format.copies:
        if copy in needed and copy not in stored:
            hints += f"\ntie_word_embeddings = false needs {copy}; if the weights are tied, set it to true"
    return hints


def _compare_copies(where: str, copy: str, original: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError unless a copy of a tied weight equals its original bit for bit."""
    hashes = []
    for name in (copy, original):
        tensor = tensors[name]
        data = np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8)
        hashes.append((tensor.shape, str(tensor.dtype), hashlib.sha256(data.data).hexdigest()))
        del data  # hashes are compared, so that only one of the two tables is in memory
    if hashes[0] != hashes[1]:
        raise UserError(
            f"{copy} and {original} in {where}, differ, but they are one tied weight; if they are meant to differ, set "
            f"tie_word_embeddings = false in {CONFIG_FILE} (with every weight that this unties); otherwise remove "
            f"{copy}"
        )
