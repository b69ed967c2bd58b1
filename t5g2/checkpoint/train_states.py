"""Train states on disk: saved in the background, checked when they come back.

A step is a folder of separate items, so that one can be read without the others:

    <step>/params/<leaf>/…   the weights, one folder per stored leaf (core/tree.py names them)
    <step>/opt/<leaf>/…      the optimizer's state, likewise
    <step>/data/data.json    stream positions: what was trained on, not what was prefetched
    <step>/meta/data.json    what the caller wants to know on resume, and dtype, shape and checksum of every leaf

Orbax restores a flipped bit without a word and reports every other fault alike, hence the checksums. A leaf has a
folder of its own (no OCDBT, which packs them into shared files), so that what is broken on disk is a leaf with a name.
"""

import gc
import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from t5g2.checkpoint import checksum
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.core.logs import log

LeavesByName = dict[str, Any]
# What reading damaged files raises. Other errors, and these for one of the causes below, say nothing about the files.
DAMAGE = (KeyError, ValueError, TypeError, FileNotFoundError, EOFError)
NOT_THE_FILES = ("PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED")


class SavedStep(NamedTuple):
    """A step as it was saved; `params` and `opt` are like the abstract trees asked for, opt None if none was."""

    step: int
    params: Any
    opt: Any
    data: Any
    meta: Any


