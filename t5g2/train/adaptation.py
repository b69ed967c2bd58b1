"""Adaptation of folders: decoder-only models become an encoder-decoder model folder, or the first weights of a run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from t5g2.adapt import pairing as pairings
from t5g2.adapt.apply import AdaptedModel, adapt
from t5g2.adapt.options import AdaptOptions
from t5g2.adapt.pairing import FAMILIES, Pairing, SourceModel, SourceModels
from t5g2.adapt.provenance import Provenance
from t5g2.checkpoint import folder as folders
from t5g2.checkpoint import generation_ids, import_folder, source_folder
from t5g2.checkpoint.folder import ModelFolder
from t5g2.checkpoint.import_folder import TowerFolder
from t5g2.core import files, settings, sharding, tree
from t5g2.core.errors import UserError
from t5g2.data import image_processor
from t5g2.data.tokenizers import registry as tokenizers
from t5g2.data.tokenizers.base import Tokenizer
from t5g2.models import build, sizes
from t5g2.models.config import EncoderDecoderConfig, ModelConfig, from_dict, text_only, to_dict
from t5g2.train import probes
from t5g2.train.weight_origin import Adapt

Changes = Iterable[tuple[str, str]]
CHOICES = tuple(entry.name for entry in fields(AdaptOptions))


def from_flags(source: str, vision: str | None, options: Mapping[str, Any]) -> Adapt:
    """Returns the adaptation that command-line flags describe.

    Args:
      source, vision: as in Adapt.
      options: values by the names of AdaptOptions' fields.

    Raises:
      UserError: an option has a value that is not allowed.
    """
    return Adapt(source, vision, settings.build(AdaptOptions, options, where="adapt"))


def adapt_folder(
    init: Adapt,
    target: str,
    out: str | PathLike,
    *,
    changes: Changes = (),
    dtype: Any = None,
    seed: int = 0,
) -> Provenance:
    """Writes the adapted model as a model folder, leaf by leaf, and prints the provenance of every weight.

    Args:
      init: the source or sources, and the options; the tokenizer is copied.
      target: "t5gemma" or "t5gemma2" (with the source's blocks), the name of a size, or a file like model.json. A size
        comes without its image tower if no source has one.
      out: folder to write; it must not exist.
      changes: (dotted path, text) overrides of the target's architecture.
      dtype: dtype of the weights; None = that of the sources.
      seed: seed of the weights that no source has.

    Raises:
      UserError: a folder is missing or damaged, `out` exists, the target is unknown or its weights do not fit.
    """
    files.refuse_existing(out)
    # the folders and the architectures are checked before any weight is read, because reading takes minutes
    opened = _open(init)
    pairing = pairings.pair(opened.sources, _target(target, opened, init, changes), init.choices)
    adapted = _adapt(opened, pairing, dtype=folders.weight_dtype(dtype), seed=seed)
    print(adapted.provenance.table())
    folders.save_leaves(
        out,
        pairing.target,
        adapted.leaves,
        json_files={
            folders.TOKENIZER: opened.tokenizer(pairing.target),
            folders.PROVENANCE: adapted.provenance.to_dict(),
            generation_ids.GENERATION_FILE: generation_ids.completed(opened.decoder.path),
            **opened.processor(pairing.target),
        },
        extra_files=opened.extra_files,
    )
    print(f"wrote {Path(out).absolute()}")
    return adapted.provenance


def adapt_into(
    init: Adapt,
    target: ModelConfig,
    *,
    mesh: Mesh | None = None,
    param_dtype: Any = None,
    seed: int = 0,
) -> tuple[Any, Provenance]:
    """Returns the model of an architecture with the weights of a decoder-only one, and the provenance of every weight.

    Args:
      init: the source or sources, and the options.
      target: an encoder-decoder architecture.
      mesh: devices of the weights; None = the default device.
      param_dtype: dtype that weights are cast to; None = as they are stored.
      seed: seed of the weights that no source has.

    Raises:
      UserError: a folder is missing or damaged, or its weights do not fit.
    """
    opened = _open(init)
    pairing = pairings.pair(opened.sources, target, init.choices)
    adapted = _adapt(opened, pairing, dtype=param_dtype, seed=seed)
    # the model is built leaf by leaf on its devices: the host never holds all of it
    abstract = build.abstract(target, next(iter(adapted.leaves.values())).dtype)
    shardings = None if mesh is None else sharding.shardings(abstract, mesh)
    return tree.build(abstract, lambda key: adapted.leaves[key].read(), shardings=shardings), adapted.provenance


def check_adapt(init: Adapt, target: ModelConfig) -> Pairing:
    """Checks that sources and target fit; no weight is read.

    Raises:
      UserError: as adapt_into.
    """
    return pairings.pair(_open(init).sources, target, init.choices)


def source_tokenizer(init: Adapt, target: ModelConfig) -> Tokenizer | None:
    """Returns the tokenizer of an adapted model: its sources', with the target's image token; None if they have none.

    Raises:
      UserError: a folder is missing or damaged, or the sources have different tokenizers.
    """
    # the folders' tokenizers alone: opening the weights reads copies of tied ones
    paths = {source_folder.recorded(source): source_folder.folder_of(source) for source in init.sources}
    described = [(name, path, import_folder.read_tokenizer(path)) for name, path in paths.items()]
    description, folder = _joint_tokenizer(described)
    description = _with_image_token(description, target if isinstance(target, EncoderDecoderConfig) else None)
    return None if description is None else tokenizers.from_dict(description, folder)


def open_same_architecture(path: str, config: ModelConfig, *, seed: int = 0) -> ModelFolder:
    """Opens the model of `init.params`, in any format; a probe that it lacks is new.

    Args:
      seed: seed of a new probe's weights.

    Raises:
      UserError: the folder's architecture differs from the config's; as open_any.
    """
    folder = import_folder.open_any(path)
    if probes.lacks_probe(folder, config):
        return probes.with_new_probe(folder, config, seed=seed)
    if folder.config != config:
        in_folder, in_config = (settings.flatten(to_dict(c)) for c in (folder.config, config))
        raise UserError(
            f"init.params, {path}, holds another architecture than the config's (folder -> config):\n"
            f"{tree.difference(in_folder, in_config)}\nChange the config's model, or adapt the weights with init.adapt"
        )
    return folder


@dataclass(frozen=True, eq=False)
class _OpenedFolders:
    """The folders of an adaptation; encoder and decoder may be the same folder."""

    sources: SourceModels
    encoder: ModelFolder
    decoder: ModelFolder
    tower: TowerFolder | None

    @property
    def description(self) -> str:
        """Folders, files or addresses of all sources, for the provenance."""
        encoder, decoder = self.encoder.origin, self.decoder.origin
        parts = [encoder] if self.encoder is self.decoder else [f"encoder {encoder}", f"decoder {decoder}"]
        return ", ".join([*parts, *([] if self.tower is None else [f"vision {self.tower.origin}"])])

    @property
    def extra_files(self) -> tuple[Path, ...]:
        """Files that are copied with the model: the decoder's, and those of the encoder that the decoder lacks."""
        # of two files with one name the later, the decoder's, stays
        by_name = {file.name: file for folder in (self.encoder, self.decoder) for file in folder.extra_files}
        if self._tower_has_processor:
            for name in image_processor.FILES:
                by_name.pop(name, None)
        return tuple(by_name.values())

    @property
    def _tower_has_processor(self) -> bool:
        return self.tower is not None and image_processor.has_files(self.tower.path)

    def processor(self, target: EncoderDecoderConfig) -> dict[str, dict[str, Any]]:
        """Returns the image processor of a tower of its own, as a file; none where that of the sources stays.

        Raises:
          UserError: as image_processor.read.
        """
        images = target.image_stack.images
        if self.tower is None or images is None or not self._tower_has_processor:
            return {}
        read = image_processor.read(self.tower.path, default="bilinear")
        return {image_processor.PREPROCESSOR_FILE: image_processor.to_dict(read, images.vision.image_size)}

    def tokenizer(self, target: EncoderDecoderConfig | None = None) -> dict[str, Any] | None:
        """Returns the tokenizer as plain data; for a target with images, with its image token.

        Raises:
          UserError: the two sources have different tokenizers.
        """
        tokenizer, _ = self.tokenizer_in_folder()
        return _with_image_token(tokenizer, target)

    def tokenizer_in_folder(self) -> tuple[dict[str, Any] | None, Path]:
        """Returns the tokenizer of the sources as plain data, and the folder of its file.

        Raises:
          UserError: the two sources have different tokenizers.
        """
        return _joint_tokenizer([(f.origin, f.path, f.tokenizer) for f in (self.encoder, self.decoder)])

    def dtype(self, chosen: Any) -> np.dtype:
        """Returns the chosen dtype, or else the one that all sources have.

        Raises:
          UserError: no dtype was chosen, and the sources have several.
        """
        if chosen is not None:
            return np.dtype(chosen)
        dtypes = {folder.origin: folders.common_dtype(folder) for folder in (self.encoder, self.decoder)}
        if self.tower is not None:
            # any leaf of the tower will do; this one exists in every folder with a tower
            dtypes[self.tower.origin] = self.tower.leaves["vision.positions", None].dtype
        if len(set(dtypes.values())) > 1:
            listed = ", ".join(f"{origin}: {dtype}" for origin, dtype in dtypes.items())
            raise UserError(f"the sources have weights of several dtypes ({listed}); choose one (dtype)")
        return next(iter(dtypes.values()))


def _open(init: Adapt) -> _OpenedFolders:
    # one folder named twice is one source, so that its weights are read and accounted for once
    encoder, *others = map(import_folder.open_any, init.sources)
    decoder = others[0] if others and others[0].path != encoder.path else encoder
    tower = None if init.vision is None else import_folder.open_tower(init.vision)
    models = {f.path: SourceModel(f.config, f.leaves, f.origin, f.notes) for f in (encoder, decoder)}
    vision = None if tower is None else SourceModel(tower.config, tower.leaves, tower.origin, tower.notes)
    return _OpenedFolders(SourceModels(models[encoder.path], models[decoder.path], vision), encoder, decoder, tower)


def _adapt(opened: _OpenedFolders, pairing: Pairing, *, dtype: Any, seed: int) -> AdaptedModel:
    abstract = build.abstract(pairing.target, opened.dtype(dtype))
    return adapt(pairing, abstract, seed=seed, source=opened.description)


def _target(name: str, opened: _OpenedFolders, init: Adapt, changes: Changes) -> ModelConfig:
    """Returns the architecture that --target names, with the overrides of --target.a.b=VALUE."""
    if name in FAMILIES:
        target: ModelConfig = pairings.derive_config(
            opened.sources, name, init.choices, end_of_image=_end_of_image(opened)
        )
    elif name.endswith(".json"):
        target = _read_architecture(Path(name))
    else:
        target = sizes.size(name)
        # a released size has its image tower, which a text-only source cannot fill
        if opened.sources.tower is None and target != text_only(target):
            target = text_only(target)
            print(f"{name} without its image tower: {opened.description} has none, and --vision gives none")
    node = to_dict(target)
    for path, text in changes:
        settings.override(node, path, text)
    return from_dict(node, where="target")


def _joint_tokenizer(
    described: Sequence[tuple[str, Path, dict[str, Any] | None]],
) -> tuple[dict[str, Any] | None, Path]:
    """Returns (the tokenizer of the encoder's and the decoder's folder, the folder of its file), the decoder's first.

    Args:
      described: of the encoder and the decoder: the name for messages, the folder, and its tokenizer.

    Raises:
      UserError: the two have different tokenizers.
    """
    having_one = [(name, path, tokenizer) for name, path, tokenizer in described if tokenizer is not None]
    if not having_one:
        return None, described[0][1]
    (encoder_name, _, encoder), (decoder_name, folder, decoder) = having_one[0], having_one[-1]
    # the file name may differ between two copies of one tokenizer; the hash may not
    if encoder | {"file": None} != decoder | {"file": None}:
        raise UserError(
            f"{encoder_name} and {decoder_name} have different tokenizers ({encoder} and {decoder}); "
            f"encoder and decoder read the same tokens, so give sources of one tokenizer"
        )
    return decoder, folder


def _with_image_token(tokenizer: dict[str, Any] | None, target: EncoderDecoderConfig | None) -> dict[str, Any] | None:
    """Returns a tokenizer with the image token of the target: adaptation moves it. Bytes have no such token."""
    images = None if target is None else target.encoder.images
    if tokenizer is None or images is None or tokenizer["kind"] == "bytes":
        return tokenizer
    return tokenizer | {"ids": sorted((dict(tokenizer.get("ids", ())) | {"image": images.token}).items())}


def _end_of_image(opened: _OpenedFolders) -> int | None:
    """Returns the id of the token after an image, if the source's tokenizer has one."""
    tokenizer, folder = opened.tokenizer_in_folder()
    return None if tokenizer is None else tokenizers.from_dict(tokenizer, folder).named().get("end_of_image")


def _read_architecture(path: Path) -> ModelConfig:
    if not path.is_file():
        families = " or ".join(FAMILIES)
        raise UserError(f"{path.absolute()} does not exist; give a model.json, the name of a size, or {families}")
    return from_dict(files.read_json_object(path, fix="give a file like model.json"), where=str(path))
