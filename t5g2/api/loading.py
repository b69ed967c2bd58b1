"""Loading of a model from a folder of any kind."""

from os import PathLike
from typing import Any, get_args

import jax
from jax.sharding import Mesh

from t5g2.api.dual_encoder import DualEncoder
from t5g2.api.language_model import LanguageModel, Positions
from t5g2.checkpoint import folder as folders
from t5g2.checkpoint import import_folder
from t5g2.core import sharding, whole_weights
from t5g2.core.errors import unknown
from t5g2.models import build
from t5g2.models.config import DualEncoderConfig, ModelConfig
from t5g2.models.layers import Compute


def load(
    directory: str | PathLike,
    *,
    dtype: Any = None,
    compute: Compute | None = None,
    mesh: Mesh | None = None,
    positions: Positions = "raw",
    config: ModelConfig | str | PathLike | None = None,
    image_size: int | None = None,
) -> "LanguageModel | DualEncoder":
    """Loads the model of a folder. The image tower of a language model is read when it is first needed.

    Args:
      directory: a model folder, a Hugging Face folder, an official Flax one, a GGUF file, or the address of one of
        them at the hub, hf://OWNER/NAME[@REVISION].
      dtype: dtype of the weights; None = as they are stored (those of text and image tower may differ).
      compute: dtype and attention backend of the forward pass; None = float32 on a CPU, bfloat16 on an accelerator, and
        image towers in float32 on both.
      mesh: devices over which the weights are sharded, by the rules of core/sharding.py; an axis that leaves weights
        whole is warned of. None = the default device.
      positions: positions of the tokens of a padded row. "raw" = the column, padding counted, as in transformers where
        no positions are given; "counted" = the number of tokens before it, as in google-deepmind/gemma. Both are the
        same for rows padded on the right. Generation always uses "counted".
      config: the architecture of a folder without a config: the name of a size, or a file like model.json.
      image_size: size of images in pixels, if not the size that the tower was trained with (896 or 448); its position
        embeddings are resampled.

    Raises:
      UserError: the folder does not exist or is damaged, or an argument is unknown.
    """
    if positions not in get_args(Positions):
        raise unknown("positions", positions, get_args(Positions))
    # a model folder always has its config, so the argument is for foreign folders
    folder = import_folder.open_any(directory) if config is None else import_folder.open_foreign(directory, config)
    if image_size is not None:
        folder = folders.with_image_size(folder, image_size)
    compute = default_compute() if compute is None else compute
    if mesh is not None:
        whole_weights.warn(build.abstract(folder.config), mesh)
    if isinstance(folder.config, DualEncoderConfig):
        return DualEncoder(folder, dtype, compute, mesh)
    return LanguageModel(folder, dtype, compute, mesh, positions)


def mesh_of(text: str | None) -> Mesh | None:
    """Returns the mesh over the devices of this machine that a text spells (sharding.shape_of); None = one device.

    Raises:
      UserError: the text is not the shape of a mesh, or there are not as many devices.
    """
    return None if text is None else sharding.make(sharding.shape_of(text))


def default_compute() -> Compute:
    """Returns float32 on a CPU, which is no faster in bfloat16, and bfloat16 on an accelerator."""
    return Compute(dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")