class Checkpoints:
    """The checkpoints of a run.

    Args:
      directory: holds one folder per step; made if it is missing.
      keep: the newest steps that stay; older ones are deleted when a newer one is complete.
      keep_every: steps divisible by this stay as well, None = no others.
      read_only: look only: nothing is deleted, moved or cleaned up, while another process may be writing.
    """

    def __init__(
        self, directory: str | PathLike, *, keep: int = 3, keep_every: int | None = None, read_only: bool = False
    ):
        self.directory = epath.Path(directory).absolute()  # may be a bucket
        self._read_only = read_only
        if read_only and not self.directory.is_dir():
            raise UserError(f"{self.directory} does not exist; give the workdir of a run that has saved a checkpoint")
        if keep < 1:
            raise UserError(f"keep = {keep}: at least the newest checkpoint has to stay, so keep must be at least 1")
        logging.getLogger("absl").addFilter(_is_not_ocdbt_warning)
        policies: Any = ocp.training.preservation_policies
        decisions: Any = ocp.training.save_decision_policies
        preserved = [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            context=_context(),
            # when to save is the loop's decision
            save_decision_policy=decisions.FixedIntervalPolicy(1),
            preservation_policy=policies.PreserveAll() if read_only else policies.AnyPreservationPolicy(preserved),
        )
        if not read_only:
            self._remove_incomplete()

    def steps(self) -> list[int]:
        """The steps that are complete on disk, ascending; a save in the background is not among them yet."""
        self._orbax.reload()
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def latest_step(self) -> int | None:
        """The newest step, None if there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, params: Any, opt: Any, *, data: Any, meta: Any) -> None:
        """Saves in the background. On return the arrays have been copied, so they may be donated to the next step.

        Args:
          step: updates completed.
          params: the model.
          opt: the optimizer's state, any tree of arrays.
          data: stream positions, plain data.
          meta: what restore is to return with the state (seed, fingerprint of the experiment), plain data.

        Raises:
          FileExistsError: the step is there already; nothing is overwritten.
          TypeError: `data` or `meta` would not come back from JSON as they are.
        """
        assert not self._read_only
        self.wait()
        if step in self.steps():
            raise FileExistsError(f"step {step} is already saved in {self.directory}; it is not overwritten")
        items = {"params": tree.named(params), "opt": tree.named(opt)}
        sums = _checksums(items)
        leaves = {name: _dtype_shape(x) | {"checksum": sums[name]} for name, x in _flatten_items(items).items()}
        records = {
            "data": _require_json("data", data),
            "meta": {"step": step, "leaves": leaves, "run": _require_json("meta", meta)},
        }
        arrays = {item: named for item, named in items.items() if named}  # Orbax knows no empty item
        sealed = {item: _seal(record) for item, record in records.items()}
        self._orbax.save_checkpointables_async(step, arrays | sealed, force=True)

    def restore(self, params: Any, opt: Any = None, *, step: int | None = None) -> SavedStep | None:
        """The newest step that is intact, bit for bit what was saved; None if nothing was ever saved.

        Args:
          params: the abstract model, whose leaves (jax.ShapeDtypeStruct) say dtype, shape and sharding.
          opt: the abstract optimizer state, None = leave it on disk.
          step: this very step or none; a damaged one is then an error, and stays where it is.

        A step that is damaged is moved to `<step>.damaged`, a warning names the leaves, and the step before is used.

        Raises:
          UserError: every step is damaged; there is no such step; the step holds another model or optimizer.
        """
        self.wait()
        steps = self.steps() if step is None else [self._require_step(step)]
        wanted = {"params": _restore_targets(params)} | ({} if opt is None else {"opt": _restore_targets(opt)})
        for candidate in reversed(steps):
            with _quiet_orbax():
                found, problems = self._read(candidate, wanted)
            if found is not None:
                params = tree.refill(params, found["params"])
                opt = None if opt is None else tree.refill(opt, found["opt"])
                return SavedStep(candidate, params, opt, found["data"], found["meta"])
            if step is not None:
                raise self._damaged_error(step, problems)
            then = "there is no step before" if candidate == steps[0] else "the step before is used"
            log.warning("%s\n%s; %s", self._damage_report(candidate, problems), self._move_aside(candidate), then)
        damaged = sorted(path.name for path in self.directory.glob("*.damaged*"))
        if damaged or steps:
            raise UserError(
                f"no checkpoint in {self.directory} is intact; damaged: {', '.join(damaged or map(str, steps))}. "
                f"To start over, remove them or choose another workdir"
            )
        return None

    def weights(self, step: int, params: Any) -> dict[str, Callable[[], jax.Array]]:
        """The stored leaves of a step's params by name, each read and checked when called; `params` as in `restore`.

        Raises:
          UserError: there is no such step, it holds another model, or it is damaged, at once or when a leaf is read;
            nothing is moved.
        """
        wanted = {"params": _restore_targets(params)}
        records, problems = self._read_records(self._require_step(step))
        if problems:
            raise self._damaged_error(step, problems)
        saved = records["meta"]["leaves"]
        self._refuse_other_model(step, saved, wanted)

        def read(name: str) -> jax.Array:
            try:
                found = self._load(step, {"params": _placeholders_except(name, wanted["params"])})["params"][name]
            except DAMAGE as error:
                raise self._damaged_error(step, [f"params.{name}: {_damage_reason(error)}"]) from None
            problems = _changed_leaves({"params": {name: found}}, saved)
            if problems:
                raise self._damaged_error(step, problems)
            return found

        return {name: partial(read, name) for name in wanted["params"]}

    def wait(self) -> None:
        """Returns when the last save is complete on disk; raises what went wrong with it."""
        self._orbax.wait()

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        self._orbax.wait()
        self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remove_incomplete(self) -> None:
        """What a save left that was killed. (Orbax can, but in a thread that a short run does not live to see end.)"""
        complete = self.steps()
        if jax.process_index() == 0:
            for path in self.directory.iterdir():
                # in a bucket, which cannot rename, a step has its name from the start and is complete by a marker
                if ".orbax-checkpoint-tmp" in path.name or (path.name.isdigit() and int(path.name) not in complete):
                    path.rmtree(missing_ok=True)

    def _require_step(self, step: int) -> int:
        steps = self.steps()
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise UserError(f"step {step} is not in {self.directory}; there are: {there}")
        return step

    def _read(self, step: int, wanted: Mapping[str, LeavesByName]) -> tuple[dict[str, Any] | None, list[str]]:
        """(the items, no problems) or (None, what is wrong with which leaf)."""
        records, problems = self._read_records(step)
        if problems:
            return None, problems
        saved = records["meta"]["leaves"]
        self._refuse_other_model(step, saved, wanted)
        arrays, failure = {}, None
        try:
            arrays = self._load(step, {item: named for item, named in wanted.items() if named})
        except DAMAGE as error:
            failure = error
        if _any_process([failure is not None])[0]:
            problems = self._unreadable_leaves(step, wanted)
            if not problems:  # then it is not the files
                raise failure or RuntimeError(f"another process could not read step {step}")
            return None, problems
        found = {item: arrays.get(item, {}) for item in wanted}
        problems = _changed_leaves(found, saved)
        if problems:
            return None, problems
        return {**found, "data": records["data"], "meta": records["meta"]["run"]}, []

    def _read_records(self, step: int) -> tuple[dict[str, Any], list[str]]:
        """The items data and meta, or what is wrong with them."""
        records: dict[str, Any] = {}
        problems = []
        for item in ("data", "meta"):
            try:
                records[item] = _unseal(self._load(step, {item: None})[item])
            except DAMAGE as error:
                problems.append(f"{item}: {_damage_reason(error)}")
        if not problems and records["meta"]["step"] != step:
            problems.append(f"meta: it says step {records['meta']['step']}")
        anywhere = _any_process([bool(problems)])[0]
        return records, problems or (["data or meta: unreadable in another process"] if anywhere else [])

    def _refuse_other_model(self, step: int, saved: Mapping[str, Any], wanted: Mapping[str, LeavesByName]) -> None:
        """What the step holds against what is asked for: a difference is not damage but another model."""
        holds = {name: _format_dtype_shape(facts) for name, facts in saved.items() if name.split(".")[0] in wanted}
        asked = {name: _format_dtype_shape(_dtype_shape(x)) for name, x in _flatten_items(wanted).items()}
        if holds != asked:
            raise UserError(
                f"step {step} in {self.directory} holds another model or optimizer than the one configured "
                f"(saved -> configured):\n{tree.difference(holds, asked)}\n"
                f"Use the settings it was saved with, or another workdir"
            )

    def _unreadable_leaves(self, step: int, wanted: Mapping[str, LeavesByName]) -> list[str]:
        """Which leaves cannot be read on their own, and why. (Orbax says of all faults only that nothing fits.)"""
        names = list(_flatten_items(wanted))
        reasons = {}
        for item, named in wanted.items():
            for leaf in named:
                try:
                    self._load(step, {item: _placeholders_except(leaf, named)})
                except DAMAGE as error:
                    reasons[f"{item}.{leaf}"] = _damage_reason(error)
        broken = _any_process([name in reasons for name in names])
        return [
            f"{n}: {reasons.get(n, 'unreadable in another process')}" for n, b in zip(names, broken, strict=True) if b
        ]

    def _damage_report(self, step: int, problems: list[str]) -> str:
        shown = problems if len(problems) <= 10 else [*problems[:9], f"and {len(problems) - 9} more"]
        return "\n  ".join([f"checkpoint {self.directory / str(step)} is damaged:", *shown])

    def _damaged_error(self, step: int, problems: list[str]) -> UserError:
        others = ", ".join(str(other) for other in self.steps() if other != step) or "none"
        return UserError(f"{self._damage_report(step, problems)}\nUse another step; there are: {others}")

    def _load(self, step: int, items: Mapping[str, Any]) -> dict[str, Any]:
        if not items:
            return {}
        with _context(single_process=True):
            return ocp.load_checkpointables(self.directory / str(step), dict(items))

    def _move_aside(self, step: int) -> str:
        """Moves a damaged step out of the way; says so."""
        if self._read_only:
            return "left where it is"
        said = "moved aside by process 0"
        if jax.process_index() == 0:
            place = self.directory / f"{step}.damaged"
            count = 1
            while place.exists():
                count += 1
                place = self.directory / f"{step}.damaged{count}"
            (self.directory / str(step)).rename(place)
            said = f"moved to {place.name}"
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"moved checkpoint {step}")
        self._orbax.reload()
        return said


def _context(*, single_process: bool = False) -> Any:
    """How Orbax saves and loads; `alone` = without waiting for the other processes.

    It would wait at a barrier for a process that cannot read its part of a leaf, for ever; `_anywhere` does not.
    """
    registry = ocp.handlers.local_registry()
    for item in ("data", "meta"):  # a dict of numbers would else become one tiny array per number
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=item)
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False  # float weights do not compress, and saves are waited for at the end
    if single_process:
        context.multiprocessing.active_processes = {jax.process_index()}
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.barrier_sync_key_prefix = f"process_{jax.process_index()}"
    return context


def _is_not_ocdbt_warning(record: logging.LogRecord) -> bool:
    """False for the warning that Orbax gives at each save without OCDBT: that there is nothing to merge."""
    return "Skipping merge of OCDBT" not in str(record.msg)


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Silences what Orbax's abandoned coroutines print as Python collects them: pages, after a leaf is unreadable."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        try:
            yield
        finally:
            gc.collect()
            sys.unraisablehook = hook


def _restore_targets(abstract: Any) -> LeavesByName:
    """The leaves by name, as what Orbax is to restore; without a sharding, to the first device."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaves = tree.named(abstract).items()
    return {
        n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or place) for n, x in leaves
    }


