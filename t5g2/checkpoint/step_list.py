"""Lists the steps of a folder of checkpoints, from which another process removes some, and of which one is damaged."""

import time
from collections.abc import Callable
from typing import Any

from etils import epath

from t5g2.core import files
from t5g2.core.errors import UserError

# written by Orbax into each step: handlers and times, none of which is needed to restore
METADATA = "_CHECKPOINT_METADATA"
KINDS: dict[str, type | tuple[type, ...]] = {
    "item_handlers": (dict, str, type(None)),
    "metrics": (dict, type(None)),
    "performance_metrics": (dict, type(None)),
    "init_timestamp_nsecs": (int, type(None)),
    "commit_timestamp_nsecs": (int, type(None)),
    "custom_metadata": (dict, type(None)),
}


def listed(directory: epath.Path, listing: Callable[[], Any], *, tries: int = 100) -> Any:
    """Returns listing(), called again where a step was removed by another process between its name and its contents.

    Raises:
      UserError: the metadata that Orbax reads of each step is damaged; Orbax's own error names no step.
      FileNotFoundError, NotADirectoryError: every try failed, so it is something else that is missing.
    """
    try:
        for _ in range(tries - 1):
            try:
                return listing()
            except (FileNotFoundError, NotADirectoryError):
                # the step that was listed is gone, or going, so the next list is shorter
                time.sleep(0.01)
        return listing()
    except (ValueError, TypeError, AttributeError, RecursionError):
        damaged = [str(file) for file in sorted(directory.glob(f"*/{METADATA}")) if not _is_metadata(file)]
        if not damaged:
            raise
        raise UserError(
            f"{', '.join(damaged)} is damaged; it holds nothing that is needed: remove it, and run the same command "
            f"again"
        ) from None


def _is_metadata(file: epath.Path) -> bool:
    """True if Orbax can use the file: an object whose entries have the types of KINDS."""
    try:
        value = files.parse_json(file.read_bytes())
    except ValueError:
        return False
    return isinstance(value, dict) and all(isinstance(value.get(key), kinds) for key, kinds in KINDS.items())
