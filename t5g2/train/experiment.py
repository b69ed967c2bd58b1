"""The experiment: a config file, read once, as one frozen value whose parts are handed down.

Everything that can be known to be wrong without a device is an error here: an unknown key, a wrong type, two settings
that exclude each other, lengths that hold no example. Below this file there is no ConfigDict and no default is guessed.
"""

import difflib
import hashlib
import inspect
import json
import runpy
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from t5g2 import objectives
from t5g2.adapt.options import AdaptOptions
from t5g2.core import settings
from t5g2.core.errors import UserError, unknown
from t5g2.core.sharding import MeshShape
from t5g2.core.tree import difference
from t5g2.data import chunking
from t5g2.data.pipeline import DataConfig
from t5g2.data.tokenizers import registry
from t5g2.eval.generation import BY_NAME as SAMPLERS
from t5g2.eval.tasks import BY_NAME as TASKS
from t5g2.eval.tasks import Task
from t5g2.models.attention import Compute
from t5g2.models.config import KINDS, EncoderDecoderConfig, TextConfig, to_dict
from t5g2.models.distillation import Distillation
from t5g2.models.sizes import size
from t5g2.train import image_rows, optim

TABLES = (
    KINDS,
    objectives.BY_NAME,
    chunking.BY_NAME,
    registry.BY_NAME,
    optim.OPTIMIZERS,
    optim.SCHEDULES,
    TASKS,
    SAMPLERS,
)


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")


@dataclass(frozen=True)
class Adapt:
    """Weights of a decoder-only model, adapted to an encoder-decoder one.

    Attributes:
      source: folder of the decoder-only model, in any format that `t5g2 import` reads; or two of them and a comma
        between, that of the encoder first.
      vision: folder of an image tower, if it is not the source's own.
      choices: what the architectures leave open.
    """

    source: str
    vision: str | None = None
    choices: AdaptOptions = AdaptOptions()

    def __post_init__(self):
        if len(self.sources) > 2 or not all(self.sources):
            raise UserError(f"source = {self.source!r}; give one folder, or two and a comma between: ENCODER,DECODER")

    @property
    def sources(self) -> list[str]:
        """The folder that is encoder and decoder, or one for each."""
        return self.source.split(",")

    @property
    def folders(self) -> list[str]:
        """All that is read."""
        return self.sources + ([] if self.vision is None else [self.vision])


@dataclass(frozen=True)
class Init:
    """Where the weights come from; at most one, none = scratch. A checkpoint in the workdir wins over all of them.

    Attributes:
      resume: workdir of another run, whose whole state (weights, optimizer, data positions, step) is taken over.
      adapt: a decoder-only model, adapted.
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
class Distill(Distillation):
    """A teacher, and how its distributions enter the loss.

    Attributes:
      teacher: folder of a language model in any format that `t5g2 import` reads, decoder-only or encoder-decoder. It is
        asked in every step, and reads what the student reads, or the text that this was made of.
      cache: folder that `t5g2 cache-logits` wrote; the answers are read from there. With a teacher beside it, they must
        be this one's.
    """

    teacher: str | None = None
    cache: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.teacher is None and self.cache is None:
            raise UserError(
                "distill has no teacher; give teacher, the folder of a model, or cache, that of its answers"
            )
        if self.cache is not None and "://" in self.cache:
            raise UserError(f"cache = {self.cache!r} is a URL; answers are read from a local folder, so copy it to one")
        if self.cache is not None and self.method == "full":
            raise UserError(
                'method = "full", which it is unless given, and a cache holds parts of distributions; set it to what '
                'the cache was made with, "top_k" or "sampled", or leave out cache to ask the teacher in every step'
            )


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
    param_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        _at_least(1, steps=self.steps, microbatches=self.microbatches, tile_tokens=self.tile_tokens)


@dataclass(frozen=True)
class Log:
    """What is written down, and how often. `wandb` is a project's name; None = no W&B."""

    every_steps: int = 10
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self):
        _at_least(1, every_steps=self.every_steps)


