"""The account of an adaptation: every leaf of every source in one row, every leaf of the target in one use."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from t5g2.core import tree
from t5g2.core.tree import LeafKey

NOTHING = "-"
COLUMNS = ("how", "source", "layers", "targets", "shape")


@dataclass(frozen=True)
class Use:
    """A target leaf, its shape, and how it came about."""

    target: LeafKey
    operation: str
    shape: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True)
class ProvenanceRow:
    """A source leaf and all that became of it. A source leaf is named once, however many target leaves it serves.

    Attributes:
      origin: which source, "" where there is one alone.
      source: the leaf; None = the uses are initialised.
      uses: none = it is dropped on purpose, and `why` says it.
    """

    origin: str
    source: LeafKey | None
    shape: tuple[int, ...]
    uses: tuple[Use, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Provenance:
    """Where every weight of an adapted model comes from, and what became of every weight of its sources.

    Attributes:
      recipe: its name.
      source: where the weights came from, as the caller calls it.
      rows: every source leaf in exactly one, every target leaf in exactly one.
      settings: what the target's architecture has otherwise than the sources', as lines.
    """

    recipe: str
    source: str
    rows: tuple[ProvenanceRow, ...]
    settings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data: an entry for each target leaf and each dropped source leaf, and the table's lines."""
        leaves = []
        for row in self.rows:
            source = NOTHING if row.source is None else _source_name(row.origin, tree.name(row.source))
            for use in row.uses:
                facts = {"target": tree.name(use.target), "how": use.operation, "source": source}
                leaves.append(facts | {"shape": str(list(use.shape)), "note": use.note})
            if not row.uses:
                facts = {"target": NOTHING, "how": "dropped", "source": source}
                leaves.append(facts | {"shape": str(list(row.shape)), "note": row.reason})
        return {
            "recipe": self.recipe,
            "source": self.source,
            "settings": list(self.settings),
            "table": [list(COLUMNS), *map(list, self.lines())],
            "leaves": leaves,
        }

    def lines(self) -> list[tuple[str, ...]]:
        """The table's lines: (how, source, layers, targets, shape) as text; rows that differ in the layer alone are
        one line. Where target layers have other numbers than the source's, they stand in brackets.
        """
        grouped: dict[tuple, tuple[list[int | None], list[list[int | None]]]] = {}
        for row in self.rows:
            source, layer = row.source or (NOTHING, row.uses[0].target[1])
            uses = tuple((use.operation, use.target[0], use.note) for use in row.uses)
            layers, of_uses = grouped.setdefault(
                (row.origin, source, row.shape, uses, row.reason), ([], [[] for _ in uses])
            )
            layers.append(layer)
            for of_use, use in zip(of_uses, row.uses, strict=True):
                of_use.append(use.target[1])
        lines = []
        for (origin, source, shape, uses, why), (layers, of_uses) in grouped.items():
            how = "dropped" if not uses else ", ".join(dict.fromkeys(how for how, _, _ in uses))
            targets = [
                path + ("" if of_use == layers else f" [{layer_ranges(of_use)}]") + (f" ({note})" if note else "")
                for (_, path, note), of_use in zip(uses, of_uses, strict=True)
            ]
            into = ", ".join(targets) or (f"{NOTHING} ({why})" if why else NOTHING)
            named = source if source == NOTHING else _source_name(origin, source)
            lines.append((how, named, layer_ranges(layers), into, str(list(shape))))
        return lines

    def table(self) -> str:
        """The account as a person reads it: equal layers in one line, then the sums and the changed settings."""
        cells = [COLUMNS, *self.lines()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        uses = [use for row in self.rows for use in row.uses]
        sources = [row for row in self.rows if row.source is not None]
        dropped = [row for row in sources if not row.uses]
        counts = [
            f"{sum(use.operation == how for use in uses)} {how}" for how in dict.fromkeys(use.operation for use in uses)
        ]
        text.append(f"{len(uses)} target leaves: {', '.join(counts)}")
        text.append(f"{len(sources)} source leaves: {len(sources) - len(dropped)} used, {len(dropped)} dropped")
        return "\n".join([*text, *(f"changed  {line}" for line in self.settings)])


def layer_ranges(layers: Iterable[int | None]) -> str:
    """Layers as ranges: 0, 1, 2, 5 are "0-2, 5"; "-" for a leaf of no layer."""
    runs: list[list[int]] = []
    for layer in layers:
        if layer is None:
            return NOTHING
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _source_name(origin: str, leaf: str) -> str:
    return f"{origin}:{leaf}" if origin else leaf
