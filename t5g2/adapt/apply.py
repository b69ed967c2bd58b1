"""Runs the rules: the leaves of the adapted model, made when they are read, and the account of every weight.

It works on (path, layer) -> leaf of each side and never on two models at once, whose trees differ.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5g2.adapt import rules, shape_changes
from t5g2.adapt.pairing import Pairing, SourceModel
from t5g2.adapt.provenance import Provenance, ProvenanceRow, Use
from t5g2.adapt.rules import Rule
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.core.tree import Leaf, LeafKey


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """An adapted model as leaves, each of which is made when it is read, and the account of all of them."""

    leaves: Mapping[LeafKey, Leaf] = field(repr=False)
    provenance: Provenance


def adapt(
    pairing: Pairing, target: Any, *, seed: int = 0, source: str = "", table: Sequence[Rule] = rules.RULES
) -> AdaptedModel:
    """The target with every leaf made as the rules say.

    Args:
      pairing: sources and target that fit.
      target: the abstract module of the pairing's target; its leaves say shape, and dtype, to which all is cast.
      seed: of leaves that are initialised.
      source: where the weights come from, as the caller calls it.
      table: the rules.

    Raises:
      UserError: a target leaf without a rule or whose source leaf does not exist, a source leaf that is neither used
        nor dropped, or one of another shape; with the lists of all of them.
    """
    leaves = tree.leaves(target)
    origins = {at: _origin(at, pairing, table) for at in leaves}
    rows = _provenance_rows(pairing, leaves, origins)
    # what is new comes last: drawing it starts XLA, whose memory is then not there beside the largest tables
    order = sorted(leaves, key=lambda at: origins[at].leaf is None)
    made = {at: replace(leaves[at], read=_reader(leaves[at], origins[at], pairing, seed)) for at in order}
    return AdaptedModel(made, Provenance(pairing.recipe, source, rows, pairing.settings))


class _LeafOrigin(NamedTuple):
    """What the rules say of one target leaf; rule None = nothing. `at` is a leaf of `source`, which may not have it."""

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
    source, named = rules.source_of(rule, pairing), rule.source_of(path)
    if source is None or named is None:
        return _LeafOrigin(rule)
    if layer is not None and rule.origin in ("encoder", "decoder"):
        layer = pairing.layers[rule.origin][layer]
    return _LeafOrigin(rule, source, (named, layer))


def _reader(leaf: Leaf, origin: _LeafOrigin, pairing: Pairing, seed: int) -> Callable[[], Any]:
    """Makes a target leaf, of exactly its shape and dtype."""
    rule, came_from = origin.rule, origin.leaf
    assert rule is not None
    if came_from is None:
        return lambda: _initialise(leaf, rule, seed)

    def read() -> np.ndarray:
        value = np.asarray(came_from.read()).astype(leaf.dtype, copy=False)
        if rule.operation == "derived":
            token = pairing.target.eoi_id
            assert token is not None
            return shape_changes.end_of_image_vector(value, token)
        if rule.shape_change is not None and value.shape != leaf.shape:
            return rule.shape_change.apply(value, leaf.shape)
        return value

    return read


def _initialise(leaf: Leaf, rule: Rule, seed: int) -> jax.Array:
    """A new leaf, by its own initialiser, from a key that depends on the seed and on its name."""
    if rule.value is not None:
        return jnp.full(leaf.shape, rule.value, leaf.dtype)
    assert leaf.init is not None
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(tree.name(leaf.key).encode()))
    return leaf.init(key, leaf.shape, leaf.dtype)


def _provenance_rows(
    pairing: Pairing, leaves: Mapping[LeafKey, Leaf], origins: Mapping[LeafKey, _LeafOrigin]
) -> tuple[ProvenanceRow, ...]:
    """Every leaf of every side in its row; an error if one is left over."""
    named = pairing.sources.by_name
    name_of = {id(source): name for name, source in named.items()}
    uses: dict[tuple[str, LeafKey], list[Use]] = {(name, at): [] for name, s in named.items() for at in s.leaves}
    made, orphans, wrong = [], [], []
    for at, leaf in leaves.items():
        rule, source, came_from = origins[at]
        if rule is None:
            continue
        if source is None:
            made.append(ProvenanceRow("", None, leaf.shape, (Use(at, rule.operation, leaf.shape, rule.note),)))
        elif came_from not in source.leaves:
            orphans.append(f"{tree.name(at)} (from {tree.name(came_from)})")
        else:
            use = _leaf_use(rule, source.leaves[came_from].shape, leaf)
            uses[name_of[id(source)], came_from].append(use or Use(at, rule.operation, leaf.shape))
            if use is None:
                shapes = f"{list(source.leaves[came_from].shape)} in the source, {list(leaf.shape)} in the target"
                wrong.append(f"{tree.name(came_from)} -> {tree.name(at)}: {shapes}")
    rows, kept = [], []
    for (name, at), found in uses.items():
        why = "" if found else rules.drop_reason(*at, named[name], pairing)
        if why is None:
            kept.append(f"{name}:{tree.name(at)}" if name else tree.name(at))
        else:
            rows.append(ProvenanceRow(name, at, named[name].leaves[at].shape, tuple(found), why))
    _raise_if_any(
        pairing.recipe,
        {
            "target leaves without a rule": [tree.name(at) for at, origin in origins.items() if origin.rule is None],
            "target leaves whose source leaf does not exist": orphans,
            "source leaves neither used nor dropped": kept,
            "source leaves of another shape": wrong,
        },
    )
    return (*rows, *made)


def _leaf_use(rule: Rule, shape: tuple[int, ...], leaf: Leaf) -> Use | None:
    """How a target leaf comes from a source leaf of this shape; None = it cannot."""
    if rule.operation == "derived" or shape == leaf.shape:
        return Use(leaf.key, rule.operation, leaf.shape, rule.note)
    if rule.shape_change is None or not rule.shape_change.allows(shape, leaf.shape):
        return None
    note = ", ".join(filter(None, (rule.note, rule.shape_change.note(shape, leaf.shape))))
    return Use(leaf.key, "derived", leaf.shape, note)


def _raise_if_any(recipe: str, problems: Mapping[str, Sequence[str]]) -> None:
    if any(problems.values()):
        lists = "".join(f"\n{what}:\n  " + "\n  ".join(found) for what, found in problems.items() if found)
        raise UserError(
            f"{recipe} does not account for every weight; the models differ in more than the rules know. Use models "
            f"that they are made for, or add rules{lists}"
        )
