"""The words of the commands of parts: texts that are filled in, and values as flags spell them."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5g2.core import settings


def plain(value: Any) -> Any:
    """Returns a value whose numbers and arrays of NumPy are Python's numbers and lists."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


def flag_text(value: Any) -> str:
    """Returns the text of a flag that is parsed to `value` again."""
    # a text such as "1" would be parsed to a number, so it is quoted
    return value if isinstance(value, str) and settings.parse(value) == value else repr(value)


def fill(text: str, folder: Path, seed: int | None) -> str:
    """Replaces {sweep} and {seed} in a text by the sweep's workdir and the seed."""
    text = text.replace("{sweep}", str(folder))
    return text if seed is None else text.replace("{seed}", str(seed))


def command_line(arguments: Sequence[str]) -> str:
    """Returns the `t5g2` command, quoted for a shell."""
    return shlex.join(["t5g2", *arguments])
