"""Settings of a task as plain data, by which a rerun tells that it is the same task."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

# longer texts and lists are described by a hash
LONGEST_TEXT, LONGEST_LIST = 200, 32
# under its former path, so that tasks that earlier versions have finished stay finished
FORMER_PATHS = {"t5g2.data.sources.record_templates.RecordList": "t5g2.eval.task_records.RecordList"}

# fields that came later are left out at their defaults, for the same reason
LATER_FIELDS = {"group": ""}


def describe(value: Any) -> Any:
    """Returns plain data that changes with every setting, in any process; long texts and data as their size and hash.

    {"records": (…1000 dicts…)} becomes {"records": "1000 values, sha256 0123456789abcdef"}.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        values = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        fields = {n: describe(v) for n, v in values.items() if n not in LATER_FIELDS or v != LATER_FIELDS[n]}
        path = f"{type(value).__module__}.{type(value).__qualname__}"
        return {"kind": FORMER_PATHS.get(path, path), **fields}
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return f"{len(value)} characters, sha256 {_digest(value)}"
    if isinstance(value, list | tuple) and len(value) > LONGEST_LIST:
        return f"{len(value)} values, sha256 {_digest(value)}"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    return f"{type(value).__qualname__}, sha256 {_digest(value)}"


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()[:16]


def _add(digest: Any, value: Any) -> None:
    """Adds a value to a hash, with its type and its length, so that no two values look alike."""
    if isinstance(value, Mapping):
        items: Any = [part for pair in value.items() for part in pair]
    elif isinstance(value, list | tuple):
        items = value
    else:
        data = _data(value)
        digest.update(f"{type(value).__qualname__} {len(data)} ".encode() + data)
        return
    digest.update(f"{type(value).__qualname__} {len(items)} ".encode())
    for item in items:
        _add(digest, item)


def _data(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}".encode() + value.tobytes()
    if hasattr(value, "tobytes"):  # an image of Pillow
        return f"{getattr(value, 'mode', '')}{getattr(value, 'size', '')}".encode() + value.tobytes()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return repr(describe(value)).encode()
    # a function has an address in its repr, which is another one in every process
    return getattr(value, "__qualname__", repr(value)).encode()
