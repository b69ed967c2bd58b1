"""Weights from one model folder to another, and from the checkpoints of a run to one: adapt, average."""

import json
from collections.abc import Iterable, Mapping
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
from t5g2.checkpoint import import_folder
from t5g2.checkpoint.folder import ModelFolder
from t5g2.checkpoint.import_folder import TowerFolder
from t5g2.core import files, settings, tree
from t5g2.core import sharding as meshes
from t5g2.core.errors import UserError
from t5g2.data.tokenizers import registry as tokenizers
from t5g2.models import build, sizes
from t5g2.models.config import EncoderDecoderConfig, ModelConfig, from_dict, text_only, to_dict
from t5g2.train.experiment import Adapt

Changes = Iterable[tuple[str, str]]
CHOICES = tuple(entry.name for entry in fields(AdaptOptions))


def from_flags(source: str, vision: str | None, choices: Mapping[str, Any]) -> Adapt:
    """What a command line says of an adaptation; `choices` by the names of their fields.

    Raises:
      UserError: one that is not allowed.
    """
    return Adapt(source, vision, settings.build(AdaptOptions, choices, where="adapt"))


def adapt_folder(
    given: Adapt,
    target: str,
    out: str | PathLike,
    *,
    changes: Changes = (),
    dtype: Any = None,
    seed: int = 0,
) -> Provenance:
    """Writes the model folder that a decoder-only model becomes, leaf by leaf, and prints the account of every weight.

    Args:
      given: the source or sources, and what the architectures leave open; the tokenizer goes along.
      target: "t5gemma" or "t5gemma2" (with the source's blocks), the name of a size, or a file like model.json. A size
        comes without its image tower where there is none to take.
      out: where the folder goes; it does not exist.
      changes: (dotted path, text) of what the target's architecture is to have otherwise.
      dtype: of the weights; None = that of the sources.
      seed: of weights that no source has.

    Raises:
      UserError: a folder is missing or damaged, `out` exists, the target is unknown or its weights do not fit.
    """
    files.refuse_existing(out)
    opened = _open(given)
    pairing = pairings.pair(opened.sources, _target(target, opened, given, changes), given.choices)
    adapted = _adapt(opened, pairing, dtype=folders.weight_dtype(dtype), seed=seed)
    print(adapted.provenance.table())
    folders.save_leaves(
        out,
        pairing.target,
        adapted.leaves,
        tokenizer=opened.tokenizer(pairing.target),
        provenance=adapted.provenance.to_dict(),
        extra_files=opened.extra_files,
    )
    print(f"wrote {Path(out).absolute()}")
    return adapted.provenance


def adapt_into(
    given: Adapt,
    target: ModelConfig,
    *,
    mesh: Mesh | None = None,
    param_dtype: Any = None,
    seed: int = 0,
) -> tuple[Any, Provenance]:
    """(the model of this config with the weights of a decoder-only one, the account of every weight).

    Args:
      given: the source or sources, and what the architectures leave open.
      target: an encoder-decoder architecture.
      mesh: where the weights go; None = the default device.
      param_dtype: what they are cast to; None = as they are stored.
      seed: of weights that no source has.

    Raises:
      UserError: a folder is missing or damaged, or its weights do not fit.
    """
    opened = _open(given)
    pairing = pairings.pair(opened.sources, target, given.choices)
    adapted = _adapt(opened, pairing, dtype=param_dtype, seed=seed)
    abstract = build.abstract(target, next(iter(adapted.leaves.values())).dtype)
    shardings = None if mesh is None else meshes.shardings(abstract, mesh)
    return tree.build(abstract, lambda key: adapted.leaves[key].read(), shardings=shardings), adapted.provenance


def check_adapt(given: Adapt, target: ModelConfig) -> Pairing:
    """Sources and target, found to fit; no weight is read.

    Raises:
      UserError: as adapt_into.
    """
    return pairings.pair(_open(given).sources, target, given.choices)


def open_same_architecture(path: str, config: ModelConfig) -> ModelFolder:
    """Opens the model folder of `init.params`.

    Raises:
      UserError: its architecture is another one than the config's.
    """
    folder = folders.open_model(path)
    if folder.config != config:
        in_folder, in_config = (settings.flatten(to_dict(c)) for c in (folder.config, config))
        raise UserError(
            f"init.params, {path}, holds another architecture than the config's (folder -> config):\n"
            f"{tree.difference(in_folder, in_config)}\nChange the config's model, or adapt the weights with init.adapt"
        )
    return folder


