"""HTML from text: every text is escaped in one place, `tag`, so nothing that a run wrote can be read as markup."""

import html
from pathlib import Path

from t5g2.report.text_table import TextTable


class Html(str):
    """Text that is markup already."""


def tag(name: str, *children: str | None, **attributes: str) -> Html:
    """Returns an element; children that are not Html are escaped, None is left out. `kind` becomes the class.

    >>> tag("p", "a < b", tag("b", "!"), kind="quiet")
    '<p class="quiet">a &lt; b<b>!</b></p>'
    """
    inner = "".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children if c is not None)
    # class is a word of Python
    names = {"kind": "class"}
    written = "".join(f' {names.get(k, k)}="{html.escape(v)}"' for k, v in attributes.items())
    return Html(f"<{name}{written}>{inner}</{name}>")


def document(title: str, body: Html, *, styles: tuple[str, ...] = ("page.css",)) -> str:
    """Returns a whole page that loads no other file.

    Args:
      styles: names of CSS files beside this one, whose text is copied into the page.
    """
    css = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in styles)
    head = tag(
        "head",
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'),
        tag("title", title),
        tag("style", Html(css)),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", body), lang="en") + "\n"


def html_table(text: TextTable, *, kind: str = "numbers") -> Html:
    """Returns a table; a wide one scrolls on its own."""
    head = tag("tr", *(tag("th", column) for column in text.columns))
    rows = [tag("tr", *(tag("td", cell) for cell in row)) for row in text.rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows), kind=kind), kind="wide")


def figure(svg: str, caption: str) -> Html:
    """Returns a plot with its caption."""
    return tag("figure", Html(svg), tag("figcaption", caption))
