"""Settings that may differ when a run is resumed."""

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from t5g2.core import settings
from t5g2.core.errors import UserError
from t5g2.core.tree import difference, named
from t5g2.models.build import abstract
from t5g2.models.config import ModelConfig
from t5g2.train.experiment import Train, build, by_content, dump
from t5g2.train.former_names import current_keys, current_path
from t5g2.train.optim import OptimConfig
from t5g2.train.optim import make as make_optimizer

# length and cadence of the run, devices and speed may differ when a run is resumed; the computation may not
FREE_ON_RESUME = (
    "train.steps",
    "train.flops",
    "train.profile_steps",
    "train.hang_timeout_secs",
    "log",
    "save",
    "eval.every_steps",
    "eval.final",
    "mesh",
    "compute.remat",
    "compute.offload",
    "compute.backend",
    "data.workers",
    "data.cache_tokens",
    "data.prefetch",
    "init",
)


def check_resume(saved: Mapping[str, Any], now: Mapping[str, Any], *, allow: Iterable[str] = ()) -> dict[str, tuple]:
    """Returns the settings that differ and are allowed to, as {path: (saved, now)}.

    Raises:
      UserError: settings differ that may not (the message has both values of each, and the remedies), or `allow` has
        a path that is not a setting's.
    """
    before = _with_defaults(saved)
    allow = tuple(map(current_path, allow))
    _check_paths(allow, settings.flatten(before).keys() | settings.flatten(now).keys())
    compared = [by_content(before), by_content(now)]
    # of another content, both files are shown
    compared = compared if _tokenizer_hash(before) == _tokenizer_hash(now) else [before, now]
    old, new = (settings.flatten(_sources_by_name(*pair)) for pair in (compared, compared[::-1]))
    changed = {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}
    free = {k for k in changed if any(_covers(path, k) for path in (*FREE_ON_RESUME, *allow))}
    refused = sorted(changed.keys() - free)
    if refused:
        shown = difference(*({k: side[k] for k in refused if k in side} for side in (old, new)))
        raise UserError(
            f"the workdir holds a different experiment (saved -> now):\n{shown}\n"
            + _remedy(
                refused,
                # a None that one side lacks is no difference, and in nobody's way
                (old.keys() & new.keys()) | set(refused),
                state_parts=_state_parts(saved, now, refused),
                whole=None if _source_names(before) == _source_names(now) else "data.sources",
            )
        )
    return {k: changed[k] for k in sorted(free)}


def _remedy(refused: Sequence[str], names: Collection[str], *, state_parts: Sequence[str], whole: str | None) -> str:
    """Returns the end of the refusal: what may be done about these settings.

    Args:
      refused: the settings that differ.
      names: all settings.
      state_parts: parts of the experiment whose change makes other leaves than the saved ones.
      whole: a path that is named instead of those that it covers.
    """
    fixed = [path for path in refused if any(_covers(part, path) for part in state_parts)]
    others = [path for path in refused if path not in fixed]
    flag = f"--allow_change={','.join(_shortest_paths(others, names, whole=whole))}" if others else ""
    if not fixed:
        return f"Use another --workdir, undo the change, or go on with it on purpose: {flag}"
    rest = f". The rest may be changed on purpose: {flag}" if flag else ""
    return (
        f"Use another --workdir, or undo the change. A run cannot go on with another "
        f"{', '.join(_shortest_paths(fixed, names, whole=None))}, because the saved state does not fit it; to begin "
        f"with the saved weights, start a new run in another --workdir with init.params, a model folder (`t5g2 average "
        f"--last=1` makes one of the newest checkpoint){rest}"
    )


