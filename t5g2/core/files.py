"""Files and folders that are complete or absent: atomic writes, locks, and JSON that is checked when it is read.

Everything is written under a temporary name beside its target, and renamed when it is complete: a file under
`.NAME.<boot>-<random>.part`, a folder under `.NAME.<boot>-<random>.tmp`, so that neither processes nor machines that
share a folder meet. A process that is killed leaves the old file or none, never half of one. What it leaves under a
temporary name may be removed; a later writer of the same folder does so.
"""

import contextlib
import errno
import fcntl
import functools
import glob
import json
import logging
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from t5g2.core.errors import UserError

log = logging.getLogger(__name__)

# first bytes of a pointer (github.com/git-lfs/git-lfs, docs/spec.md)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PART, PART_OF_FOLDER = ".part", ".tmp"
# the boot in a temporary name; those of earlier versions have none
TEMPORARY = re.compile(r"\.([0-9a-f]{8})-[0-9a-f]{16}\.[a-z]+$")
# what another machine has left under a temporary name and not changed for so long, nobody writes to
ABANDONED_SECS = 24 * 3600
# larger than any JSON of this project or of a model's folder (a tokenizer of 262,144 tokens has 33 MB), and deeper
MAX_JSON_BYTES, MAX_JSON_DEPTH = 1 << 28, 100
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def cache_folder() -> Path:
    """Returns the folder of caches, which all runs on a machine share: compiled programs, plain copies, tokens, images.

    It is T5G2_CACHE; else t5g2 in XDG_CACHE_HOME or ~/.cache. A ~ in them, which a shell has left, is the user's home.

    Raises:
      UserError: none of these exists, because the user has no home.
    """
    own, caches = (os.environ.get(name) for name in ("T5G2_CACHE", "XDG_CACHE_HOME"))
    try:
        return Path(own).expanduser() if own else Path(caches or Path.home() / ".cache").expanduser() / "t5g2"
    except RuntimeError:
        raise UserError("this user has no home for caches; set T5G2_CACHE to a folder that runs can share") from None


def cache_hint(path: str | os.PathLike) -> str:
    """Returns what to add to a message about a path in the folder of caches, which few have named; else ""."""
    with contextlib.suppress(UserError, OSError):  # no home, or no working folder
        if Path(os.path.abspath(path)).is_relative_to(os.path.abspath(cache_folder())):
            return ". It is in the folder of caches: set T5G2_CACHE to one that can be written"
    return ""


def refuse_existing(path: str | os.PathLike) -> None:
    """Raises UserError if the path exists, or nothing can be there; call it before the work whose result it gets."""
    if Path(path).exists():
        raise already_exists(Path(path))
    if not _nearest(Path(path)).is_dir():
        raise _cannot_be_made(Path(path))


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, unless they are there.

    Raises:
      UserError: something that is no folder is in the place of one, or the folder above takes none (/proc).
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError):
        raise _cannot_be_made(path) from None


def _cannot_be_made(path: Path) -> UserError:
    nearest = _nearest(path)
    problem = "takes no folder" if nearest.is_dir() else "is in the way, and is no folder"
    return UserError(f"{path.absolute()} cannot be made: {nearest} {problem}; give another path{cache_hint(path)}")


def _nearest(path: Path) -> Path:
    """Returns the path itself, or the nearest above it that is there, a dangling link too."""
    return next(part for part in (path.absolute(), *path.absolute().parents) if os.path.lexists(part))


def already_exists(path: Path) -> UserError:
    """Returns the error for an output path that exists."""
    return UserError(f"{path.absolute()} exists already and is not overwritten; give another one, or remove it")


