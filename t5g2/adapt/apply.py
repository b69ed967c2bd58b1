"""Applies the rules of adaptation: the leaves of the adapted model, computed when they are read, and their provenance.

All mappings are (path, layer) -> leaf, because the trees of source and target models differ.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5g2.adapt import rules
from t5g2.adapt.pairing import Pairing, SourceModel
from t5g2.adapt.provenance import Provenance, ProvenanceRow, Use
from t5g2.adapt.rules import Rule
from t5g2.core import tree
from t5g2.core.casting import cast_weights
from t5g2.core.errors import UserError
from t5g2.core.tree import Leaf, LeafKey


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """An adapted model as leaves, each of which is computed when it is read, and the provenance of all of them."""

    leaves: Mapping[LeafKey, Leaf] = field(repr=False)
    provenance: Provenance


def adapt(
    pairing: Pairing, target: Any, *, seed: int = 0, source: str = "", table: Sequence[Rule] = rules.RULES
) -> AdaptedModel:
    """Returns the target model with every leaf computed by the rules.

    Args:
      pairing: sources and target that fit.
      target: abstract module of the pairing's target; weights are cast to the dtypes of its leaves.
      seed: seed of leaves that are initialised.
      source: the caller's description of the folders that the weights come from, for the provenance.
      table: the rules.

    Raises:
      UserError: a target leaf has no rule or its source leaf does not exist, a source leaf is neither used nor dropped,
        or has another shape; the message lists all of them.
    """
    leaves = tree.leaves(target)
    origins = {key: _origin(key, pairing, table) for key in leaves}
    rows = _provenance_rows(pairing, leaves, origins)
    # initialised leaves come last: drawing them starts XLA, whose memory would otherwise add to that of the tables
    order = sorted(leaves, key=lambda key: origins[key].leaf is None)
    adapted = {key: replace(leaves[key], read=_reader(leaves[key], origins[key], pairing, seed)) for key in order}
    return AdaptedModel(adapted, Provenance(pairing.recipe, source, rows, pairing.settings, pairing.sources.notes))


class _LeafOrigin(NamedTuple):
    """Origin of one target leaf; rule None = no rule fits. `key` names a leaf of `source`, which may not exist."""

    rule: Rule | None
    source: SourceModel | None = None
    key: LeafKey = ("", None)

    @property
    def leaf(self) -> Leaf | None:
        return None if self.source is None else self.source.leaves.get(self.key)


def _origin(target: LeafKey, pairing: Pairing, table: Sequence[Rule]) -> _LeafOrigin:
    path, layer = target
    rule = rules.rule_for(path, pairing, table)
    if rule is None:
        return _LeafOrigin(None)
    source, source_path = rules.source_of(rule, pairing), rule.source_of(path)
    if source is None or source_path is None:
        return _LeafOrigin(rule)
    # a target cut in depth has other layer numbers than its source
    if layer is not None and rule.origin in ("encoder", "decoder"):
        layer = pairing.layers[rule.origin][layer]
    return _LeafOrigin(rule, source, (source_path, layer))


def _reader(leaf: Leaf, origin: _LeafOrigin, pairing: Pairing, seed: int) -> Callable[[], Any]:
    """Returns a function that computes a target leaf, of exactly its shape and dtype."""
    rule, source_leaf = origin.rule, origin.leaf
    assert rule is not None
    if source_leaf is None:
        return lambda: _initialise(leaf, rule, seed)

    def read() -> np.ndarray:
        # cast first: resized rows and resampled positions are then computed as the target stores them
        value = cast_weights(source_leaf.read(), leaf.dtype, name=f"the source's {tree.name(source_leaf.key)}")
        if rule.derive is not None:
            return rule.derive(value, pairing)
        if rule.shape_change is not None and value.shape != leaf.shape:
            return rule.shape_change.apply(value, leaf.shape)
        return value

    return read


def _initialise(leaf: Leaf, rule: Rule, seed: int) -> jax.Array:
    """Returns a new leaf: of the rule's value, or by its own initialiser."""
    if rule.value is not None:
        return jnp.full(leaf.shape, rule.value, leaf.dtype)
    return leaf.new(seed)


def _provenance_rows(
    pairing: Pairing, leaves: Mapping[LeafKey, Leaf], origins: Mapping[LeafKey, _LeafOrigin]
) -> tuple[ProvenanceRow, ...]:
    """Returns the rows of all leaves of sources and target; raises UserError for leaves that the rules do not cover."""
    sources = pairing.sources.by_name
    # by identity, because sources have no equality of values
    name_of = {id(source): name for name, source in sources.items()}
    uses: dict[tuple[str, LeafKey], list[Use]] = {(name, key): [] for name, s in sources.items() for key in s.leaves}
    initialised, without_source, other_shapes = [], [], []
    # each target leaf is entered as a use of its source leaf
    for key, leaf in leaves.items():
        rule, source, source_key = origins[key]
        if rule is None:
            continue
        if source is None:
            use = Use(key, rule.operation, leaf.shape, rule.note_for(pairing))
            initialised.append(ProvenanceRow("", None, leaf.shape, (use,)))
        elif source_key not in source.leaves:
            without_source.append(f"{tree.name(key)} (from {tree.name(source_key)})")
        else:
            use = _leaf_use(rule, source.leaves[source_key].shape, leaf, rule.note_for(pairing))
            uses[name_of[id(source)], source_key].append(use or Use(key, rule.operation, leaf.shape))
            # collected, not raised, so that the message lists all of them at once
            if use is None:
                shapes = f"{list(source.leaves[source_key].shape)} in the source, {list(leaf.shape)} in the target"
                other_shapes.append(f"{tree.name(source_key)} -> {tree.name(key)}: {shapes}")
    # each source leaf must have a use, or a reason to be dropped
    rows, left_over = [], []
    for (name, key), leaf_uses in uses.items():
        reason = "" if leaf_uses else rules.drop_reason(*key, sources[name], pairing)
        if reason is None:
            left_over.append(f"{name}:{tree.name(key)}" if name else tree.name(key))
        else:
            rows.append(ProvenanceRow(name, key, sources[name].leaves[key].shape, tuple(leaf_uses), reason))
    _raise_if_any(
        pairing.recipe,
        {
            "target leaves without a rule": [tree.name(key) for key, origin in origins.items() if origin.rule is None],
            "target leaves whose source leaf does not exist": without_source,
            "source leaves neither used nor dropped": left_over,
            "source leaves of another shape": other_shapes,
        },
    )
    return (*rows, *initialised)


def _leaf_use(rule: Rule, shape: tuple[int, ...], leaf: Leaf, note: str) -> Use | None:
    """Returns the use of a source leaf of this shape for a target leaf; None if the shapes do not fit."""
    if rule.operation == "derived" or shape == leaf.shape:
        return Use(leaf.key, rule.operation, leaf.shape, note)
    if rule.shape_change is None or not rule.shape_change.allows(shape, leaf.shape):
        return None
    changed = rule.shape_change.note(shape, leaf.shape)
    return Use(leaf.key, "derived", leaf.shape, ", ".join(filter(None, (note, changed))))


def _raise_if_any(recipe: str, problems: Mapping[str, Sequence[str]]) -> None:
    if any(problems.values()):
        lists = "".join(f"\n{problem}:\n  " + "\n  ".join(names) for problem, names in problems.items() if names)
        raise UserError(
            f"{recipe} does not account for every weight; the models differ in ways that the rules do not cover. Use "
            f"models that the rules cover, or add rules{lists}"
        )
