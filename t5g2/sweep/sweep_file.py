"""Sweep files: Python files whose get_sweep() returns a Sweep; and sweep.json, its description for the report."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from t5g2.core.errors import UserError
from t5g2.sweep.parts import Step, Sweep, command_line, expand
from t5g2.train import config_file


def load(sweep_file: str | os.PathLike) -> Sweep:
    """Returns the sweep of "FILE[:ARG]"; ARG, such as a size, is what get_sweep is called with.

    Raises:
      UserError: the file does not exist, has no get_sweep(), takes no argument or another one, or returns something
        else.
    """
    path, argument = config_file.split(os.fspath(sweep_file))
    if not Path(path).is_file():
        raise UserError(f"no sweep file {path}; give the path of a Python file that defines get_sweep()")
    arguments = [argument] if argument else []
    sweep = config_file.call(Path(path), "get_sweep", arguments, returns="a t5g2.sweep.parts.Sweep")
    if not isinstance(sweep, Sweep):
        raise UserError(
            f"get_sweep() of {path} returns {type(sweep).__name__}; it must return a t5g2.sweep.parts.Sweep"
        )
    return sweep


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
