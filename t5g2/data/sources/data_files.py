"""The files that a path stands for: a file, a folder, a pattern or a URL.

Data folders also hold files that are no data, which are left aside and listed in the log: hidden files, empty ones, the
marks and tables of Spark, Hadoop and Databricks, checksums, and, at the top of a folder, README and LICENSE. A path
that names such a file, as a whole or by a pattern with some of its letters ("*.md"), reads it.
"""

import fnmatch
import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from t5g2.core.errors import UserError
from t5g2.core.logs import log
from t5g2.data.sources import local_copies

NO_DATA = ("_SUCCESS", "_committed_*", "_started_*", "_metadata", "_common_metadata", "*.crc", "*.md5", "*.sha256")
NO_DATA_AT_TOP = ("README", "README.*", "LICENSE", "LICENSE.*", "MD5SUMS*", "SHA*SUMS*")
NO_DATA_FOLDERS = ("_temporary", "_delta_log", "_spark_metadata")
# formats of which no file is empty, so that an empty one is damaged and not to be left out in silence
NEVER_EMPTY = re.compile(r"\.(parquet|array_?record|tar)(\W|$)")
GIVE = "give a file, a folder with files, or a pattern such as 'corpus/**/part-*'"


def find_files(path: str) -> list[str]:
    """Returns the files that a path, a pattern or a URL stands for, sorted.

    Raises:
      UserError: there are no files, or a folder cannot be listed.
    """
    if local_copies.is_url(path):
        sizes, base = local_copies.remote_files(path)
        return _data_files(path, list(sizes), base, sizes.__getitem__)
    if not path:
        raise UserError(f"path is empty; {GIVE}")
    if Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        names, base = _files_below(path), path
    else:
        # a pattern that is not all wildcards chooses by name, and nothing is left aside but what is empty
        names = _matching(path)
        base = str(Path(path).parent) if set(Path(path).name) <= {"*"} else None
    names = list(names)
    _refuse_dangling(names, base)
    files = [name for name in names if Path(name).is_file()]
    if not files:
        raise UserError(f"no file at {path!r}; {GIVE}{_escaping_hint(path)}")
    return _data_files(path, files, base, os.path.getsize)


def _data_files(path: str, names: Sequence[str], base: str | None, size: Callable[[str], int]) -> list[str]:
    """Returns the files that hold data, sorted; all, if none of them does.

    Args:
      base: folder of which all files are meant; None = they are chosen by their names.
    """
    kept = [
        name
        for name in names
        if not (base is not None and _is_no_data(name, base)) and (size(name) or NEVER_EMPTY.search(name))
    ]
    if len(kept) < len(names) and kept:
        aside = sorted(name[len(base or "") :].lstrip("/") for name in set(names) - set(kept))
        shown = ", ".join(aside[:5]) + (f" and {len(aside) - 5} more" if len(aside) > 5 else "")
        log.info("%s: %d files that are empty or no data are left aside: %s", path, len(aside), shown)
    return sorted(kept or names)


def _is_no_data(name: str, base: str) -> bool:
    *folders, file = PurePosixPath(name[len(base) :].strip("/")).parts
    patterns = NO_DATA if folders else NO_DATA + NO_DATA_AT_TOP
    return (
        file.startswith(".")  # which the patterns of fsspec match, unlike glob's
        or any(folder in NO_DATA_FOLDERS for folder in folders)
        or any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)
    )


def _matching(pattern: str) -> Iterator[str]:
    """Yields the names that match a pattern, as glob does, where ** enters no loop of links and no hidden folder."""
    start, *rest = re.split(r"(?:^|(?<=/))\*\*(?:/|$)", pattern, maxsplit=1)
    if not rest:
        yield from glob.iglob(pattern)
        return
    below = rest[0] or "*"
    for root in glob.iglob(start) if start else [""]:
        found = (name for folder, _ in _walk(root) for name in _matching(os.path.join(glob.escape(folder), below)))
        yield from dict.fromkeys(found)


def _files_below(folder: str) -> Iterator[str]:
    """Yields the files below a folder, hidden ones aside."""
    for parent, names in _walk(folder):
        yield from (os.path.join(parent, name) for name in names if not name.startswith("."))


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yields each folder below one, itself included, with the names in it; "" is the working folder.

    Links to folders are followed, unless they lead to a folder above them. Hidden folders are left aside.

    Raises:
      UserError: a folder cannot be listed; glob would leave its files out without a word.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}); make it readable, or remove it")

    for parent, folders, names in os.walk(folder or ".", followlinks=True, onerror=refuse):
        # assigned in place, because os.walk descends into what is left in the list
        folders[:] = [n for n in folders if not n.startswith(".") and not _leads_above(os.path.join(parent, n))]
        yield parent if folder else os.path.relpath(parent).removeprefix("."), names


def _leads_above(folder: str) -> bool:
    """True if a folder is a link to one that holds it, where its files are found again."""
    if not os.path.islink(folder):
        return False
    target, place = os.path.realpath(folder), os.path.realpath(os.path.dirname(folder))
    return os.path.commonpath([target, place]) == target


def _refuse_dangling(names: Sequence[str], base: str | None) -> None:
    """Raises UserError if a data file is a link to nothing: its texts would be missing without a word."""
    for name in names:
        if os.path.islink(name) and not os.path.exists(name) and not (base is not None and _is_no_data(name, base)):
            raise UserError(
                f"{name} is a link to {os.readlink(name)}, which does not exist; get the file, or remove the link"
            )


def _escaping_hint(path: str) -> str:
    """Returns a hint for a pattern with the name of a folder or file that has one of the pattern's characters in it."""
    parts = Path(path).parts
    for i in range(len(parts)):
        start = Path(*parts[: i + 1])
        if glob.has_magic(parts[i]) and start.exists():
            return f". {start} exists, and its name is read as a pattern: write {glob.escape(str(start))!r} instead"
    return ". In a pattern, [ begins a set of characters: write [[] for the character" if "[" in path else ""
