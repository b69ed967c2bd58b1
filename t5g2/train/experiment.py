"""The experiment: a config file, read once, as one frozen value whose parts are handed down.

Everything that can be known to be wrong without a device is an error here: an unknown key, a wrong type, two settings
that exclude each other, lengths that hold no example. Below this file there is no ConfigDict and no default is guessed.
"""

import difflib
import hashlib
import json
import runpy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5g2 import objectives
from t5g2.core import settings
from t5g2.core.errors import UserError, unknown
from t5g2.core.mesh import MeshShape
from t5g2.core.tree import difference
from t5g2.data import sources, tokenizer
from t5g2.data.pipeline import DataConfig
from t5g2.eval.generate import BY_NAME as SAMPLERS
from t5g2.eval.tasks import BY_NAME as TASKS
from t5g2.eval.tasks import Task
from t5g2.models.attention import Compute
from t5g2.models.config import EncoderDecoderConfig, TextConfig
from t5g2.models.sizes import size
from t5g2.train import optim

TABLES = (
    {"gemma3": TextConfig, "t5gemma2": EncoderDecoderConfig},
    objectives.BY_NAME,
    sources.BY_NAME,
    tokenizer.BY_NAME,
    optim.OPTIMIZERS,
    optim.SCHEDULES,
    TASKS,
    SAMPLERS,
)


@dataclass(frozen=True)
class Adapt:
    """Start from a decoder-only model folder whose weights are adapted to this experiment's encoder-decoder model."""

    source: str


