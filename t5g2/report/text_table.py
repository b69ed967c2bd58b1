"""Tables of text, for Markdown and the terminal."""

from typing import NamedTuple

from t5g2.core import logs

NONE = "–"


class TextTable(NamedTuple):
    """Text in columns; the first holds names, the others numbers."""

    columns: list[str]
    rows: list[list[str]]

    def lines(self) -> list[str]:
        """Returns the table as Markdown that is also aligned for a terminal."""
        cells = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        # Markdown aligns a column to the right by a colon
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        return [
            "| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |"
            for row in (self.columns, rule, *self.rows)
        ]


def score(value: float) -> str:
    """Formats a score of any size: 0.812, 12.3k of FLOPs, 0.00123 of seconds."""
    small = 0 < abs(value) < 0.01
    return amount(value) if abs(value) >= 1e5 else f"{value:.3g}" if small else f"{value:.3f}"


def amount(value: float) -> str:
    """Formats a large number to three digits: 12.3k."""
    return logs.short(value)
