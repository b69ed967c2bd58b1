"""Tasks of Python files: FILE.py[:ARG], or the name of a file in configs/tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5g2.core import settings
from t5g2.core.errors import UserError, unknown
from t5g2.eval.task_interface import Task
from t5g2.train import config_file
from t5g2.train.experiment import TABLES

FOLDER = Path("configs") / "tasks"


def load(names: Sequence[str]) -> list[Task]:
    """Returns the tasks of files whose get_tasks() returns a list of them, or of dicts as a config has them.

    Args:
      names: "FILE.py", "FILE.py:ARG" or the same with the name of a file in configs/tasks; ARG is the argument of
        get_tasks.

    Raises:
      UserError: there is no such file or name; the file fails, and the message has its line; what it returns is no list
        of tasks; two tasks have one name.
    """
    if not names:
        raise UserError(f"--tasks is empty; give FILE.py[:ARG], or a name of {', '.join(known()) or 'configs/tasks'}")
    tasks = [task for name in names for task in _load(name)]
    all_names = [task.name for task in tasks]
    if twice := sorted({name for name in all_names if all_names.count(name) > 1}):
        raise UserError(f"two tasks have the name {twice[0]!r}, which is the prefix of their scores; give another")
    return tasks


def known() -> dict[str, Path]:
    """Returns the files of configs/tasks by their names: of the working folder, and of the folder of this package."""
    folders = (Path(__file__).parents[2] / FOLDER, FOLDER)
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.py"))}


def _load(text: str) -> list[Task]:
    name, argument = config_file.split(text)
    path = Path(name)
    if path.suffix != ".py" and not path.is_file():
        if name not in known():
            raise unknown("evaluation task", name, known(), where="(a file of configs/tasks, or give FILE.py)")
        path = known()[name]
    if not path.is_file():
        raise UserError(f"no task file {path}; give a Python file with get_tasks()")
    returned: Any = config_file.call(path, "get_tasks", [argument] if argument else [], returns="a list of tasks")
    if not isinstance(returned, list | tuple) or not returned:
        raise UserError(f"get_tasks() of {path} returns {type(returned).__name__}; it must return a list of tasks")
    tasks = []
    for number, node in enumerate(returned):
        where = f"{path}.{number}"
        task = settings.build(Task, node, where=where, tables=TABLES)
        # Python checks no types, and a stop string that is no tuple would be one of each of its characters
        tasks.append(settings.checked_types(task, where=where, tables=TABLES))
    return tasks
