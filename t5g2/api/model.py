"""Base class of loaded models: weights, tokenizer, saving."""

import contextlib
import functools
import tempfile
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from t5g2.checkpoint import export_folder, generation_ids
from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.folder import ModelFolder
from t5g2.core import files, tree
from t5g2.core.errors import UserError, unknown
from t5g2.data import image_processor
from t5g2.data.images import ImageProcessor, Resampling
from t5g2.data.tokenizers import registry as tokenizers
from t5g2.data.tokenizers.base import Tokenizer
from t5g2.models.config import DualEncoderConfig, ModelConfig
from t5g2.models.layers import Compute

Format = Literal["t5g2", "huggingface"]


class Model:
    """A loaded model.

    Attributes:
      folder: the folder that it was loaded from.
      params: the module that holds the weights.
      dtype, compute, mesh: as in `load`.
    """

    def __init__(self, folder: ModelFolder, dtype: Any, compute: Compute, mesh: Mesh | None):
        self.folder, self.dtype, self.compute, self.mesh = folder, dtype, compute, mesh
        # the tower of a language model is large and often not used, so it is read later
        without_tower = folders.without_images(folder)
        param_dtype = chosen_dtype(without_tower, dtype)
        self.params: Any = folders.load_model(without_tower, mesh=mesh, param_dtype=param_dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.folder.origin!r}, {self.compute})"

    @property
    def config(self) -> ModelConfig:
        """Architecture of the model."""
        return self.folder.config

    @functools.cached_property
    def image_processor(self) -> ImageProcessor:
        """Rule that makes the tower's inputs from pixels: that of the folder's files; may be set.

        Raises:
          UserError: as image_processor.read.
        """
        # text needs no processor, so its files are read with the first image
        return image_processor.read(self.folder.path, default=self._default_resampling)

    @property
    def _default_resampling(self) -> Resampling:
        return "bicubic" if isinstance(self.config, DualEncoderConfig) else "bilinear"

    @property
    def resampling(self) -> Resampling:
        """Filter with which images are resized, a field of `image_processor`; reads and sets it."""
        return self.image_processor.resampling

    @resampling.setter
    def resampling(self, resampling: Resampling) -> None:
        self.image_processor = replace(self.image_processor, resampling=resampling)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the folder.

        Raises:
          UserError: the folder has none.
        """
        if self.folder.tokenizer is None:
            raise UserError(
                f"{self.folder.path} has no tokenizer, so it cannot read text; put its tokenizer.json or "
                f"tokenizer.model there, or give tokens"
            )
        return tokenizers.from_dict(self.folder.tokenizer, self.folder.path)

    def save(self, directory: str | PathLike, *, format: Format = "t5g2") -> None:
        """Writes the model, with its tokenizer: a model folder, or a Hugging Face folder that transformers loads.

        A Hugging Face folder is exported from a temporary model folder beside it, which needs as much disk space.

        Raises:
          UserError: the directory exists; transformers has no architecture for this model.
        """
        if format not in get_args(Format):
            raise unknown("format", format, get_args(Format))
        target = Path(directory).expanduser().absolute()
        files.refuse_existing(target)
        if format == "t5g2":
            self._save_folder(target)
            return
        # beside the target, so that both are on one disk
        files.make_folder(target.parent)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
            self._save_folder(Path(temporary) / "model")
            export_folder.export_model(Path(temporary) / "model", target)

    def _save_folder(self, directory: Path) -> None:
        processor, extra_files = self._changed_processor(), self.folder.extra_files
        if processor is not None:
            extra_files = tuple(file for file in extra_files if file.name not in image_processor.FILES)
        folders.save_leaves(
            directory,
            self.params.config,
            tree.leaves(self.params),
            json_files={
                folders.TOKENIZER: self.folder.tokenizer,
                folders.PROVENANCE: self.folder.provenance,
                # of config.json too, which a model folder does not keep
                folders.GENERATION_FILE: generation_ids.completed(self.folder.path),
                image_processor.PREPROCESSOR_FILE: processor,
            },
            extra_files=extra_files,
        )

    def _changed_processor(self) -> dict[str, Any] | None:
        """Returns the preprocessor_config.json of an `image_processor` that was set; None = the folder's files stay."""
        config, default = self.config, self._default_resampling
        vision = (
            config.vision
            if isinstance(config, DualEncoderConfig)
            else getattr(config.image_stack.images, "vision", None)
        )
        # a processor that no image needed yet is not read: its files may be of a kind that is not supported
        if vision is None or "image_processor" not in vars(self):
            return None
        if self.image_processor == image_processor.read(self.folder.path, default=default):
            return None
        family = "Siglip" if isinstance(config, DualEncoderConfig) else "Gemma3"
        return image_processor.to_dict(self.image_processor, vision.image_size, family=family)

    def _run(self, function: Any, *arguments: Any) -> Float[np.ndarray, "..."]:
        with self.on_devices():
            return np.asarray(function(self.params, *arguments, compute=self.compute))

    def on_devices(self) -> Any:
        """Returns a context in which arrays are sharded over the model's mesh, if it has one."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def json_field(file: Path, key: str) -> Any:
    """Returns a field of a JSON file, None if the file or the field is missing.

    Raises:
      UserError: the file is not JSON, or not an object.
    """
    if not file.is_file():
        return None
    return files.read_json_object(file, fix="download it again, or remove it").get(key)


def chosen_dtype(folder: ModelFolder, chosen: Any) -> np.dtype:
    """Returns the chosen dtype, or that of the leaves: the widest if they have several."""
    chosen = folders.weight_dtype(chosen)
    # the widest dtype holds every stored value exactly
    dtypes = {jnp.dtype(leaf.dtype) for leaf in folder.leaves.values()} if chosen is None else {chosen}
    return functools.reduce(jnp.promote_types, sorted(dtypes, key=str))
