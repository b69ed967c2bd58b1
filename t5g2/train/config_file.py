"""Config files: Python files whose get_config() returns the settings of an experiment."""

import difflib
import inspect
import os
import runpy
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from t5g2.core import paths, settings
from t5g2.core.errors import UserError
from t5g2.train.experiment import Experiment, build
from t5g2.train.former_names import current_keys, current_path, former_modules

# folders that configs were read from in this process, which sys.path has because of them
_config_folders: list[str] = []


def load(config: str, overrides: Iterable[tuple[str, str]] = ()) -> Experiment:
    """Returns the experiment of "FILE[:ARG]" with (dotted path, text) overrides applied.

    Raises:
      UserError: the file does not exist or fails; an unknown key (the message has the nearest), a wrong type, settings
        that exclude each other.
    """
    node = current_keys(read(config))
    for path, text in overrides:
        settings.override(node, current_path(path), paths.expand_home(text))
    return build(node)


def read(config: str) -> dict[str, Any]:
    """Returns the settings that get_config of "FILE[:ARG]" returns, as plain dicts and lists."""
    name, argument = split(config)
    path = Path(name)
    if not path.is_file():
        raise no_such_file("config", name, "get_config", folder="configs")
    config_dict = call(path, "get_config", [argument] if argument else [], returns="a ConfigDict")
    if not hasattr(config_dict, "items"):
        raise UserError(f"get_config() of {name} returns {type(config_dict).__name__}; it must return a ConfigDict")
    return _plain(config_dict)


def no_such_file(kind: str, name: str, function: str, *, folder: str) -> UserError:
    """Returns the error for a missing file, with the nearest one beside it or in the folder of its kind."""
    path = Path(name)
    candidates = {file.name: file for place in (Path(folder), path.parent) for file in place.glob("*.py")}
    near = difflib.get_close_matches(path.name, candidates)
    hint = (
        f"did you mean {candidates[near[0]]}?" if near else f"give the path of a Python file that defines {function}()"
    )
    return UserError(f"no {kind} file {name}; {hint}")


def split(config: str) -> tuple[str, str]:
    """Returns (FILE, ARG) of "FILE[:ARG]"; a file's name and the argument may have colons themselves."""
    config = paths.expand_home(config)
    colons = [place for place, character in enumerate(config) if character == ":"]
    ends = [end for end in (len(config), *reversed(colons)) if Path(config[:end]).is_file()]
    end = ends[0] if ends else min(colons, default=len(config))
    return config[:end], config[end + 1 :]


def call(path: Path, name: str, arguments: Sequence[str] = (), *, returns: str) -> Any:
    """Runs a Python file, calls its function `name` and returns the result.

    Args:
      returns: the kind of result, for messages.

    Raises:
      UserError: the file is not Python, has no such function, or fails; the message has the line.
    """
    try:
        with former_modules():
            _add_neighbours(path)
            function = runpy.run_path(str(path)).get(name)
            if not callable(function):
                raise UserError(f"{path} has no {name}(); define one that returns {returns}")
            # bound first, so that a wrong number of arguments is not taken for an error inside the function
            signature = inspect.signature(function)
            try:
                signature.bind(*arguments)
            except TypeError:
                only = "the text after the ':' of FILE:ARG is its only argument"
                fix = (
                    only if signature.parameters else f"the file takes no argument; leave out ':{':'.join(arguments)}'"
                )
                given = ", ".join(arguments) or "nothing"
                raise UserError(f"{name}{signature} of {path} was called with {given}; {fix}") from None
            return function(*arguments)
    except UserError:
        raise
    except SystemExit as error:
        raise UserError(f"{path} ends the program, with {error.code!r}; take out its call of exit()") from error
    except Exception as error:  # a user's code can fail in any way
        # the last line of the user's own file, not of a library that it calls
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = f", line {error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else '?'}"
        text = error.msg if isinstance(error, SyntaxError) else error
        raise UserError(
            f"{path}{line}: {type(error).__name__}: {text}; give a Python file whose {name}() returns {returns}"
        ) from error


def _add_neighbours(path: Path) -> None:
    """Lets a file import modules beside it and in the working folder, after those that are installed.

    The folders stay, because what was imported may import more later, in the processes of data workers too. A module
    of another config's folder does not stand for one of the same name beside this file.
    """
    folder = path.absolute().parent
    others = [other for other in _config_folders if other != str(folder)]
    # the few files of the folder, not the thousands of modules
    for neighbour in folder.glob("*.py") if others else ():
        file = getattr(sys.modules.get(neighbour.stem), "__file__", None)
        if file and os.path.dirname(file) in others:
            del sys.modules[neighbour.stem]
    sys.path[:] = [entry for entry in sys.path if entry not in others]
    for entry in (str(folder), *others, str(Path.cwd())):
        if entry not in sys.path:
            sys.path.append(entry)
            _config_folders[:] = dict.fromkeys([*_config_folders, entry])


def _plain(node: Any) -> Any:
    # a ConfigDict is not a Mapping, but has items() like one
    if hasattr(node, "items"):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, str):
        return paths.expand_home(node)
    return [_plain(item) for item in node] if isinstance(node, list | tuple) else node
