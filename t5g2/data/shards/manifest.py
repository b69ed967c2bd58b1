"""The description of a folder of shards: what is in them, or, of an unfinished folder, what is going to be."""

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

from t5g2.core.errors import UserError


def read(file: Path, *, keys: Set[str], command: str) -> dict[str, Any]:
    """What a description says; its shards are names, or have a "file" and its "bytes".

    Args:
      keys: what it must have.
      command: that makes it.

    Raises:
      UserError: it is damaged.
    """
    try:
        said = json.loads(file.read_text())
        whole = said.keys() >= keys and all(isinstance(s, str) or s.keys() >= {"file", "bytes"} for s in said["shards"])
    except (ValueError, TypeError, AttributeError):
        whole, said = False, {}
    if not whole:
        raise UserError(
            f"{file.absolute()} is damaged: it does not say what is in its folder; remove the folder, and run the same "
            f"`{command}` again"
        )
    return said
