"""Extension of the pages of the API: docstrings, which are plain text, as Markdown that shows the same.

An entry for several names, "low, high: …", becomes one for each, and <start_of_image>, which would be a tag, code.
"""

import re
from typing import Any

from griffe import Extension

ENTRY = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*(?:\n(?P=indent) +\S.*)*)", re.MULTILINE)
CODE_OR_TAG = re.compile(r"(`[^`]*`)|<[^<>\s]+>")


class ShownDocstrings(Extension):
    """Changes every docstring before it is parsed."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called for every class, function and attribute that is read."""
        if obj.docstring is not None:
            text = ENTRY.sub(split, obj.docstring.value)
            obj.docstring.value = CODE_OR_TAG.sub(lambda match: match[1] or f"`{match[0]}`", text)


def split(entry: re.Match) -> str:
    """Returns an entry for each name: "low, high: text" becomes "low: text" and "high: text"."""
    return "\n".join(f"{entry['indent']}{name}: {entry['text']}" for name in entry["names"].split(", "))
