"""JSON records of a checkpoint, each with a digest of its contents."""

import hashlib
import json
from typing import Any


def require_json(name: str, value: Any) -> Any:
    """Returns the value of a record if JSON keeps it as it is.

    Raises:
      TypeError: JSON would change it.
    """
    if json.loads(json.dumps(value)) != value:
        raise TypeError(f"{name} would change in JSON: {value!r}; use str keys, lists and plain numbers")
    return value


def seal(body: Any) -> dict[str, Any]:
    """Returns a record: the body and its digest."""
    return {"sha256": digest(body), "body": body}


def unseal(record: Any) -> Any:
    """Returns the body of a record.

    Raises:
      ValueError: its contents have changed since it was sealed.
    """
    if digest(record["body"]) != record["sha256"]:
        raise ValueError("the contents have changed")
    return record["body"]


def digest(body: Any) -> str:
    """Returns the SHA-256 of plain data in hex, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