def _sources_by_name(node: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns an experiment's settings with the sources under their names, if the other's sources have other names.

    A source that only one of them has is described in a line.
    """
    names, other_names = _source_names(node), _source_names(other)
    if not names or not other_names or names == other_names:
        return node
    by_name = dict(zip(names, node["data"]["sources"], strict=True))
    for name in by_name.keys() - set(other_names):
        text, objective = (by_name[name][part]["kind"] for part in ("text", "objective"))
        by_name[name] = f"{text}, {objective}, weight {by_name[name]['weight']}"
    return {**node, "data": {**node["data"], "sources": by_name}}


def _source_names(node: Mapping[str, Any]) -> list[str]:
    """Returns the names of an experiment's sources; none if another version wrote them in another form."""
    try:
        return [source["name"] or str(i) for i, source in enumerate(node["data"]["sources"])]
    except (KeyError, TypeError):
        return []


def _state_parts(saved: Mapping[str, Any], now: Mapping[str, Any], refused: Iterable[str]) -> list[str]:
    """Returns the parts of the experiment whose change makes other leaves than those of the saved state."""
    try:
        before, after = build(saved), build(now)
    except UserError:  # another version wrote it, and its leaves are unknown
        return []
    optimizer = dataclasses.replace(before.optim, optimizer=after.optim.optimizer)
    freeze = dataclasses.replace(before.optim, freeze=after.optim.freeze)
    ema = dataclasses.replace(before.optim, ema=after.optim.ema)
    changes = {
        "model": (after.model, before.optim, before.train),
        "optim.optimizer": (before.model, optimizer, before.train),
        "optim.freeze": (before.model, freeze, before.train),
        "optim.ema": (before.model, ema, before.train),
        "train.param_dtype": (before.model, before.optim, after.train),
    }
    concerned = [part for part in changes if any(_covers(part, path) for path in refused)]
    leaves = _state_leaves(before.model, before.optim, before.train) if concerned else None
    return [part for part in concerned if _state_leaves(*changes[part]) != leaves]


def _state_leaves(model: ModelConfig, optim: OptimConfig, train: Train) -> dict[str, Any] | None:
    """Returns {name: (shape, dtype)} of the weights and of the optimizer's state; None if the two do not fit."""
    params = abstract(model, jnp.dtype(train.param_dtype))
    try:
        init = make_optimizer(optim, train.steps, params).init
    except UserError:  # a rule names a weight of the other model
        return None
    state = {"params": params, "opt": jax.eval_shape(init, params)}
    return {name: (leaf.shape, leaf.dtype) for item in state.values() for name, leaf in named(item).items()}


def _tokenizer_hash(node: Mapping[str, Any]) -> Any:
    return settings.flatten(node).get("data.tokenizer.sha256")


def _with_defaults(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a saved experiment in which settings that are newer than it have their defaults."""
    try:
        return dump(build(saved))
    except UserError:  # another version wrote it, or it names a file that is gone: compare it as it is
        return current_keys(saved)


def _check_paths(paths: Iterable[str], settings: Iterable[str]) -> None:
    """Raises UserError for a path that is neither a setting nor a group of settings."""
    known = {prefix for setting in (*settings, "data.corpus") for prefix in _prefixes(setting)}
    for path in paths:
        if path not in known:
            near = difflib.get_close_matches(path, sorted(known), n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(
                f"--allow_change={path} is not a setting; {hint}Allowed: the dotted path of a setting, such as "
                f"optim.schedule.peak, or of a group of them, such as optim, and data.corpus"
            )


def _shortest_paths(paths: Sequence[str], names: Collection[str], *, whole: str | None) -> list[str]:
    """Returns the shortest paths that cover these settings and no others; `whole` for all that it covers."""

    def shortest(path: str) -> str:
        if whole is not None and _covers(whole, path):
            return whole
        return next(p for p in _prefixes(path) if all(key in paths for key in names if _covers(p, key)))

    return list(dict.fromkeys(map(shortest, paths)))


def _covers(path: str, setting: str) -> bool:
    return setting == path or setting.startswith(f"{path}.")


def _prefixes(path: str) -> list[str]:
    """Returns all prefixes of a dotted path: a, a.b and a.b.c for a.b.c."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