@contextlib.contextmanager
def naming(target: Path) -> Iterator[None]:
    """Adds the path to an error of the operating system that names no file, as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(target)
        raise


@contextlib.contextmanager
def replacing(target: Path, *, named: Callable[[], str] | None = None) -> Iterator[Path]:
    """Yields a path to write a file to, which becomes `target` when the block ends; if it fails, nothing changes.

    Any number of processes and machines may write the same target at the same time; the last one counts. The folder
    of the target is made if it is missing. What writers that were killed have left of the same target is removed.

    Args:
      named: called when the block has ended; returns the name that the file gets instead of the target's, for a file
        that is named after its content.
    """
    make_folder(target.parent)
    remove_abandoned(target.parent, f".{glob.escape(target.name)}.*{PART}")
    part = temporary(target, PART)
    handle = _create_locked(part)
    try:
        with naming(target):
            yield part
            _sync(part)
            os.replace(part, target if named is None else target.with_name(named()))
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """Yields a folder to write into, renamed to `directory` when the block ends; if it fails, nothing is left.

    Raises:
      UserError: at the end of the block, `directory` exists: another process has written it meanwhile.
    """
    part = temporary(directory, PART_OF_FOLDER)
    make_folder(part)
    # the lock tells other writers on this machine that the folder is not abandoned
    with locked(part):
        remove_abandoned(directory.parent, f".{glob.escape(directory.name)}.*{PART_OF_FOLDER}")
        # of earlier versions, which had one name for all
        shutil.rmtree(directory.with_name(f".{directory.name}{PART_OF_FOLDER}"), ignore_errors=True)
        try:
            with naming(directory):
                yield part
                for path in (*part.rglob("*"), part):
                    _sync(path)
                part.rename(directory)
        except BaseException as error:
            shutil.rmtree(part, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise already_exists(directory) from None
            raise


def temporary(target: Path, ending: str) -> Path:
    """Returns a path beside `target` that no other process on any machine has; its name tells this machine's boot."""
    return target.with_name(f".{target.name}.{_boot()}-{uuid.uuid4().hex[:16]}{ending}")


@functools.cache
def _boot() -> str:
    """Returns 8 hex digits that the containers of this machine share until it is started again."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:  # not Linux
        text = f"{uuid.getnode():x}"
    return text.replace("-", "")[:8].ljust(8, "0")


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Removes files and folders with temporary names that nobody writes to any more.

    Locks tell that on this machine, whose containers share them; elsewhere, the time of the last change does.

    Args:
      pattern: pattern of the temporary names.
    """
    for path in folder.glob(pattern):
        boot = TEMPORARY.search(path.name)
        is_elsewhere = boot is not None and boot[1] != _boot()
        with contextlib.suppress(OSError):  # another process has removed it
            if not is_elsewhere or time.time() - path.stat().st_mtime >= ABANDONED_SECS:
                _remove_unlocked(path, needs_lock=not is_elsewhere)


def _remove_unlocked(path: Path, *, needs_lock: bool) -> None:
    """Removes a file or folder that nobody has locked; where there are no locks, only if it needs none."""
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if needs_lock or isinstance(error, BlockingIOError):
                return
        # while the lock is held, so that a writer that has just made it sees that it is gone
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    finally:
        os.close(handle)


def _create_locked(part: Path) -> int:
    """Makes a file and locks it, which tells other writers that it is not abandoned; returns the descriptor."""
    while True:
        handle = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks, where no other writer removes it
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk, so that no mark that is written later can survive it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, whole or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line, whole or not at all."""
    write_text(path, "".join(map(json_line, rows)))


def json_line(row: Mapping[str, Any]) -> str:
    """Returns an object as a line of JSON."""
    # not ASCII alone, so that people can read the texts
    return json.dumps(row, ensure_ascii=False) + "\n"


def refuse_lfs_pointer(path: Path) -> None:
    """Raises UserError if the file is a pointer of Git LFS, which stands for the content until that is pulled."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise lfs_pointer(path)


def lfs_pointer(path: Path) -> UserError:
    """Returns the error for a file that is a pointer of Git LFS."""
    return UserError(
        f"{path} is a pointer of Git LFS, without the content; run `git lfs pull` in {path.parent}, or download it"
    )


