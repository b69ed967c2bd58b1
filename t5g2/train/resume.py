"""Settings that may differ when a run is resumed."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from t5g2.core import settings
from t5g2.core.errors import UserError
from t5g2.core.tree import difference
from t5g2.train.experiment import build, dump
from t5g2.train.former_names import current_keys, current_path

# Length and cadence of the run, devices and speed may differ when a run is resumed; the computation may not.
FREE_ON_RESUME = (
    "train.steps",
    "log",
    "save",
    "eval.every_steps",
    "eval.final",
    "mesh",
    "compute.remat",
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
    old, new = settings.flatten(_with_defaults(saved)), settings.flatten(now)
    changed = {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}
    allow = tuple(map(current_path, allow))
    _check_paths(allow, old.keys() | new.keys())
    free = {k for k in changed if any(_covers(path, k) for path in (*FREE_ON_RESUME, *allow))}
    refused = sorted(changed.keys() - free)
    if refused:
        shown = difference(*({k: side[k] for k in refused if k in side} for side in (old, new)))
        named = dict.fromkeys(_shortest(path, set(refused), old.keys() | new.keys()) for path in refused)
        raise UserError(
            f"the workdir holds a different experiment (saved -> now):\n{shown}\n"
            f"Use another --workdir, undo the change, or go on with it on purpose: --allow_change={','.join(named)}"
        )
    return {k: changed[k] for k in sorted(free)}


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


def _shortest(path: str, refused: set[str], settings: Iterable[str]) -> str:
    """Returns the shortest path that covers this setting and otherwise only refused ones."""
    return next(p for p in _prefixes(path) if all(key in refused for key in settings if _covers(p, key)))


def _covers(path: str, setting: str) -> bool:
    return setting == path or setting.startswith(f"{path}.")


def _prefixes(path: str) -> list[str]:
    """Returns all prefixes of a dotted path: a, a.b and a.b.c for a.b.c."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
