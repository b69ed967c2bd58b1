"""Draws docs/imports.svg: the folders of t5g2 in rows, an arrow for each import between them, thick for many.

    python docs/draw_imports.py        (or: make imports)

Arrows go down; one that would go up ends the program with status 1 and its name.
"""

import ast
import sys
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
ROWS = (
    ("cli",),
    ("commands",),
    ("sweep",),
    ("report",),
    ("train", "api"),
    ("adapt", "checkpoint", "eval"),
    ("objectives", "models", "data"),
    ("core",),
)


def room(module: str) -> str:
    """The folder of a module of ours, or the file itself at the top."""
    return module.split(".")[1]


def edges() -> Counter:
    """{(importing folder, imported folder): number of import statements}."""
    count = Counter()
    for file in sorted((ROOT / "t5g2").rglob("*.py")):
        here = file.relative_to(ROOT / "t5g2").with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("t5g2"):
                names = [f"t5g2.{a.name}" for a in node.names] if node.module == "t5g2" else [node.module]
                count.update((here, room(name)) for name in names if room(name) != here)
    return count


def main() -> int:
    """Draws the picture; returns the exit status."""
    places = {}
    for y, names in enumerate(reversed(ROWS)):
        for i, name in enumerate(names):
            places[name] = ((i + 1) / (len(names) + 1) * 10, y * 1.15)
    found = {pair: n for pair, n in edges().items() if pair[0] in places and pair[1] in places}
    upwards = [pair for pair in found if places[pair[0]][1] < places[pair[1]][1]]
    level = [p for p in found if places[p[0]][1] == places[p[1]][1] and p[0] not in ("train", "api")]
    if upwards or [p for p in level if p[0] != "eval"]:
        print(f"imports that go up: {upwards + level}", file=sys.stderr)
        return 1
    plt.rcParams["svg.hashsalt"] = "t5g2"  # the same picture is the same file
    figure, axes = plt.subplots(figsize=(9, 8))
    for (a, b), n in sorted(found.items()):
        (x, y), (x2, y2) = places[a], places[b]
        bend = 0.0 if abs(y - y2) <= 1.2 else (0.12 if x <= 5 else -0.12)
        style = {
            "arrowstyle": "-|>",
            "lw": 0.5 + n**0.5 / 4,
            "color": "#3b78b8",
            "alpha": 0.55,
            "shrinkA": 18,
            "shrinkB": 18,
        }
        axes.annotate("", (x2, y2), (x, y), arrowprops={**style, "connectionstyle": f"arc3,rad={bend}"})
    for name, (x, y) in places.items():
        files = len(list((ROOT / "t5g2" / name).rglob("*.py"))) or 1
        text = f"{name}\n{files} file{'s' * (files > 1)}"
        box = {"boxstyle": "round,pad=0.45", "fc": "white", "ec": "#23272e"}
        axes.text(x, y, text, ha="center", va="center", fontsize=10, bbox=box)
    axes.set_xlim(0, 10)
    axes.set_ylim(-0.7, (len(ROWS) - 1) * 1.15 + 0.7)
    axes.axis("off")
    figure.savefig(ROOT / "docs" / "imports.svg", bbox_inches="tight", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
