"""Text of data, keys and messages as a terminal may be given it."""

import re

# All control characters but tab and line feed; marks that reverse the direction of the text after them; and lone
# surrogates, which cannot be encoded.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    r"""Returns a text with its control characters as escapes, which would move the cursor or change colours and titles.

    >>> escaped("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
