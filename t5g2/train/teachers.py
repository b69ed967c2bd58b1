"""Teachers: the model that a run learns from, asked in the run's own step, or before it by `t5g2 cache-logits`."""

import hashlib
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from t5g2.checkpoint import convert
from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.folder import ModelFolder
from t5g2.core import sharding as meshes
from t5g2.core import tree
from t5g2.core.batch import Batch
from t5g2.core.errors import UserError
from t5g2.data.tokenizers.registry import Tokenizer
from t5g2.models import build
from t5g2.models.config import DualEncoderConfig, EncoderDecoderConfig, ModelConfig
from t5g2.models.distillation import SparseDistribution, TeacherOutputs
from t5g2.models.layers import Compute


def open_teacher(directory: str | PathLike, tokenizer: Tokenizer, vocab_size: int) -> ModelFolder:
    """The folder of a teacher, in any format, found to speak of a student's tokens; its image tower is left aside.

    Args:
      tokenizer: the student's.
      vocab_size: the rows of the student's head.

    Raises:
      UserError: no such folder, no language model, another tokenizer, or too small a vocabulary.
    """
    folder = convert.open_any(directory)
    if isinstance(folder.config, DualEncoderConfig):
        raise UserError(
            f"{folder.path} holds an image and text encoder, which says nothing of next tokens; give a language model"
        )
    folder = folders.without_images(folder)
    if folder.tokenizer is not None:
        theirs, ours = folder.tokenizer, tokenizer.to_dict()
        # one that reads rows reads the sentinels too, where one that reads the text meets none
        compared = ("kind", "sha256") if reads_text(folder) else (theirs.keys() | ours.keys()) - {"file"}
        if any(theirs.get(key) != ours.get(key) for key in compared):
            raise UserError(
                f"the teacher, {folder.path}, has another tokenizer ({theirs}) than the run ({ours}), so its answers "
                f"are about other tokens; give a teacher of the run's tokenizer, or train with the teacher's"
            )
    theirs = _decoder(folder.config).vocab_size
    if theirs < vocab_size:
        raise UserError(
            f"the teacher, {folder.path}, has a vocabulary of {theirs} and the model one of {vocab_size}; a teacher "
            f"must know every token of the student, so give another one, or the model a vocab_size of {theirs}"
        )
    return folder


def reads_text(folder: ModelFolder) -> bool:
    """Whether a teacher is decoder-only: it reads the text itself, where another reads a row as the student does."""
    return not isinstance(folder.config, EncoderDecoderConfig)


def abstract(folder: ModelFolder, world: Mesh, param_dtype: Any) -> Any:
    """The shapes of a teacher, each with the sharding that it has on the mesh."""
    params = build.abstract(folder.config, jnp.dtype(param_dtype))
    places = meshes.shardings(params, world)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, places)


def fingerprint(folder: ModelFolder) -> str:
    """16 hex digits of a teacher's architecture and all of its weights, which are read; the same in every format."""
    whole = hashlib.sha256(repr(folder.config).encode())
    for key, leaf in sorted(folder.leaves.items(), key=lambda item: tree.name(item[0])):
        array = leaf.read()
        whole.update(f"{tree.name(key)} {array.dtype} {array.shape}".encode())
        whole.update(hashlib.blake2b(array.tobytes()).digest())
    return whole.hexdigest()[:16]


def outputs(teacher: Any, batch: Batch, compute: Compute, *, key: jax.Array | None) -> TeacherOutputs:
    """Returns the teacher's outputs for the loss of a batch, under jit; the loss computes its logits from its states.

    Args:
      teacher: a model; None = the batch has its cached distributions.
      key: for sampling from its distributions.
    """
    inputs = batch.teacher
    assert inputs is not None, "the batches of a run with a teacher have TeacherInputs"
    has_teacher_BT = inputs.origins >= 0
    if inputs.ids is not None:
        cached: Any = inputs.ids, inputs.log_probs, inputs.tail
        return TeacherOutputs(has_teacher_BT, SparseDistribution(*cached))
    if inputs.text is None:
        hidden_BTD = teacher.hidden(batch.encoder, batch.decoder, compute=compute)
    else:
        hidden_BLD = teacher.hidden(None, inputs.text, compute=compute)
        origins_BT = jnp.maximum(inputs.origins, 0)
        hidden_BTD = jnp.take_along_axis(hidden_BLD, origins_BT[:, :, None], axis=1)
    return TeacherOutputs(has_teacher_BT, None, hidden_BTD, teacher.head(), key)


def _decoder(config: ModelConfig) -> Any:
    return config.decoder if isinstance(config, EncoderDecoderConfig) else config