@dataclass(frozen=True, eq=False)
class _Opened:
    """The folders of an adaptation; encoder and decoder may be one."""

    sources: SourceModels
    encoder: ModelFolder
    decoder: ModelFolder
    tower: TowerFolder | None

    @property
    def described(self) -> str:
        """Where the weights come from, for the account."""
        one = self.encoder is self.decoder
        parts = [str(self.encoder.path)] if one else [f"encoder {self.encoder.path}", f"decoder {self.decoder.path}"]
        return ", ".join([*parts, *([] if self.tower is None else [f"vision {self.tower.path}"])])

    @property
    def extra_files(self) -> tuple[Path, ...]:
        """Files that go along: the decoder's, and of the encoder's those that it does not have."""
        found = {file.name: file for of in (self.encoder, self.decoder) for file in of.extra_files}
        return tuple(found.values())

    def tokenizer(self, target: EncoderDecoderConfig | None = None) -> dict[str, Any] | None:
        """The tokenizer, as plain data; for a target, with the image token that it has.

        Raises:
          UserError: the two sources have different ones.
        """
        one, other = (folder.tokenizer for folder in (self.encoder, self.decoder))
        if one is not None and other is not None and one | {"file": None} != other | {"file": None}:
            raise UserError(
                f"{self.encoder.path} and {self.decoder.path} have different tokenizers ({one} and {other}); encoder "
                f"and decoder read the same tokens, so give sources of one tokenizer"
            )
        found = one if other is None else other
        images = None if target is None else target.encoder.images
        if found is None or images is None or found["kind"] == "bytes":
            return found
        return found | {"ids": sorted((dict(found.get("ids", ())) | {"image": images.token}).items())}

    def dtype(self, chosen: Any) -> np.dtype:
        """The dtype that was chosen, or else the one of all that is read.

        Raises:
          UserError: none was chosen, and there are several.
        """
        if chosen is not None:
            return np.dtype(chosen)
        found = {folder.path: folders.common_dtype(folder) for folder in (self.encoder, self.decoder)}
        if self.tower is not None:
            found[self.tower.path] = self.tower.leaves["vision.positions", None].dtype
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{path}: {dtype}" for path, dtype in found.items())
            raise UserError(f"the sources have weights of several dtypes ({listed}); say which to use (dtype)")
        return next(iter(found.values()))


def _open(given: Adapt) -> _Opened:
    encoder, *others = map(import_folder.open_any, given.sources)
    decoder = others[0] if others and others[0].path != encoder.path else encoder
    tower = None if given.vision is None else import_folder.open_tower(given.vision)
    made = {of.path: SourceModel(of.config, of.leaves, str(of.path)) for of in (encoder, decoder)}
    vision = None if tower is None else SourceModel(tower.config, tower.leaves, str(tower.path))
    return _Opened(SourceModels(made[encoder.path], made[decoder.path], vision), encoder, decoder, tower)


def _adapt(opened: _Opened, pairing: Pairing, *, dtype: Any, seed: int) -> AdaptedModel:
    abstract = build.abstract(pairing.target, opened.dtype(dtype))
    return adapt(pairing, abstract, seed=seed, source=opened.described)


def _target(name: str, opened: _Opened, given: Adapt, changes: Changes) -> ModelConfig:
    """The architecture that --target names, with changes."""
    if name in FAMILIES:
        target: ModelConfig = pairings.derive_config(
            opened.sources, name, given.choices, end_of_image=_end_of_image(opened)
        )
    elif name.endswith(".json"):
        target = _read(Path(name))
    else:
        target = sizes.size(name)
        if opened.sources.tower is None and target != text_only(target):
            target = text_only(target)
            print(f"{name} without its image tower: {opened.described} has none, and --vision gives none")
    node = to_dict(target)
    for path, text in changes:
        settings.override(node, path, text)
    return from_dict(node, where="target")


def _end_of_image(opened: _Opened) -> int | None:
    """The id of the token after an image, if the source's tokenizer has one."""
    described = opened.tokenizer()
    if described is None:
        return None
    folder = opened.encoder if opened.decoder.tokenizer is None else opened.decoder
    return tokenizers.from_dict(described, folder.path).named().get("end_of_image")


def _read(path: Path) -> ModelConfig:
    if not path.is_file():
        families = " or ".join(FAMILIES)
        raise UserError(f"{path.absolute()} does not exist; give a model.json, the name of a size, or {families}")
    try:
        return from_dict(json.loads(path.read_text()), where=str(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path.absolute()} is not JSON ({error}); give a file like model.json") from None