def read_json(path: Path, *, fix: str) -> Any:
    """Returns the value in a JSON file.

    Args:
      fix: remedy if the file is damaged; the end of the message.

    Raises:
      UserError: the file is not JSON, has over MAX_JSON_BYTES, or is a folder.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a JSON file; {fix}") from None
    try:
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB")
        return parse_json(text)
    except ValueError as error:
        if text.startswith(LFS_POINTER):
            raise lfs_pointer(path) from None
        raise UserError(f"{path} is not JSON ({error}); {fix}") from None


def read_json_object(path: Path, *, fix: str) -> dict[str, Any]:
    """Returns the object in a JSON file; `fix` as in read_json.

    Raises:
      UserError: the file is not JSON, or its value is not an object.
    """
    value = read_json(path, fix=fix)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not an object; {fix}")
    return value


def parse_json(text: bytes) -> Any:
    """Parses untrusted JSON, more strictly than `json.loads`: UTF-8, no name twice in an object, finite numbers.

    A byte order mark, which some editors write, is left out.

    Raises:
      ValueError: the text breaks one of these rules, or is nested deeper than MAX_JSON_DEPTH.
    """
    decoded = text.decode("utf-8-sig")
    value = _loads(
        decoded,
        object_pairs_hook=_object_of_unique_names,
        parse_constant=_refuse_constant,
        parse_int=_parse_int,
        parse_float=_parse_finite,
    )
    # names are checked when their object is read; only an escape can make a surrogate of UTF-8
    if "\\ud" in decoded or "\\uD" in decoded:
        for level in _levels(value):
            if broken := next((item for item in level if isinstance(item, str) and not _printable(item)), None):
                raise ValueError(f"{_quoted(broken)} is not text")
    return value


def parse_record(text: str) -> Any:
    """Parses a record of someone else's data, in which other fields than those that are read may be anything.

    Raises:
      ValueError: the text is not JSON as Python reads it (NaN and repeated names pass), or is nested deeper than
        MAX_JSON_DEPTH.
    """
    return _loads(text)


def _loads(text: str, **rules: Any) -> Any:
    """Returns `json.loads` of a text that is nested at most MAX_JSON_DEPTH deep, whatever the interpreter can read."""
    too_deep = f"nested too deeply, over {MAX_JSON_DEPTH} levels"
    try:
        value = json.loads(text, **rules)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise ValueError(too_deep) from None
    # a text with few brackets needs no walk, and that is nearly every record
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH and sum(1 for _ in _levels(value)) > MAX_JSON_DEPTH + 1:
        raise ValueError(too_deep)
    return value


def _levels(value: Any) -> Iterator[list[Any]]:
    """Yields the values of a JSON document by their depth: itself, its entries, theirs, …"""
    level = [value]
    while level:
        yield level
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]


@contextlib.contextmanager
def locked(path: Path, *, busy: str | None = None, on_wait: Callable[[], None] | None = None) -> Iterator[int]:
    """Holds an exclusive lock on a file or folder, and yields its file descriptor.

    The lock ends with the block, or with the process if that is killed.

    Args:
      path: a folder that exists, or a file, which is made if it is missing.
      busy: message of the error if another process holds the lock; None = wait for the lock.
      on_wait: called before waiting.

    Raises:
      UserError: another process holds the lock and `busy` is not None.
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
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning("%s is on a file system without locks (%s): take care that one run uses it", path, error)
        yield handle
    finally:
        os.close(handle)


def _printable(text: str) -> bool:
    """False for a string with an unpaired surrogate, which JSON can escape and UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _object_of_unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    broken = next((name for name in value if not _printable(name)), None)
    if broken is not None:
        raise ValueError(f"{_quoted(broken)} is not text")
    # a second value would silently replace the first
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
    # longer than any number in this project's formats, and slow to convert
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
