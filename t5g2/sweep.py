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

import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from t5g2.core import logs, settings
from t5g2.core.errors import UserError, unknown
from t5g2.train import config_file

PROGRAM = (sys.executable, "-m", "t5g2")

# Asks for SIGTERM when the parent dies (PR_SET_PDEATHSIG = 1, linux/prctl.h) and becomes the command.
STOP_WITH_PARENT = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)})
os.execv(sys.argv[1], sys.argv[1:])
"""


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
        return seed + [(path, _filled(_spell(value), folder, self.seed)) for path, value in self.overrides.items()]

    def arguments(self, folder: Path) -> list[str]:
        """What follows `t5g2` on the command line."""
        changes = [f"--config.{path}={text}" for path, text in self.changes(folder)]
        return ["train", f"--config={self._config(folder)}", f"--workdir={folder / self.name}", *changes]

    def result(self, folder: Path) -> Path:
        """The file that exists once the part is done: the trainer writes it at its close."""
        return folder / self.name / "done.json"

    def identity(self, folder: Path) -> str:
        """Changes with every setting of the experiment. Raises UserError where the config is wrong."""
        from t5g2.train import experiment

        return experiment.fingerprint(config_file.load(self._config(folder), self.changes(folder)))

    def _config(self, folder: Path) -> str:
        return _filled(self.config, folder, self.seed)


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
        """What follows `t5g2` on the command line."""
        return [_filled(word, folder, self.seed) for word in self.command]

    def result(self, folder: Path) -> Path:
        """The file or folder that exists once the part is done."""
        return folder / _filled(self.out, folder, self.seed)

    def identity(self, folder: Path) -> str:
        """Changes with the command."""
        return json.dumps(self.arguments(folder))


Part = Variant | Step


@dataclass(frozen=True)
class Paper:
    """What a paper printed, shown beside our numbers: a table, and where it stands ("arXiv 2512.14856v2, table 3")."""

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
        told = (*part.after, *part.command, part.out) if isinstance(part, Step) else (*part.after, part.config)
        told += tuple(map(_spell, part.overrides.values())) if isinstance(part, Variant) else ()
        if part.seed is None and any("{seed}" in text for text in told):
            raise UserError(f"{part.name} speaks of {{seed}} and has no seeds; give it some, such as seeds=(0, 1, 2)")
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


def load(path: str | os.PathLike) -> Sweep:
    """The sweep of a file. Raises UserError: no such file, no get_sweep(), or it returns something else."""
    if not Path(path).is_file():
        raise UserError(f"no sweep file {path}; give the path of a Python file that defines get_sweep()")

    made = config_file.call(Path(path), "get_sweep", returns="a t5g2.sweep.Sweep")
    if not isinstance(made, Sweep):
        raise UserError(f"get_sweep() of {path} returns {type(made).__name__}; it must return a t5g2.sweep.Sweep")
    return made


def run(path: str | os.PathLike, workdir: str | os.PathLike, *, launcher: str = "local") -> None:
    """Runs a sweep file in a workdir and writes the report.

    Raises:
      UserError: the sweep file or a variant's config is wrong, found before anything is started.
      SystemExit: a part failed, with its exit status; or SIGTERM or SIGINT came and the part that ran has ended.
    """
    if launcher not in LAUNCHERS:
        raise unknown("launcher", launcher, LAUNCHERS)
    LAUNCHERS[launcher](load(path), Path(workdir))


def run_local(sweep: Sweep, folder: Path, *, program: Sequence[str] = PROGRAM) -> None:
    """Runs the parts here, one after the other; `program` is what `t5g2` stands for."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={folder} is a file; give a folder, which is made if it is missing")
    if (folder / "experiment.json").exists():
        raise UserError(f"{folder} is the workdir of a single run; give the sweep a folder of its own")
    identities = _identities(sweep, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={folder} cannot be made ({error}); give another folder") from None
    with _alone(folder) as lock, _Signals() as signals:
        _write_json(folder / "sweep.json", describe(sweep, folder))
        parts = sweep.ordered()
        width = max((len(part.name) for part in parts), default=0)
        for number, part in enumerate(parts, 1):
            label, mark = f"[{number}/{len(parts)}] {part.name:{width}}", folder / ".sweep" / f"{part.name}.json"
            # a part that was done with other settings runs again: the command itself knows what may differ
            if part.result(folder).exists() and _read_json(mark) in (None, identities[part.name]):
                _write_json(mark, identities[part.name])
                _say(f"{label} already done")
                continue
            arguments = part.arguments(folder)
            _say(f"{label} {'resumes' if (folder / part.name).exists() else 'starts'}: {_shown(arguments)}")
            start = time.perf_counter()
            status = _run([*program, *arguments], signals, lock)
            taken = logs.duration(time.perf_counter() - start)
            if signals.came:
                _say(f"{label} ended after {taken}, asked to; run the same command again to go on")
                sys.exit(128 + signals.came)
            if status:
                _say(f"{label} failed after {taken} with exit status {status}; its last lines are above")
                sys.exit(status)
            if not part.result(folder).exists():
                raise UserError(
                    f"{part.name} ended well but left no {part.result(folder)}; is the sweep's `out` right?"
                )
            _write_json(mark, identities[part.name])
            _say(f"{label} done in {taken}")
    from t5g2.report import contents

    contents.write(folder)


def print_commands(sweep: Sweep, folder: Path) -> None:
    """Prints the commands in a right order, as a shell takes them; starts and writes nothing."""
    for part in sweep.ordered():
        print(f"# {part.name}" + (f", after {', '.join(part.after)}" if part.after else ""))
        print(_shown(part.arguments(folder)))


LAUNCHERS: dict[str, Callable[[Sweep, Path], None]] = {"local": run_local, "print": print_commands}


def describe(sweep: Sweep, folder: Path) -> dict[str, Any]:
    """sweep.json, which the report reads."""
    groups = {run.name: part.name for part in sweep.parts if part.seeds is not None for run in expand(part)}
    parts = [
        {
            "name": part.name,
            "kind": type(part).__name__.lower(),
            "command": _shown(part.arguments(folder)),
            "result": str(part.result(folder).relative_to(folder)),
            "after": list(part.after),
        }
        | ({"group": groups[part.name], "seed": part.seed} if part.name in groups else {})
        for part in sweep.ordered()
    ]
    of = sweep.compare
    compare = {title: dict(arms) for title, arms in of.items()} if isinstance(of, Mapping) else list(of)
    paper = asdict(sweep.paper) if sweep.paper else None
    return {"title": sweep.title, "parts": parts, "compare": compare, "paper": paper}


def _identities(sweep: Sweep, folder: Path) -> dict[str, str]:
    """By part, a hash that changes with its settings and with those of what it comes after."""
    identities = {}
    for part in sweep.ordered():
        text = part.identity(folder) + "".join(identities[name] for name in sorted(part.after))
        identities[part.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return identities


class _Signals:
    """SIGTERM and SIGINT are passed on to the part that runs; nothing new is started afterwards."""

    def __init__(self):
        self.came, self._child = 0, None

    def __enter__(self):
        self._before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, _frame: Any) -> None:
        self.came = number
        if self._child is not None:
            self._child.send_signal(number)

    def wait(self, child: subprocess.Popen) -> int:
        self._child = child
        if self.came:  # between the start of the child and this line
            child.send_signal(self.came)
        try:
            return child.wait()
        finally:
            self._child = None


def _run(command: Sequence[str], signals: _Signals, lock: int) -> int:
    """The exit status of a command, 128 + n if signal n ended it; its output goes where ours goes.

    It is a session of its own, so that Ctrl-C on the terminal reaches it once, through us, and not twice. It holds the
    lock too: if we are killed, it is told to stop (Linux), and whoever comes next waits until it has.
    """
    if signals.came:
        return 128 + signals.came
    sys.stdout.flush()
    if sys.platform == "linux":
        command = [sys.executable, "-ISc", STOP_WITH_PARENT, *command]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=(lock,))
    status = signals.wait(child)
    return status if status >= 0 else 128 - status


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Holds the folder's lock; waits while another sweep, or what is left of one, still works here."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another sweep still works in {folder}; this one goes on when it has ended")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _spell(value: Any) -> str:
    """The text that a flag needs so that it is read as `value` again."""
    return value if isinstance(value, str) and settings.parse(value) == value else repr(value)


def _filled(text: str, folder: Path, seed: int | None) -> str:
    text = text.replace("{sweep}", str(folder))
    return text if seed is None else text.replace("{seed}", str(seed))


def _shown(arguments: Sequence[str]) -> str:
    return shlex.join(["t5g2", *arguments])


def _say(text: str) -> None:
    print(text, flush=True)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)
