""""""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from t5g2.core.errors import UserError
from t5g2.sweep.parts import Sweep, command_line, expand
from t5g2.train import config_file


def load(path: str | os.PathLike) -> Sweep:
    """The sweep of a file. Raises UserError: no such file, no get_sweep(), or it returns something else."""
    if not Path(path).is_file():
        raise UserError(f"no sweep file {path}; give the path of a Python file that defines get_sweep()")

    made = config_file.call(Path(path), "get_sweep", returns="a t5g2.sweep.parts.Sweep")
    if not isinstance(made, Sweep):
        raise UserError(f"get_sweep() of {path} returns {type(made).__name__}; it must return a t5g2.sweep.parts.Sweep")
    return made


def describe(sweep: Sweep, folder: Path) -> dict[str, Any]:
    """sweep.json, which the report reads."""
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
        for part in sweep.ordered()
    ]
    of = sweep.compare
    compare = {title: dict(arms) for title, arms in of.items()} if isinstance(of, Mapping) else list(of)
    paper = asdict(sweep.paper) if sweep.paper else None
    return {"title": sweep.title, "parts": parts, "compare": compare, "paper": paper}
