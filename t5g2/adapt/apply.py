"""Runs a recipe: the adapted model, and the account of every weight on both sides."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from t5g2.adapt.rules import Recipe, Rule
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.core.tree import Leaf, LeafKey
from t5g2.models import build

_COLUMNS = ("how", "source", "layers", "targets", "shape")


@dataclass(frozen=True)
class Use:
    """A target leaf, and how it came about."""

    target: LeafKey
    how: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A source leaf and all that became of it. No uses = dropped on purpose; no source = the uses are initialised.

    A source leaf is named once, however many target leaves it serves, and each target leaf once.
    """

    source: LeafKey | None
    uses: tuple[Use, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Provenance:
    """The account of an adaptation.

    Attributes:
      recipe: its name.
      rows: every source leaf in exactly one, every target leaf in exactly one.
      settings: what the target's architecture has otherwise than the source's, as lines.
      source: where the weights came from, as the caller calls it.
    """

    recipe: str
    rows: tuple[Row, ...]
    settings: tuple[str, ...] = ()
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, one entry for each target leaf and each dropped source leaf."""
        leaves = []
        for row in self.rows:
            source = "-" if row.source is None else tree.name(row.source)
            for use in row.uses or (Use(("-", None), "dropped"),):
                facts = {"target": tree.name(use.target), "how": use.how, "source": source}
                leaves.append(facts | {"shape": str(list(row.shape)), "note": use.note})
        return {"recipe": self.recipe, "source": self.source, "settings": list(self.settings), "leaves": leaves}

    def lines(self) -> list[tuple[str, str, str, str, str]]:
        """(how, source, layers, targets, shape) as text; rows that differ in the layer only are one line."""
        grouped: dict[tuple, list[int | None]] = {}
        for row in self.rows:
            source, layer = row.source or ("-", row.uses[0].target[1])
            uses = tuple((use.how, use.target[0], use.note) for use in row.uses)
            grouped.setdefault((source, row.shape, uses), []).append(layer)
        lines = []
        for (source, shape, uses), layers in grouped.items():
            how = "dropped" if not uses else ", ".join(dict.fromkeys(how for how, _, _ in uses))
            targets = ", ".join(path + (f" ({note})" if note else "") for _, path, note in uses) or "-"
            lines.append((how, source, _ranges(layers), targets, str(list(shape))))
        return lines

    def table(self) -> str:
        """The account as a person reads it: equal layers in one line, then the sums and the changed settings."""
        cells = [_COLUMNS, *self.lines()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        uses = [use for row in self.rows for use in row.uses]
        sources = [row for row in self.rows if row.source is not None]
        dropped = [row for row in sources if not row.uses]
        counts = [f"{sum(use.how == how for use in uses)} {how}" for how in dict.fromkeys(use.how for use in uses)]
        text.append(f"{len(uses)} target leaves: {', '.join(counts)}")
        text.append(f"{len(sources)} source leaves: {len(sources) - len(dropped)} used, {len(dropped)} dropped")
        return "\n".join([*text, *(f"changed  {line}" for line in self.settings)])


def apply(
    source: Mapping[LeafKey, Leaf], target: Any, recipe: Recipe, *, key: jax.Array, shardings: Any = None
) -> tuple[Any, Provenance]:
    """The target with every leaf filled as the recipe says, and the account of it.

    Args:
      source: (path, layer) -> Leaf; read one at a time, as they are needed.
      target: an abstract module with a `config`; its leaves say shape, and dtype, to which what is read is cast.
      recipe: the rules.
      key: for leaves that are initialised: they are what a new model made from this key has.
      shardings: where the target's leaves go, a tree like it; None = the default device.

    Raises:
      UserError: a target leaf without a rule or whose source leaf does not exist, or a source leaf that is neither used
        nor dropped, with the lists of all of them; a source leaf of another shape, with both shapes.
    """
    leaves = tree.leaves(target)
    rules = {at: next((rule for rule in recipe.rules if rule.fits(at[0])), None) for at in leaves}
    rows = _account(source, leaves, rules, recipe)
    chosen = {at: rule for at, rule in rules.items() if rule is not None}
    fresh = _initialised(target, [leaves[at] for at, rule in chosen.items() if rule.how == "initialised"], key)

    def read(at: LeafKey) -> Any:
        came_from = _source(chosen[at], at)
        if came_from is None:
            return fresh[at]
        value = np.asarray(source[came_from].read()).astype(leaves[at].dtype)
        derive = chosen[at].derive
        return value if derive is None else derive(value, target.config)

    return tree.build(target, read, shardings=shardings), Provenance(recipe.name, rows)


def _source(rule: Rule, at: LeafKey) -> LeafKey | None:
    """The source leaf that a rule names for a target leaf: the same layer of another path."""
    path, layer = at
    source = rule.source_of(path)
    return None if source is None else (source, layer)


def _account(
    source: Mapping[LeafKey, Leaf], target: Mapping[LeafKey, Leaf], rules: Mapping[LeafKey, Rule | None], recipe: Recipe
) -> tuple[Row, ...]:
    """Every leaf of both sides in its row; an error if one is left over."""
    uses: dict[LeafKey, list[Use]] = {at: [] for at in source}
    made, orphans, wrong = [], [], []
    for at, rule in rules.items():
        if rule is None:
            continue
        use, came_from = Use(at, rule.how, rule.note), _source(rule, at)
        if came_from is None:
            made.append(Row(None, (use,), target[at].shape))
        elif came_from not in source:
            orphans.append(f"{tree.name(at)} (from {tree.name(came_from)})")
        else:
            uses[came_from].append(use)
            if rule.derive is None and source[came_from].shape != target[at].shape:
                shapes = f"{list(source[came_from].shape)} in the source, {list(target[at].shape)} in the target"
                wrong.append(f"{tree.name(came_from)} -> {tree.name(at)}: {shapes}")
    kept = [at for at in source if not uses[at] and not any(tree.select(p, at[0]) for p in recipe.dropped)]
    problems = {
        "target leaves without a rule": [tree.name(at) for at, rule in rules.items() if rule is None],
        "target leaves whose source leaf does not exist": orphans,
        "source leaves neither used nor dropped": [tree.name(at) for at in kept],
        "source leaves of another shape": wrong,
    }
    if any(problems.values()):
        lists = "".join(f"\n{what}:\n  " + "\n  ".join(found) for what, found in problems.items() if found)
        raise UserError(
            f"{recipe.name} does not account for every weight; the models differ in more than the recipe knows. Use "
            f"models that it is made for, or add rules{lists}"
        )
    return (*(Row(at, tuple(uses[at]), source[at].shape) for at in source), *made)


def _initialised(target: Any, wanted: Sequence[Leaf], key: jax.Array) -> dict[LeafKey, jax.Array]:
    """What these leaves are in a new model; XLA leaves out everything else, so no whole model is made."""
    if not wanted:
        return {}

    def some(key: jax.Array) -> list[jax.Array]:
        new = tree.leaves(build.make(target.config, key=key, param_dtype=wanted[0].dtype))
        return [new[leaf.key].read() for leaf in wanted]

    return {leaf.key: value for leaf, value in zip(wanted, jax.jit(some)(key), strict=True)}


def _ranges(layers: Iterable[int | None]) -> str:
    """Layers as ranges: 0, 1, 2, 5 are "0-2, 5"; "-" for a leaf of no layer."""
    runs: list[list[int]] = []
    for layer in layers:
        if layer is None:
            return "-"
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
