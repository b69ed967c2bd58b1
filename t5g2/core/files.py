"""Files and folders that are whole or absent: atomic writes, locks, and JSON that is checked when it is read.

Everything is written under a temporary name beside its target, `.NAME.<random>.part`, and renamed when it is complete,
so a process that is killed leaves the old file or none, never half of one. What ends in `.part` may be removed.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from t5g2.core.errors import UserError

PART = ".part"


def cache_folder() -> Path:
    """The folder for what is made once per machine: T5G2_CACHE, or ~/.cache/t5g2."""
    return Path(os.environ.get("T5G2_CACHE") or Path.home() / ".cache" / "t5g2")


def refuse_existing(path: str | os.PathLike) -> None:
    """Raises UserError if the path exists; called before the work whose result is written there."""
    if Path(path).exists():
        raise already_exists(Path(path))


def already_exists(path: Path) -> UserError:
    """The error for an output path that exists."""
    return UserError(f"{path.absolute()} exists already and is not overwritten; give another one, or remove it")


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write a file to, which becomes `target` when the block ends; if the block fails, nothing changes.

    The name is random, so processes that write the same target at the same time do not disturb each other. The folder
    of the target is made if it is missing.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.urandom(4).hex()}{PART}")
    try:
        yield part
        os.replace(part, target)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """A folder to write into, renamed to `directory` when the block ends; if the block fails, nothing is left."""
    part = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(directory)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, whole or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path, *, fix: str) -> Any:
    """The value in a JSON file.

    Args:
      fix: what the user should do if the file is damaged; ends the message.

    Raises:
      UserError: the file is not JSON.
    """
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); {fix}") from None


def read_json_object(path: Path, *, fix: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: the file is not JSON, or holds something else than an object.
    """
    value = read_json(path, fix=fix)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not an object; {fix}")
    return value


def parse_json(text: bytes) -> Any:
    """Plain data from untrusted JSON, stricter than `json.loads`: UTF-8, no name twice in an object, finite numbers.

    Raises:
      ValueError: the text breaks one of these rules, or is nested too deeply.
    """
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object_of_unique_names,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
            parse_float=_parse_finite,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


@contextlib.contextmanager
def locked(path: Path, *, busy: str | None = None, on_wait: Callable[[], None] | None = None) -> Iterator[int]:
    """Holds an exclusive lock on a file or folder, which ends with the process; gives its file descriptor.

    Args:
      path: a folder that exists, or a file, which is made if it is missing.
      busy: the error if another process holds the lock; None = wait for it.
      on_wait: called before waiting.

    Raises:
      UserError: another process holds the lock and `busy` is given.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if busy is not None:
                raise UserError(busy) from None
            if on_wait is not None:
                on_wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def printable(text: str) -> bool:
    """False for a string with half a surrogate pair, which JSON can spell and nothing can print."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _object_of_unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    broken = next((name for name in value if not printable(name)), None)
    if broken is not None:
        raise ValueError(f"{_quoted(broken)} is not text")
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{_quoted(twice)} appears twice")
    return value


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _parse_int(text: str) -> int | float:
    if text == "-0":
        return -0.0  # a float, as in every other language's JSON
    if len(text) > 32:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _parse_finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{_quoted(text)} is too large a number")
    return number


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
