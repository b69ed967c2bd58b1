"""Paths as users write them: with ~, and several separated by commas."""

import os


def expand_home(text: str) -> str:
    """Returns a text that begins with ~/ as a path in the user's home, which a shell does only at the start of a word.

    Any other text is returned unchanged.
    """
    return os.path.expanduser(text) if text.startswith("~/") else text


def split(text: str) -> list[str]:
    """Returns paths that are separated by commas; a comma in the name of a path that exists separates nothing.

    With a folder "a,b" and none "a,b,c":  "a,b,c" -> ["a,b", "c"].
    """
    parts, paths = text.split(","), []
    while parts:
        # the longest first, so that "a,b" is one path even where there is an "a"
        lengths = range(len(parts), 0, -1)
        joined = (expand_home(",".join(parts[:length])) for length in lengths)
        length, path = next(
            (n, path) for n, path in zip(lengths, joined, strict=True) if n == 1 or os.path.exists(path)
        )
        paths.append(path)
        parts = parts[length:]
    return paths
