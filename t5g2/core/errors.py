"""The one error a user can cause, and how it is worded: what was given, what is allowed, what to do."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The input of a command is wrong: the command ends with exit status 2 and this message, without a traceback."""


def unknown(what: str, given: str, allowed: Iterable[str]) -> UserError:
    """An error for a name that does not exist, with the closest names that do.

    >>> str(unknown("objective", "ul3", ["causal", "ul2"]))
    "unknown objective 'ul3'; did you mean 'ul2'? Allowed: causal, ul2"
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    return UserError(f"unknown {what} {given!r}{hint} Allowed: {', '.join(names)}")
