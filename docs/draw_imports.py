"""Draws docs/imports.svg, the folders of t5g2 and who imports whom, from docs/imports.toml.

    python docs/draw_imports.py        (or: make imports)

A folder stands below all that import it, so every arrow goes down. An import is drawn if no other arrows lead there;
else it is in the small print of its box.
"""

import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).parent
WIDTH, HEIGHT, ROW = 224, 58, 104
# the centre of each box, in pixels; its row follows from the table
X = {
    "cli": 350,
    "commands": 350,
    "jobs": 600,
    "sweep": 350,
    "report": 350,
    "train": 350,
    "api": 850,
    "adapt": 350,
    "checkpoint": 600,
    "eval": 850,
    "objectives": 125,
    "models": 600,
    "data": 850,
    "core": 600,
}
# where arrows leave a box that stand aside: they pass beside the boxes below it
LEAVE = {("train", "objectives"): -100}

Table = dict[str, set[str]]


def read() -> Table:
    """Returns {folder: what it imports}."""
    return {name: set(others) for name, others in tomllib.loads((DOCS / "imports.toml").read_text()).items()}


def rows(table: Table) -> list[list[str]]:
    """Returns the folders by row, the lowest first: a row imports rows below it only.

    Raises:
      ValueError: imports go in a circle.
    """
    left, result = dict(table), []
    while left:
        row = [name for name in left if not left[name] & left.keys()]
        if not row:
            raise ValueError(f"imports go in a circle among {sorted(left)}")
        result.append(row)
        left = {name: left[name] for name in left if name not in row}
    return result


def arrows(table: Table) -> list[tuple[str, str]]:
    """Returns the imports that are not implied by a chain of others."""

    def reached(names: set[str]) -> set[str]:
        return names.union(*(reached(table[name]) for name in names)) if names else set()

    return [(a, b) for a in table for b in sorted(table[a]) if b not in reached(table[a] - {b})]


def draw(table: Table) -> str:
    """Returns the picture.

    Raises:
      ValueError: imports go in a circle, or an arrow runs behind a box.
    """
    table = {name: others & X.keys() for name, others in table.items() if name in X}
    depth = {name: y for y, row in enumerate(rows(table)) for name in row}
    height = (max(depth.values()) + 1) * ROW
    centre = {name: (X[name], height - ROW // 2 - depth[name] * ROW) for name in table}
    lines, boxes = [], []
    for a, b in arrows(table):
        (x, y), (x2, y2) = centre[a], centre[b]
        start, end = (x + LEAVE.get((a, b), 0), y + HEIGHT / 2), (x2, y2 - HEIGHT / 2)
        if crossed := [name for name in table if name not in (a, b) and _behind(start, end, centre[name])]:
            raise ValueError(f"the arrow from {a} to {b} runs behind {crossed}; move a box in X, or add to LEAVE")
        lines.append(f'<path d="M{start[0]},{start[1]:g} L{end[0]},{end[1] - 4:g}"/>')
    drawn = set(arrows(table))
    for name, others in table.items():
        (x, y), below = centre[name], depth.__getitem__
        rest = sorted((b for b in others if (name, b) not in drawn), key=lambda b: (-below(b), b))
        boxes.append(f'<rect x="{x - WIDTH // 2}" y="{y - HEIGHT // 2}" width="{WIDTH}" height="{HEIGHT}" rx="8"/>')
        boxes.append(f'<text x="{x}" y="{y - 8 if rest else y + 5}">{name}</text>')
        half = -(-len(rest) // 2) if len(rest) > 4 else len(rest)
        prints = [", ".join(part) for part in (rest[:half], rest[half:]) if part]
        for line, text in enumerate(prints):
            boxes.append(f'<text class="small" x="{x}" y="{y + 9 + 13 * line}">{"also " * (line == 0)}{text}</text>')
    style = (
        "text{font:bold 15px sans-serif;text-anchor:middle;fill:#23272e}.small{font:11px sans-serif;fill:#5b6570}"
        "rect{fill:#fff;stroke:#23272e}path{stroke:#3b78b8;stroke-width:1.5;marker-end:url(#head)}"
        "#head path{stroke:none;marker-end:none}"
    )
    marker = (
        '<marker id="head" viewBox="0 0 8 8" refX="5" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#3b78b8"/></marker>'
    )
    size = f'viewBox="0 0 {max(X.values()) + WIDTH // 2 + 12} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style><defs>{marker}</defs>'
    return "\n".join([head, '<rect width="100%" height="100%" style="stroke:none"/>', *lines, *boxes, "</svg>\n"])


def _behind(start: tuple[float, float], end: tuple[float, float], box: tuple[int, int]) -> bool:
    """True if the line comes within 4 pixels of the box, whose centre is given."""
    for step in range(101):
        x, y = (s + (e - s) * step / 100 for s, e in zip(start, end, strict=True))
        if abs(x - box[0]) < WIDTH / 2 + 4 and abs(y - box[1]) < HEIGHT / 2 + 4:
            return True
    return False


def main() -> int:
    """Draws the picture; returns the exit status."""
    try:
        (DOCS / "imports.svg").write_text(draw(read()))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
