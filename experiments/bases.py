"""What the experiments share: a source, the runs that are adapted from it, and their seeds, at each scale.

An experiment takes its scale as the argument of its file, FILE:SCALE:

    laptop        (default) models of configs/t5gemma_small.py and configs/quickstart.py on the text of Python itself;
                  two CPU cores; seeds 0, 1 and 2. A source is trained once for all sweeps whose workdirs lie side by
                  side, in the folder `shared` beside them.
    2b-2b, …      the released sizes that a table is of: weights of SOURCES, texts of CORPUS, held-out texts of HELDOUT;
                  one seed, because of what a run costs.

Nothing but the scale of a run depends on the argument: the variants of a table are the same overrides in both.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from t5g2.core.errors import unknown
from t5g2.sweep import Step, Variant

LAPTOP = "laptop"
SEEDS = (0, 1, 2)
CORPUS = {"kind": "jsonl", "path": "corpus/*.jsonl"}
HELDOUT = {"kind": "jsonl", "path": "heldout/*.jsonl"}
# released decoder-only models, as folders in any format that `t5g2 import` reads
SOURCES = {
    "2b-2b": "models/gemma-2-2b",
    "9b-2b": "models/gemma-2-9b,models/gemma-2-2b",
    "9b-9b": "models/gemma-2-9b",
    "270m-270m": "models/gemma-3-270m",
    "1b-1b": "models/gemma-3-1b-pt",
}
PREFIX_LM, UL2 = {"kind": "prefix_lm"}, {"kind": "ul2"}


@dataclass(frozen=True)
class Base:
    """An adaptation at one scale, which an experiment's variants differ from.

    Attributes:
      config: "FILE:ARG" of the adapted model.
      source: folder of the source's weights.
      seeds: of every run.
      parts: the runs that the source comes from; none if it is released.
      overrides: settings of every run.
      steps: updates of a run.
      update_tokens: tokens of an update, input and output together; None = a run's length is that of its config.
    """

    config: str
    source: str
    seeds: tuple[int, ...]
    parts: tuple[Variant, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    update_tokens: int | None = None

    @property
    def laptop(self) -> bool:
        """True at the laptop's scale."""
        return self.update_tokens is None

    def updates(self, tokens: float) -> int:
        """Returns the updates of a run that has as many tokens in the paper."""
        return self.steps if self.update_tokens is None else int(tokens) // self.update_tokens

    def variant(self, name: str, overrides: Mapping[str, Any], *, config: str | None = None, after: tuple = ()):
        """Returns a run with nothing but the shared settings and these."""
        return Variant(name, config or self.config, {**self.overrides, **overrides}, after, self.seeds)

    def adapted(self, name: str, overrides: Mapping[str, Any], *, tokens: float, after: tuple = ()) -> Variant:
        """Returns a run that is adapted from the source, of as many tokens as the paper's."""
        origin = {"init.adapt.source": self.source, "train.steps": self.updates(tokens)}
        return self.variant(name, origin | dict(overrides), after=(*(part.name for part in self.parts), *after))

    def arms(self, arms: Mapping[str, Mapping[str, Any]], *, tokens: float) -> tuple[Variant, ...]:
        """Returns the source's runs, and a run that is adapted for each {name: overrides}."""
        return (*self.parts, *(self.adapted(name, overrides, tokens=tokens) for name, overrides in arms.items()))

    def evaluation(self, variant: str, tasks: str, *, options: tuple[str, ...] = ()) -> Step:
        """Returns the scores of a variant's model on a file of tasks."""
        out = f"scores-{variant}-s{{seed}}"
        command = (
            "evaluate",
            f"--model={{sweep}}/{variant}-s{{seed}}/model",
            f"--tasks={tasks}",
            f"--out={{sweep}}/{out}",
        )
        return Step(
            f"scores-{variant}", (*command, *options), out, (variant,), self.seeds, scores_of=variant, every_host=True
        )


def source_run(name: str, config: str, overrides: Mapping[str, Any] | None = None) -> Variant:
    """Returns the run of a small source, which all sweeps share."""
    return Variant(name, config, overrides or {}, seeds=SEEDS, shared=True)


def trained(name: str) -> str:
    """Returns the model folder of a run of this sweep."""
    return f"{{sweep}}/{name}-s{{seed}}/model"


def t5gemma(scale: str, sizes: tuple[str, ...] = ("2b-2b",)) -> Base:
    """Returns the adaptation of a Gemma 2 (T5Gemma): separate cross-attention, PrefixLM of two halves.

    Args:
      sizes: the released sizes that the experiment is of.

    Raises:
      UserError: there is no such scale.
    """
    if scale == LAPTOP:
        small = "configs/t5gemma_small.py"
        source = source_run("source", f"{small}:source-64")
        return Base(f"{small}:adapted-64", trained("source"), SEEDS, (source,), steps=125)
    released(scale, sizes)
    return Base(f"configs/t5gemma.py:{scale}", SOURCES[scale], (0,), overrides=texts(), update_tokens=2 * 4096 * 512)


def t5gemma2(scale: str, sizes: tuple[str, ...] = ("270m-270m", "1b-1b")) -> Base:
    """Returns the adaptation of a Gemma 3 (T5Gemma 2) without images: merged attention, one embedding, UL2.

    Raises:
      UserError: there is no such scale.
    """
    if scale == LAPTOP:
        small = "configs/quickstart.py"
        source = source_run("source", f"{small}:source")
        return Base(f"{small}:adapted", trained("source"), SEEDS, (source,), steps=100)
    released(scale, sizes)
    # the sources have no image tower
    text_alone = {"model.encoder.images": None, "optim.freeze": []}
    return Base(
        f"configs/t5gemma2.py:{scale}",
        SOURCES[scale],
        (0,),
        overrides=texts() | text_alone,
        update_tokens=2 * 16_384 * 128,
    )


def released(scale: str, sizes: tuple[str, ...]) -> None:
    """Raises UserError unless the scale is one of these sizes."""
    if scale not in sizes:
        raise unknown("scale", scale, (LAPTOP, *sizes), where="of this experiment")


def texts() -> dict[str, Any]:
    """Returns the settings of the texts at a released size."""
    return {"data.sources.0.text": CORPUS, "eval.tasks.0.text": HELDOUT}


def heldout(scale: str, objectives: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a held-out loss for each {task: objective}, on the same chunks in every run of a seed."""
    text = {"kind": "python", "split": "heldout"} if scale == LAPTOP else HELDOUT
    return [
        {"kind": "heldout_loss", "name": name, "text": text, "objective": objective, "examples": 256}
        for name, objective in objectives.items()
    ]
