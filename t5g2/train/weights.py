"""Weights from one model folder to another, and from the checkpoints of a run to one: adapt, average."""

import dataclasses
import json
from os import PathLike
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from t5g2.adapt import rules
from t5g2.adapt.apply import Provenance, apply
from t5g2.checkpoint import average
from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.folder import ModelFolder
from t5g2.checkpoint.state import Checkpoints
from t5g2.core import mesh as meshes
from t5g2.core.errors import UserError
from t5g2.data import tokenizer as tokenizers
from t5g2.models import build, sizes
from t5g2.models.config import ModelConfig, from_dict, text_only
from t5g2.train import experiment as experiments

DERIVED = "t5gemma2"  # the target whose sizes are the source's


def adapt_folder(source: str | PathLike, target: str, out: str | PathLike, *, seed: int = 0) -> Provenance:
    """Writes the model folder that a decoder-only one becomes, and prints the account of every weight.

    Args:
      source: a decoder-only model folder; its tokenizer goes along, its dtype stays.
      target: "t5gemma2" (the source's sizes), the name of a size, or a file like model.json.
      out: where the folder goes.
      seed: of weights that the source does not have.

    Raises:
      UserError: a folder is missing or damaged, `out` exists, the target is unknown or its weights do not fit.
    """
    folders.refuse_existing(out)
    opened = folders.open_model(source)
    model, provenance = _adapt(opened, _target(target, opened), seed=seed)
    print(provenance.table())
    folders.save_model(out, model, tokenizer=opened.tokenizer, provenance=provenance.to_dict(), carry=opened.carried)
    print(f"wrote {Path(out).absolute()}")
    return provenance


def adapt_into(
    source: str | PathLike,
    target: ModelConfig,
    *,
    mesh: Mesh | None = None,
    param_dtype: Any = None,
    seed: int = 0,
) -> tuple[Any, Provenance]:
    """(the model of this config with the weights of a decoder-only model folder, the account of every weight).

    Args:
      source: a model folder.
      target: an encoder-decoder architecture of the source's sizes.
      mesh: where the weights go; None = the default device.
      param_dtype: what they are cast to; None = as they are stored.
      seed: of weights that the source does not have.

    Raises:
      UserError: the folder is missing or damaged, or its weights do not fit.
    """
    return _adapt(folders.open_model(source), target, mesh=mesh, param_dtype=param_dtype, seed=seed)


def average_run(workdir: str | PathLike, out: str | PathLike, *, last: int) -> list[int]:
    """Writes the mean of a run's last checkpoints as a model folder; returns the steps.

    Raises:
      UserError: `out` exists, the workdir holds no run or fewer checkpoints, or one is damaged.
    """
    folders.refuse_existing(out)
    record = Path(workdir) / "experiment.json"
    if not record.is_file():
        raise UserError(f"{record} does not exist; give the workdir of a run")
    experiment = experiments.build(json.loads(record.read_text()))
    with Checkpoints(Path(workdir) / "checkpoints", read_only=True) as checkpoints:
        steps = average.last(checkpoints, last)
        model = average.mean(checkpoints, steps, build.abstract(experiment.model, experiment.train.param_dtype))
    provenance = {"average_of_steps": steps, "workdir": str(Path(workdir).absolute())}
    tokenizer = experiment.data.tokenizer
    folders.save_model(out, model, tokenizer=tokenizer.to_dict(), provenance=provenance, carry=tokenizer.files)
    print(f"averaged the checkpoints of steps {', '.join(map(str, steps))} into {Path(out).absolute()}")
    return steps


def _adapt(
    opened: ModelFolder, target: ModelConfig, *, mesh: Mesh | None = None, param_dtype: Any = None, seed: int = 0
) -> tuple[Any, Provenance]:
    changed = rules.check(opened.config, target)
    abstract = build.abstract(target, folders.dtype_of(opened, param_dtype))
    model, provenance = apply(
        opened.leaves,
        abstract,
        rules.T5GEMMA2_FROM_GEMMA3,
        key=jax.random.key(seed),
        shardings=None if mesh is None else meshes.shardings(abstract, mesh),
    )
    return model, dataclasses.replace(provenance, settings=changed, source=str(opened.path))


def _target(name: str, source: ModelFolder) -> ModelConfig:
    """The architecture that --target names."""
    if name == DERIVED:
        tokenizer = None if source.tokenizer is None else tokenizers.from_dict(source.tokenizer, source.path)
        return rules.target_config(source.config, eoi_id=None if tokenizer is None else tokenizer.id("end_of_image"))
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{path.absolute()} does not exist; give a model.json, the name of a size, or {DERIVED}")
        try:
            return from_dict(json.loads(path.read_text()), where=str(path))
        except json.JSONDecodeError as error:
            raise UserError(f"{path.absolute()} is not JSON ({error}); give a file like model.json") from None
    return text_only(sizes.size(name))  # a decoder-only text model has no image tower to give
