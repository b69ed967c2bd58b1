"""Sweep files: Python files whose get_sweep() returns a Sweep; and sweep.json, its description for the report."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from t5g2.core.errors import UserError
from t5g2.report import record_files
from t5g2.sweep.parts import Step, Sweep, expand
from t5g2.sweep.words import command_line
from t5g2.train import config_file


def load(sweep_file: str | os.PathLike) -> Sweep:
    """Returns the sweep of "FILE[:ARG]"; ARG, such as a size, is what get_sweep is called with.

    Raises:
      UserError: the file does not exist, has no get_sweep(), takes no argument or another one, or returns something
        else.
    """
    path, argument = config_file.split(os.fspath(sweep_file))
    if not Path(path).is_file():
        raise config_file.no_such_file("sweep", path, "get_sweep", folder="experiments")
    arguments = [argument] if argument else []
    sweep = config_file.call(Path(path), "get_sweep", arguments, returns="a t5g2.sweep.parts.Sweep")
    if not isinstance(sweep, Sweep):
        raise UserError(
            f"get_sweep() of {path} returns {type(sweep).__name__}; it must return a t5g2.sweep.parts.Sweep"
        )
    return sweep


def refuse_other_sweep(sweep: Sweep, folder: Path) -> None:
    """Raises UserError if the sweep.json in a workdir is of another sweep: none of its runs is one of this.

    Runs are alike that have one name and one config; other settings are those of a sweep that was changed. A sweep.json
    that cannot be read is none.
    """
    check = partial(record_files.sweep_record, problems=[])
    there = record_files.read_object(folder / "sweep.json", check, [])
    if there is None:
        return
    ours = {_run_of(part["name"], part["command"]) for part in describe(sweep, folder)["parts"]}
    theirs = {_run_of(part["name"], part["command"]) for part in there["parts"]}
    if ours.isdisjoint(theirs):
        names = ", ".join(part["name"] for part in there["parts"])
        raise UserError(
            f"{folder} is the workdir of another sweep, {there['title']!r}, none of whose runs ({names}) is one of "
            f"this, by name and config; give another --workdir, or, where all configs have changed, remove "
            f"{folder / 'sweep.json'}"
        )


def _run_of(name: str, command: str) -> tuple[str, ...]:
    """Returns a part's name, and its config or the word for its command."""
    _, word, *flags = [*command.split(), "", ""]
    config = next((flag for flag in flags if flag.startswith("--config=")), "")
    return name, word, config


def describe(sweep: Sweep, folder: Path) -> dict[str, Any]:
    """Returns the content of sweep.json, from which the report knows groups, seeds and comparisons."""
    groups = {run.name: part.name for part in sweep.parts if part.seeds is not None for run in expand(part)}
    parts = [
        {
            "name": part.name,
            "kind": type(part).__name__.lower(),
            "command": command_line(part.arguments(folder)),
            "result": str(part.result(folder).relative_to(folder)),
            "after": list(part.after),
        }
        | ({"group": groups[part.name], "seed": part.seed} if part.name in groups else {})
        | ({"scores_of": part.scores_of} if isinstance(part, Step) and part.scores_of else {})
        for part in sweep.ordered()
    ]
    # plain dicts and lists, which JSON can hold
    arms = sweep.compare
    compare = {title: dict(row) for title, row in arms.items()} if isinstance(arms, Mapping) else list(arms)
    paper = asdict(sweep.paper) if sweep.paper else None
    return {"title": sweep.title, "parts": parts, "compare": compare, "paper": paper}