@dataclass(frozen=True)
class Evaluation:
    """Tasks, run before the first update, every `every_steps` (0 = never between) and at the end.

    `final` names tasks that are run at the end only.
    """

    every_steps: int = 0
    tasks: tuple[Task, ...] = ()
    final: tuple[str, ...] = ()

    def __post_init__(self):
        _at_least(0, every_steps=self.every_steps)
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

    def __post_init__(self):
        _at_least(0, every_steps=self.every_steps)
        _at_least(1, keep=self.keep)


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
    distill: Distill | None = None

    def __post_init__(self):
        self._check_sides()
        self._check_tokens()
        image_rows.check(self.model, self.data)
        if self.data.rows % self.train.microbatches:
            raise UserError(
                f"data.rows = {self.data.rows} is not divisible by train.microbatches = {self.train.microbatches}; "
                f"every microbatch has equally many rows"
            )
        self.optim.schedule.make(self.train.steps)  # raises where the warm-up does not fit into the run
        if self.data.teacher_features is not None:
            raise UserError("data.teacher_features follows from distill, which says who teaches; leave it out")
        if self.distill is not None and self.data.images is not None:
            raise UserError("distill and data.images are both set; a teacher is asked without images, so leave one out")
        if self.distill is not None:
            self.distill.check_vocabulary(self.vocab_size)
        if self.init.adapt and not isinstance(self.model, EncoderDecoderConfig):
            raise UserError("init.adapt makes an encoder-decoder model, but model is decoder-only; see init.params")

    def _check_sides(self):
        encoder_decoder = isinstance(self.model, EncoderDecoderConfig)
        if encoder_decoder != (self.data.encoder_length > 0):
            raise UserError(
                f"the model is {'encoder-decoder' if encoder_decoder else 'decoder-only'} and data.encoder_length is "
                f"{self.data.encoder_length}; an encoder-decoder needs a length above 0, a decoder-only model 0"
            )

    @property
    def vocab_size(self) -> int:
        """The tokens that the model gives logits for."""
        return (self.model.decoder if isinstance(self.model, EncoderDecoderConfig) else self.model).vocab_size

    def _check_tokens(self):
        if self.data.tokenizer.vocab_size > self.vocab_size:
            raise UserError(
                f"the tokenizer has {self.data.tokenizer.vocab_size} ids and the model {self.vocab_size} rows in "
                f"its embedding; raise the model's vocab_size, or take fewer sentinels"
            )