def _flatten_items(items: Mapping[str, LeavesByName]) -> LeavesByName:
    return {f"{item}.{name}": x for item, named in items.items() for name, x in named.items()}


def _checksums(items: Mapping[str, LeavesByName]) -> dict[str, int]:
    return checksum.checksums(_flatten_items(items))


def _changed_leaves(found: Mapping[str, LeavesByName], saved: Mapping[str, Any]) -> list[str]:
    """Which leaves are not what was saved."""
    return [
        f"{name}: the contents have changed (checksum {total}, saved with {saved[name]['checksum']})"
        for name, total in _checksums(found).items()
        if total != saved[name]["checksum"]
    ]


def _placeholders_except(leaf: str, named: LeavesByName) -> LeavesByName:
    return {name: x if name == leaf else ocp.PLACEHOLDER for name, x in named.items()}


def _dtype_shape(x: Any) -> dict[str, Any]:
    return {"dtype": str(x.dtype), "shape": list(x.shape)}


def _format_dtype_shape(facts: Mapping[str, Any]) -> str:
    return f"{facts['dtype']}{facts['shape']}"


def _require_json(what: str, value: Any) -> Any:
    if json.loads(json.dumps(value)) != value:
        raise TypeError(
            f"{what} does not come back from JSON as it is: {value!r}; use str keys, lists and plain numbers"
        )
    return value


def _seal(body: Any) -> dict[str, Any]:
    return {"sha256": _digest(body), "body": body}


def _unseal(record: Any) -> Any:
    if _digest(record["body"]) != record["sha256"]:
        raise ValueError("the contents have changed")
    return record["body"]


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _damage_reason(error: Exception) -> str:
    """The first line of the innermost cause; raises the error again if that is not about what the files hold."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).strip() or "no reason given"
    no_access = isinstance(cause, OSError | MemoryError) and not isinstance(cause, FileNotFoundError)
    if no_access or text.startswith(NOT_THE_FILES):
        raise error
    return f"{type(cause).__name__}: {text.splitlines()[0]}"


def _any_process(flags: Sequence[bool]) -> np.ndarray:
    """bool[n]: which flags are set in any process; all processes must act alike."""
    if jax.process_count() == 1:
        return np.asarray(flags)
    return multihost_utils.process_allgather(np.asarray(flags)).any(axis=0)
