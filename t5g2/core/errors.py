"""The error for wrong user input; its message names the input, the allowed values and the remedy."""

import difflib
import errno
from collections.abc import Iterable

# Errors of the operating system that do not depend on the contents of files, each with its remedy.
OS_ERRORS = {
    errno.EACCES: "give this user the right to it, or another path",
    errno.EPERM: "give this user the right to it, or another path",
    errno.EROFS: "give a path that can be written",
    errno.ENOSPC: "make room, or give a path on another disk",
    errno.EDQUOT: "make room, or give a path on another disk",
    errno.EFBIG: "allow larger files (ulimit -f), or give another path",
}


class UserError(ValueError):
    """Wrong input of a command, which then prints the message without a traceback and ends with exit status 2."""


def unknown(kind: str, name: str, allowed: Iterable[str], *, where: str = "") -> UserError:
    """Returns the error for a name that is not allowed, with the closest allowed ones.

    Args:
      kind: the noun for such a name: "objective".
      where: the place of the name, with its preposition: "of t5g2 check".

    >>> str(unknown("objective", "ul3", ["causal", "ul2"]))
    "unknown objective 'ul3'; did you mean 'ul2'? Allowed: causal, ul2"
    >>> str(unknown("flag", "--confg", ["--config"], where="of t5g2 check"))
    "unknown flag '--confg' of t5g2 check; did you mean '--config'? Allowed: --config"
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    return UserError(f"unknown {kind} {name!r}{where and ' ' + where}{hint} Allowed: {', '.join(names)}")