def load(config: str, overrides: Iterable[tuple[str, str]] = ()) -> Experiment:
    """The experiment of "FILE[:ARG]" with (dotted path, text) overrides applied.

    Raises:
      UserError: no such file, one that fails, an unknown key (nearest name), a wrong type, a broken rule.
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
    made = call(path, "get_config", [argument] if argument else [], returns="a ConfigDict")
    if not hasattr(made, "items"):
        raise UserError(f"get_config() of {name} returns {type(made).__name__}; it must return a ConfigDict")
    return _plain(made)


def call(path: Path, name: str, arguments: Sequence[str] = (), *, returns: str) -> Any:
    """What the function `name` of a Python file returns; `returns` says what that should be.

    Raises:
      UserError: the file is no Python, has no such function, or fails; with the line of it.
    """
    try:
        function = runpy.run_path(str(path)).get(name)
        if not callable(function):
            raise UserError(f"{path} has no {name}(); define one that returns {returns}")
        try:
            inspect.signature(function).bind(*arguments)
        except TypeError:
            raise UserError(
                f"{name}{inspect.signature(function)} of {path} was called with {', '.join(arguments) or 'nothing'}; "
                f"what follows the ':' of FILE:ARG is its one argument"
            ) from None
        return function(*arguments)
    except UserError:
        raise
    except Exception as error:  # somebody's own code can fail in any way
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = f", line {error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else '?'}"
        what = error.msg if isinstance(error, SyntaxError) else error
        raise UserError(
            f"{path}{line}: {type(error).__name__}: {what}; give a Python file whose {name}() returns {returns}"
        ) from error


def build(node: Mapping[str, Any]) -> Experiment:
    """The experiment that plain data describes.

    `model` is every field of an architecture, or {"size": NAME} and beside it what is to be otherwise, such as
    {"size": "t5gemma:2b-2b", "cross": "merged"}. `data.images` takes per_row, and resampling; the rest is the model's.
    """
    node = dict(node)
    model = node.get("model")
    if isinstance(model, Mapping) and "size" in model:
        changes = {key: value for key, value in model.items() if key != "size"}
        if "kind" in changes:
            raise UserError(
                "model has a size and also a kind, so it is a whole architecture twice; keep one of them. To take a "
                'size, replace the whole model block of the config file: config.model = {"size": NAME}'
            )
        node["model"] = _merged(to_dict(size(str(model["size"]))), changes)
    return settings.build(Experiment, image_rows.completed(node), tables=TABLES)


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
    "data.cache_tokens",
    "data.prefetch",
    "init",
)


def check_resume(saved: Mapping[str, Any], now: Mapping[str, Any], *, allow: Iterable[str] = ()) -> dict[str, tuple]:
    """{path: (saved, now)} of the settings that differ and may.

    Raises:
      UserError: settings differ that may not; shows each with both values, and the ways out. Or `allow` names none.
    """
    old, new = settings.flatten(_with_defaults(saved)), settings.flatten(now)
    changed = {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}
    allow = tuple(allow)
    _check_paths(allow, old.keys() | new.keys())
    free = {k for k in changed if any(_covers(path, k) for path in (*FREE_ON_RESUME, *allow))}
    refused = sorted(changed.keys() - free)
    if refused:
        shown = difference(*({k: side[k] for k in refused if k in side} for side in (old, new)))
        named = dict.fromkeys(_shortest(path, set(refused), old.keys() | new.keys()) for path in refused)
        raise UserError(
            f"the workdir holds a different experiment (saved -> given):\n{shown}\n"
            f"Use another --workdir, undo the change, or go on with it on purpose: --allow_change={','.join(named)}"
        )
    return {k: changed[k] for k in sorted(free)}


def _with_defaults(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved experiment with the settings that there were none of when it was saved, at their defaults."""
    try:
        return dump(build(saved))
    except UserError:  # of another version, or a file that it names is gone: compared as it is
        return saved


def _check_paths(paths: Iterable[str], settings: Iterable[str]) -> None:
    """Raises UserError for a path that is neither a setting's nor that of a part of the settings."""
    known = {prefix for setting in (*settings, "data.corpus") for prefix in _prefixes(setting)}
    for path in paths:
        if path not in known:
            near = difflib.get_close_matches(path, sorted(known), n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(
                f"--allow_change={path} names no setting; {hint}Allowed: the dotted path of a setting, such as "
                f"optim.schedule.peak, or of a part of them, such as optim, and data.corpus"
            )


def _shortest(path: str, refused: set[str], settings: Iterable[str]) -> str:
    """The shortest path that covers this one and no setting that was not refused too."""
    return next(p for p in _prefixes(path) if all(key in refused for key in settings if _covers(p, key)))


def _covers(path: str, setting: str) -> bool:
    return setting == path or setting.startswith(f"{path}.")


def _prefixes(path: str) -> list[str]:
    """a.b.c: a, a.b, a.b.c."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `changes` instead of its own; of nested ones, those alone that are given."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = _merged(base[key], value) if nested else value
    return merged


def _plain(node: Any) -> Any:
    if hasattr(node, "items"):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(item) for item in node] if isinstance(node, list | tuple) else node
