"""A sweep: several runs and the commands between them, each an ordinary `t5g2` command, and one report at the end.

A sweep file (experiments/*.py) defines get_sweep():

    def get_sweep():
        return Sweep(
            title="Adapted against scratch",
            parts=(
                Variant("source", config="configs/quickstart.py:source"),
                Variant("adapted", config="configs/quickstart.py:adapted", after=("source",),
                        overrides={"init.adapt.source": "{sweep}/source/model"}),
                Variant("scratch", config="configs/quickstart.py:scratch"),
                Step("average", command=("average", "--workdir={sweep}/adapted", "--last=3", "--out={sweep}/averaged"),
                     out="averaged", after=("adapted",)),
            ),
            compare=("adapted", "scratch"),
        )

`{sweep}` stands for the sweep's workdir. Run again, the same command skips what is done and resumes what is not.

A part with seeds is a group of runs, one a seed, in folders of their own; `{seed}` stands for the seed:

    SEEDS = (0, 1, 2)
    Variant("source", config="configs/quickstart.py:source", seeds=SEEDS),      # source-s0, source-s1, source-s2
    Variant("adapted", config="configs/quickstart.py:adapted", after=("source",), seeds=SEEDS,
            overrides={"init.adapt.source": "{sweep}/source-s{seed}/model"}),   # adapted-s1 comes after source-s1

The report shows each group's mean and interval. `compare` names groups, or several comparisons of them, each
{arm: group} under a title:

    compare={"width 96": {"adapted": "adapted-96", "scratch": "scratch-96"},
             "width 160": {"adapted": "adapted-160", "scratch": "scratch-160"}}
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from t5g2.core import settings
from t5g2.core.errors import UserError, unknown
from t5g2.train import config_file
from t5g2.train import experiment as experiments


@dataclass(frozen=True)
class Variant:
    """A training run, in the folder `name` of the sweep's workdir.

    Attributes:
      name: of the run, its folder and its curve.
      config: "FILE[:ARG]", as for `t5g2 train`.
      overrides: {dotted path: value} of settings that differ from the config's.
      after: names of parts that must be done before. Of a group, a run with the same seed waits for that seed's run,
        any other for all of them.
      seeds: one run for each, called NAME-sSEED, with train.seed = SEED; None = one run, with the config's seed.
      seed: of one run of a group; a sweep sets it.
    """

    name: str
    config: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    seed: int | None = None

    def changes(self, folder: Path) -> list[tuple[str, str]]:
        """(dotted path, text) of each override, as `--config.PATH=TEXT` gives them."""
        seed = [] if self.seed is None else [("train.seed", str(self.seed))]
        return seed + [(path, fill(flag_text(value), folder, self.seed)) for path, value in self.overrides.items()]

    def arguments(self, folder: Path) -> list[str]:
        """The words after `t5g2` on the command line."""
        changes = [f"--config.{path}={text}" for path, text in self.changes(folder)]
        return ["train", f"--config={self._config(folder)}", f"--workdir={folder / self.name}", *changes]

    def result(self, folder: Path) -> Path:
        """The file that exists once the part is done: the trainer writes it at the end."""
        return folder / self.name / "done.json"

    def identity(self, folder: Path) -> str:
        """A text that changes with every setting of the experiment. Raises UserError if the config is wrong."""
        return experiments.fingerprint(config_file.load(self._config(folder), self.changes(folder)))

    def _config(self, folder: Path) -> str:
        return fill(self.config, folder, self.seed)


@dataclass(frozen=True)
class Step:
    """Any other command, such as adapt, average or evaluate.

    Attributes:
      name: of the part.
      command: what follows `t5g2` on the command line.
      out: the file or folder that the command writes in one go, relative to the sweep's workdir; done = it exists.
      after, seeds, seed: as of a Variant.
    """

    name: str
    command: tuple[str, ...]
    out: str
    after: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    seed: int | None = None

    def arguments(self, folder: Path) -> list[str]:
        """The words after `t5g2` on the command line."""
        return [fill(word, folder, self.seed) for word in self.command]

    def result(self, folder: Path) -> Path:
        """The file or folder that exists once the part is done."""
        return folder / fill(self.out, folder, self.seed)

    def identity(self, folder: Path) -> str:
        """A text that changes with the command."""
        return json.dumps(self.arguments(folder))


Part = Variant | Step


@dataclass(frozen=True)
class Paper:
    """A table that a paper printed, shown beside our numbers, and its place ("arXiv 2512.14856v2, table 3")."""

    source: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]
    note: str = ""

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise UserError(f"the paper's row {row} has {len(row)} entries for {len(self.columns)} columns")


@dataclass(frozen=True)
class Sweep:
    """Parts, run in an order in which each comes after what it needs, and otherwise as they are listed.

    Attributes:
      title: heading of the report.
      parts: variants and steps.
      compare: names of the variants whose curves are drawn together, the first being what the others are compared with;
        or {title: {arm: variant}} of several such comparisons, each with the same arms. () = all variants.
      paper: the paper's numbers, for the report.
    """

    title: str
    parts: tuple[Part, ...]
    compare: tuple[str, ...] | Mapping[str, Mapping[str, str]] = ()
    paper: Paper | None = None

    def __post_init__(self):
        for part in self.parts:
            _check_seeds(part)
        runs = [run.name for part in self.parts for run in expand(part)]
        groups = [part.name for part in self.parts if part.seeds is not None]
        for name in (taken := [*runs, *groups]):
            if taken.count(name) > 1:
                raise UserError(f"two parts of the sweep are called {name!r}; names are folders, so they must differ")
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
                raise UserError(f"{name!r} cannot name a folder; use letters, digits, '.', '-' and '_'")
        for part in self.parts:
            for run in expand(part):
                for name in run.after:
                    if name not in taken:
                        raise unknown(f"part that {run.name} comes after:", name, taken)
        self._check_compare([part.name for part in self.parts if isinstance(part, Variant)])
        self.ordered()

    def _check_compare(self, variants: list[str]) -> None:
        of = self.compare
        comparisons = list(of.values()) if isinstance(of, Mapping) else [{name: name for name in of}]
        for arms in comparisons:
            for name in arms.values():
                if name not in variants:
                    raise unknown("variant to compare", name, variants)
            if list(arms) != list(comparisons[0]):
                raise UserError(
                    f"`compare` has comparisons of {', '.join(comparisons[0])} and of {', '.join(arms)}; they are the "
                    f"columns of one table, so give each the same arms in the same order"
                )

    def ordered(self) -> list[Part]:
        """The runs and steps, one for each seed, in the order in which they run.

        Raises:
          UserError: some wait for each other.
        """
        runs = {part.name: expand(part) for part in self.parts}
        waiting = [replace(run, after=_waits_for(run, runs)) for part in self.parts for run in runs[part.name]]
        order: list[Part] = []
        while waiting:
            done = {part.name for part in order}
            ready = next((part for part in waiting if done.issuperset(part.after)), None)
            if ready is None:
                raise UserError(f"{', '.join(p.name for p in waiting)} wait for each other; check their `after`")
            order.append(ready)
            waiting.remove(ready)
        return order


def expand(part: Part) -> list[Part]:
    """A part for each of its seeds, or itself.

    >>> [(run.name, run.after) for run in expand(Variant("a", config="c.py", after=("b-s{seed}",), seeds=(0, 7)))]
    [('a-s0', ('b-s0',)), ('a-s7', ('b-s7',))]
    """
    if part.seeds is None:
        return [part]
    return [
        replace(
            part,
            name=f"{part.name}-s{seed}",
            after=tuple(name.replace("{seed}", str(seed)) for name in part.after),
            seeds=None,
            seed=seed,
        )
        for seed in part.seeds
    ]


def _waits_for(run: Part, runs: Mapping[str, Sequence[Part]]) -> tuple[str, ...]:
    """The names of the runs that `run` comes after: of a group, the one of its own seed, or all if there is none."""
    names: list[str] = []
    for name in run.after:
        group = runs.get(name, ())
        same = [other.name for other in group if run.seed is not None and other.seed == run.seed]
        names += same or [other.name for other in group] or [name]
    return tuple(names)


def _check_seeds(part: Part) -> None:
    if part.seeds is None:
        texts = (*part.after, *part.command, part.out) if isinstance(part, Step) else (*part.after, part.config)
        texts += tuple(map(flag_text, part.overrides.values())) if isinstance(part, Variant) else ()
        if part.seed is None and any("{seed}" in text for text in texts):
            raise UserError(f"{part.name} contains {{seed}} and has no seeds; give it some, such as seeds=(0, 1, 2)")
        return
    if not part.seeds:
        raise UserError(f"{part.name} has seeds = (); give at least one, or leave seeds out for the config's own")
    for seed in part.seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise UserError(f"{part.name} has the seed {seed!r}; a seed is a whole number, at least 0")
        if part.seeds.count(seed) > 1:
            raise UserError(
                f"{part.name} has the seed {seed} twice in {part.seeds}; each seed is a run, so they differ"
            )
    if isinstance(part, Variant) and "train.seed" in part.overrides:
        raise UserError(f"{part.name} has seeds and overrides train.seed, which they set; leave one of the two out")
    if isinstance(part, Step) and "{seed}" not in part.out:
        raise UserError(
            f"{part.name} has seeds and out = {part.out!r} for all of them; name it by the seed, as in "
            f"{part.out + '-s{seed}'!r}"
        )


def flag_text(value: Any) -> str:
    """The text of a flag that is read as `value` again."""
    return value if isinstance(value, str) and settings.parse(value) == value else repr(value)


def fill(text: str, folder: Path, seed: int | None) -> str:
    """Replaces {sweep} and {seed} in a text by the sweep's workdir and the seed."""
    text = text.replace("{sweep}", str(folder))
    return text if seed is None else text.replace("{seed}", str(seed))


def command_line(arguments: Sequence[str]) -> str:
    """The `t5g2` command as a shell takes it."""
    return shlex.join(["t5g2", *arguments])
