"""Teachers of distillation: a model that runs in every step, or whose logits `t5g2 cache-logits` stored ahead."""

import hashlib
from os import PathLike
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from t5g2.checkpoint import folder as folders
from t5g2.checkpoint import import_folder
from t5g2.checkpoint.folder import ModelFolder
from t5g2.core import sharding, tree
from t5g2.core.batch import Batch
from t5g2.core.errors import UserError
from t5g2.data.tokenizers.base import Tokenizer
from t5g2.models import build
from t5g2.models.config import DualEncoderConfig, LanguageModelConfig
from t5g2.models.distillation import SparseDistribution, TeacherOutputs
from t5g2.models.layers import Compute


def open_teacher(directory: str | PathLike, tokenizer: Tokenizer, vocab_size: int) -> ModelFolder:
    """Opens the folder of a teacher, in any format, without its image tower, and checks that it fits the student.

    Args:
      tokenizer: tokenizer of the student.
      vocab_size: rows of the student's head.

    Raises:
      UserError: the folder does not exist, holds no language model, or has another tokenizer or too small a vocabulary.
    """
    folder = import_folder.open_any(directory)
    if isinstance(folder.config, DualEncoderConfig):
        raise UserError(
            f"{folder.origin} holds an image and text encoder, which predicts no tokens; give a language model"
        )
    folder = folders.without_images(folder)
    if folder.tokenizer is not None:
        teacher_tokenizer, run_tokenizer = folder.tokenizer, tokenizer.to_dict()
        # a teacher that reads the student's rows meets sentinels too, so all special ids must agree
        compared = (
            ("kind", "sha256") if reads_text(folder) else (teacher_tokenizer.keys() | run_tokenizer.keys()) - {"file"}
        )
        if any(teacher_tokenizer.get(key) != run_tokenizer.get(key) for key in compared):
            raise UserError(
                f"the teacher, {folder.origin}, has another tokenizer ({teacher_tokenizer}) than the run "
                f"({run_tokenizer}), so it predicts other tokens; give a teacher with the run's tokenizer, or "
                f"train with the teacher's"
            )
    teacher_size = _language_config(folder).decoder_stack.vocab_size
    if teacher_size < vocab_size:
        raise UserError(
            f"the teacher, {folder.origin}, has a vocabulary of {teacher_size} and the model one of {vocab_size}; a "
            f"teacher must know every token of the student, so give another teacher, or set the model's vocab_size to "
            f"{teacher_size}"
        )
    return folder


def reads_text(folder: ModelFolder) -> bool:
    """True for a decoder-only teacher, which reads the text itself; others read rows as the student does."""
    return not _language_config(folder).is_encoder_decoder


def abstract(folder: ModelFolder, mesh: Mesh, param_dtype: Any) -> Any:
    """Returns a teacher's weights as shapes, each with its sharding on the mesh."""
    params = build.abstract(folder.config, jnp.dtype(param_dtype))
    shardings = sharding.shardings(params, mesh)
    return jax.tree.map(lambda x, on: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), params, shardings)


def fingerprint(folder: ModelFolder) -> str:
    """Returns 16 hex digits of a teacher's architecture and weights, the same in every format; reads all weights."""
    # a field that came later is left out at its default: fingerprints are stored with logits and in checkpoints
    digest = hashlib.sha256(repr(folder.config).replace(", probe=None", "").encode())
    for key, leaf in sorted(folder.leaves.items(), key=lambda item: tree.name(item[0])):
        array = leaf.read()
        digest.update(f"{tree.name(key)} {array.dtype} {array.shape}".encode())
        digest.update(hashlib.blake2b(array.tobytes()).digest())
    return digest.hexdigest()[:16]


def outputs(teacher: Any, batch: Batch, compute: Compute, *, key: jax.Array | None) -> TeacherOutputs:
    """Returns the teacher's outputs for a batch, under jit: hidden states, whose logits the loss head computes by tile.

    Args:
      teacher: a model; None = the batch carries cached distributions.
      key: random key for samples from the teacher's distributions.
    """
    inputs = batch.teacher
    assert inputs is not None, "a run with a teacher has batches that carry the teacher's inputs"
    has_teacher_BT = inputs.origins >= 0
    # cached distributions, a teacher that reads the student's rows, or one that reads the text
    if inputs.ids is not None:
        log_probs, tail = cast(tuple[jax.Array, jax.Array], (inputs.log_probs, inputs.tail))
        return TeacherOutputs(has_teacher_BT, SparseDistribution(inputs.ids, log_probs, tail))
    if inputs.text is None:
        hidden_BTD = teacher.hidden(batch.encoder, batch.decoder, compute=compute)
    else:
        # the teacher reads the text (length L); each target takes the state at its place in the text
        hidden_BLD = teacher.hidden(None, inputs.text, compute=compute)
        positions_BT = jnp.maximum(inputs.origins, 0)
        hidden_BTD = jnp.take_along_axis(hidden_BLD, positions_BT[:, :, None], axis=1)
    return TeacherOutputs(has_teacher_BT, None, hidden_BTD, teacher.head(), key)


def _language_config(folder: ModelFolder) -> LanguageModelConfig:
    assert not isinstance(folder.config, DualEncoderConfig)
    return folder.config
