"""Provenance of an adapted model: every source leaf is in exactly one row, every target leaf in exactly one use."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from t5g2.core import tree
from t5g2.core.ranges import format_ranges
from t5g2.core.tree import LeafKey

NOTHING = "-"
COLUMNS = ("how", "source", "layers", "targets", "shape")


@dataclass(frozen=True)
class Use:
    """Target leaf, and the operation that computes it: copied, tied, derived or initialised."""

    target: LeafKey
    operation: str
    shape: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True)
class ProvenanceRow:
    """Source leaf and all of its uses.

    Attributes:
      origin: name of the source, "" if there is only one.
      source: the leaf; None = the uses are initialised.
      uses: target leaves that are computed from the source leaf; none = it is dropped on purpose.
      reason: the reason why the source leaf is dropped.
    """

    origin: str
    source: LeafKey | None
    shape: tuple[int, ...]
    uses: tuple[Use, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Provenance:
    """Origin of every weight of an adapted model, and use of every weight of its sources.

    Attributes:
      recipe: name of the adaptation, "gemma3 -> t5gemma2".
      source: the caller's description of the folders that the weights come from.
      rows: every source leaf is in exactly one row, every target leaf in exactly one use.
      settings: lines for the settings in which the target's architecture differs from the sources.
      notes: lines on the sources' own import: how their weights were quantised, what was assumed.
    """

    recipe: str
    source: str
    rows: tuple[ProvenanceRow, ...]
    settings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data: an entry for each target leaf and each dropped source leaf, and the table's lines."""
        leaves = []
        for row in self.rows:
            source = NOTHING if row.source is None else _source_name(row.origin, tree.name(row.source))
            for use in row.uses:
                entry = {"target": tree.name(use.target), "how": use.operation, "source": source}
                leaves.append(entry | {"shape": str(list(use.shape)), "note": use.note})
            if not row.uses:
                entry = {"target": NOTHING, "how": "dropped", "source": source}
                leaves.append(entry | {"shape": str(list(row.shape)), "note": row.reason})
        return {
            "recipe": self.recipe,
            "source": self.source,
            "settings": list(self.settings),
            "notes": list(self.notes),
            "table": [list(COLUMNS), *map(list, self.lines())],
            "leaves": leaves,
        }

    def lines(self) -> list[tuple[str, ...]]:
        """Returns the table's lines, (how, source, layers, targets, shape) as text.

        Rows that differ only in the layer are one line. Target layers stand in brackets if their numbers are not those
        of the source layers.
        """
        # group -> (the source layers; for each use, the target layers)
        groups: dict[tuple, tuple[list[int | None], list[list[int | None]]]] = {}
        for row in self.rows:
            source, layer = row.source or (NOTHING, row.uses[0].target[1])
            # everything but the layer number is the key of a group
            uses = tuple((use.operation, use.target[0], use.note) for use in row.uses)
            layers, target_layers = groups.setdefault(
                (row.origin, source, row.shape, uses, row.reason), ([], [[] for _ in uses])
            )
            layers.append(layer)
            for numbers, use in zip(target_layers, row.uses, strict=True):
                numbers.append(use.target[1])
        lines = []
        for (origin, source, shape, uses, reason), (layers, target_layers) in groups.items():
            operations = "dropped" if not uses else ", ".join(dict.fromkeys(operation for operation, _, _ in uses))
            targets = [
                path + ("" if numbers == layers else f" [{_layers(numbers)}]") + (f" ({note})" if note else "")
                for (_, path, note), numbers in zip(uses, target_layers, strict=True)
            ]
            target = ", ".join(targets) or (f"{NOTHING} ({reason})" if reason else NOTHING)
            source = source if source == NOTHING else _source_name(origin, source)
            lines.append((operations, source, _layers(layers), target, str(list(shape))))
        return lines

    def table(self) -> str:
        """Returns the table for people: equal layers in one line, then totals, changed settings and notes."""
        cells = [COLUMNS, *self.lines()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        uses = [use for row in self.rows for use in row.uses]
        sources = [row for row in self.rows if row.source is not None]
        dropped = [row for row in sources if not row.uses]
        counts = Counter(use.operation for use in uses)
        totals = ", ".join(f"{count} {operation}" for operation, count in counts.items())
        text.append(f"{len(uses)} target leaves: {totals}")
        text.append(f"{len(sources)} source leaves: {len(sources) - len(dropped)} used, {len(dropped)} dropped")
        text += [f"changed  {line}" for line in self.settings]
        return "\n".join([*text, *(f"source   {line}" for line in self.notes)])


def _layers(layers: list[int | None]) -> str:
    """Returns layers as ranges, "0-2, 5"; "-" for a leaf that belongs to no layer."""
    numbers = [layer for layer in layers if layer is not None]
    return format_ranges(numbers) if len(numbers) == len(layers) else NOTHING


def _source_name(origin: str, leaf: str) -> str:
    return f"{origin}:{leaf}" if origin else leaf