@dataclass(frozen=True)
class Init:
    """Where the weights come from; at most one, none = scratch. A checkpoint in the workdir wins over all of them.

    Attributes:
      resume: workdir of another run, whose whole state (weights, optimizer, data positions, step) is taken over.
      adapt: a decoder-only model folder, adapted.
      params: a model folder of this experiment's architecture.
    """

    resume: str | None = None
    adapt: Adapt | None = None
    params: str | None = None

    def __post_init__(self):
        given = [name for name in ("resume", "adapt", "params") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are both given; weights start from one place, so keep one of them")


@dataclass(frozen=True)
class Train:
    """The run itself.

    Attributes:
      steps: updates of the weights, all in all.
      seed: every other seed is derived from it, by name.
      microbatches: the global batch is computed in this many parts, one after the other, for one update.
      tile_tokens: tokens whose logits exist at a time.
      z_loss: weight of the squared log-partition function, which keeps logits from drifting.
      param_dtype: of the weights and of the optimizer's update.
    """

    steps: int
    seed: int = 0
    microbatches: int = 1
    tile_tokens: int = 1024
    z_loss: float = 0.0
    param_dtype: str = "float32"

    def __post_init__(self):
        for name in ("steps", "microbatches", "tile_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Log:
    """What is written down, and how often. `wandb` is a project's name; None = no W&B."""

    every_steps: int = 10
    tensorboard: bool = True
    wandb: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Tasks, run before the first update, every `every_steps` (0 = never between) and at the end.

    `final` names tasks that are run at the end only.
    """

    every_steps: int = 0
    tasks: tuple[Task, ...] = ()
    final: tuple[str, ...] = ()

    def __post_init__(self):
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise UserError(f"two tasks have the same name; the names are {', '.join(names)}")
        for name in self.final:
            if name not in names:
                raise unknown("task in final", name, names)


@dataclass(frozen=True)
class Save:
    """Checkpoints: every `every_steps` updates (0 = only at the end), the newest `keep` of them kept.

    `model`: at the end, write the weights as a model folder, `<workdir>/model`.
    """

    every_steps: int = 0
    keep: int = 3
    model: bool = True


@dataclass(frozen=True)
class Experiment:
    """One run, resolved: what `experiment.json` holds."""

    model: TextConfig | EncoderDecoderConfig
    data: DataConfig
    optim: optim.Optim
    train: Train
    init: Init = Init()
    mesh: MeshShape = MeshShape()
    compute: Compute = Compute()
    eval: Evaluation = Evaluation()
    save: Save = Save()
    log: Log = Log()

    def __post_init__(self):
        self._check_sides()
        self._check_tokens()
        if self.data.rows % self.train.microbatches:
            raise UserError(
                f"data.rows = {self.data.rows} is not divisible by train.microbatches = {self.train.microbatches}; "
                f"every microbatch has equally many rows"
            )
        self.optim.schedule.make(self.train.steps)  # raises where the warm-up does not fit into the run
        if self.init.adapt and not isinstance(self.model, EncoderDecoderConfig):
            raise UserError("init.adapt makes an encoder-decoder model, but model is decoder-only; see init.params")

    def _check_sides(self):
        encoder_decoder = isinstance(self.model, EncoderDecoderConfig)
        if encoder_decoder != (self.data.encoder_length > 0):
            raise UserError(
                f"the model is {'encoder-decoder' if encoder_decoder else 'decoder-only'} and data.encoder_length is "
                f"{self.data.encoder_length}; an encoder-decoder needs a length above 0, a decoder-only model 0"
            )

    def _check_tokens(self):
        decoder = self.model.decoder if isinstance(self.model, EncoderDecoderConfig) else self.model
        if self.data.tokenizer.vocab_size > decoder.vocab_size:
            raise UserError(
                f"the tokenizer has {self.data.tokenizer.vocab_size} ids and the model {decoder.vocab_size} rows in "
                f"its embedding; raise the model's vocab_size, or take fewer sentinels"
            )


def load(config: str, overrides: Iterable[tuple[str, str]] = ()) -> Experiment:
    """The experiment of "FILE[:ARG]" with (dotted path, text) overrides applied.

    Raises:
      UserError: no such file, a file without get_config, an unknown key (nearest name), a wrong type, a broken rule.
    """
    node = read(config)
    for path, text in overrides:
        settings.override(node, path, text)
    return build(node)


def read(config: str) -> dict[str, Any]:
    """What get_config of "FILE[:ARG]" returns, as plain dicts and lists."""
    name, _, argument = config.partition(":")
    path = Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")])
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; give a Python file with get_config()"
        raise UserError(f"no config file {name}{hint}")
    names = runpy.run_path(str(path))
    if "get_config" not in names:
        raise UserError(f"{name} has no get_config(); a config file defines one that returns a ConfigDict")
    return _plain(names["get_config"](*filter(None, [argument])))


def build(node: Mapping[str, Any]) -> Experiment:
    """The experiment that plain data describes; `model` may be {"size": NAME} instead of every field."""
    node = dict(node)
    model = node.get("model")
    if isinstance(model, Mapping) and "size" in model:
        if len(model) > 1:
            extra = ", ".join(sorted(set(model) - {"size"}))
            raise UserError(f"model has a size and also {extra}; a size is complete, so give one of them")
        node["model"] = size(model["size"])
    return settings.build(Experiment, node, tables=TABLES)


def dump(experiment: Experiment) -> dict[str, Any]:
    """The experiment as plain data; `build` of it gives an equal experiment."""
    return settings.dump(experiment, tables=TABLES)


def fingerprint(experiment: Experiment) -> str:
    """16 hex digits that change with every setting."""
    return hashlib.sha256(json.dumps(dump(experiment), sort_keys=True).encode()).hexdigest()[:16]


# What may differ when a run is resumed: how long, how often, on what and how fast, but not what is computed.
FREE_ON_RESUME = (
    "train.steps",
    "log",
    "save",
    "eval.every_steps",
    "eval.final",
    "mesh",
    "compute.remat",
    "compute.backend",
    "data.workers",
    "data.prefetch",
    "init",
)


def check_resume(saved: Mapping[str, Any], now: Mapping[str, Any], *, allow: Iterable[str] = ()) -> dict[str, tuple]:
    """{path: (saved, now)} of the settings that differ and may.

    Raises:
      UserError: settings differ that may not; shows each with both values, and the ways out.
    """
    old, new = settings.flatten(saved), settings.flatten(now)
    changed = {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}
    allow = tuple(allow)
    free = {k for k in changed if any(k == p or k.startswith(f"{p}.") for p in (*FREE_ON_RESUME, *allow))}
    refused = sorted(changed.keys() - free)
    if refused:
        shown = difference(*({k: side[k] for k in refused if k in side} for side in (old, new)))
        raise UserError(
            f"the workdir holds a different experiment (saved -> given):\n{shown}\n"
            f"Use another --workdir, undo the change, or go on with it on purpose: --allow_change={','.join(refused)}"
        )
    return {k: changed[k] for k in sorted(free)}


def _plain(node: Any) -> Any:
    if hasattr(node, "items"):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(item) for item in node] if isinstance(node, list | tuple) else node
