"""Train states on disk: saved in the background, verified when they are restored.

A step is a folder of separate items, each of which can be read alone:

    <step>/params/<leaf>/…   the weights, one folder per stored leaf (core/tree.py names them)
    <step>/opt/<leaf>/…      the optimizer's state, likewise
    <step>/data/data.json    stream positions of the examples that were trained on, not of those that were prefetched
    <step>/meta/data.json    data that the caller needs on resume, and dtype, shape and checksum of every leaf

Orbax restores a flipped bit without a warning and reports all other faults alike, hence the checksums. Each leaf has a
folder of its own (no OCDBT, which packs leaves into shared files), so that damage on disk can be traced to a leaf.
"""

import gc
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from t5g2.checkpoint import checksum
from t5g2.checkpoint.save_errors import SaveErrors
from t5g2.checkpoint.sealed_records import digest, require_json, seal, unseal
from t5g2.checkpoint.step_list import listed
from t5g2.core import tree
from t5g2.core.distributed import any_process
from t5g2.core.errors import UserError
from t5g2.core.logs import log

LeavesByName = dict[str, Any]
# Errors raised on damaged files. Other errors, and these with one of the causes below, are not about the files.
DAMAGE = (KeyError, ValueError, TypeError, FileNotFoundError, EOFError)
NOT_THE_FILES = ("PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED")


class SavedStep(NamedTuple):
    """A saved step; `params` and `opt` have the structure of the arguments of `restore`, where opt may be None."""

    step: int
    params: Any
    opt: Any
    data: Any
    meta: Any


class Checkpoints:
    """The checkpoints of a run.

    Args:
      directory: folder with one folder per step; created if it is missing.
      keep: number of newest steps to keep; older ones are deleted when a newer one is complete.
      read_only: nothing is deleted, moved or cleaned up, because another process may be writing.
    """

    def __init__(self, directory: str | PathLike, *, keep: int = 3, read_only: bool = False):
        self.directory = epath.Path(directory).absolute()  # may be a bucket
        self._read_only = read_only
        self._errors = SaveErrors(self.directory)
        if read_only and not self.directory.is_dir():
            raise UserError(f"{self.directory} does not exist; give the workdir of a run that has saved a checkpoint")
        if keep < 1:
            raise UserError(f"keep = {keep}; it must be at least 1, because the newest checkpoint is always kept")
        policies: Any = ocp.training.preservation_policies
        decisions: Any = ocp.training.save_decision_policies
        self._orbax = listed(
            self.directory,
            lambda: ocp.training.Checkpointer(
                self.directory,
                context=_context(),
                # the train loop decides when to save
                save_decision_policy=decisions.FixedIntervalPolicy(1),
                preservation_policy=policies.PreserveAll() if read_only else policies.LatestN(keep),
            ),
        )
        if not read_only:
            self._remove_incomplete(keep)

    def steps(self) -> list[int]:
        """Returns the steps that are complete on disk, ascending; waits for a save by this process."""
        # a save removes an old step when it is complete, while Orbax would list them
        self.wait()
        listed(self.directory, self._orbax.reload)
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def save(self, step: int, params: Any, opt: Any, *, data: Any, meta: Any) -> None:
        """Saves in the background. On return the arrays have been copied, so they may be donated to the next step.

        Args:
          step: updates completed.
          params: the model.
          opt: the optimizer's state, any tree of arrays.
          data: stream positions, plain data.
          meta: data that restore returns with the state (seed, fingerprint of the experiment), plain data.

        Raises:
          FileExistsError: the step exists already; nothing is overwritten.
          TypeError: `data` or `meta` would change in JSON.
        """
        assert not self._read_only
        self.wait()
        if step in self.steps():
            raise FileExistsError(f"step {step} is already saved in {self.directory}; it is not overwritten")
        # checksums are computed before the arrays are copied, so they cover the copy to the host too
        items = {"params": tree.named(params), "opt": tree.named(opt)}
        sums = _checksums(items)
        leaves = {name: _dtype_shape(x) | {"checksum": sums[name]} for name, x in _flatten_items(items).items()}
        records = {
            "data": require_json("data", data),
            # the digest binds the positions to this step, as the checksums bind the leaves
            "meta": {"step": step, "data": digest(data), "leaves": leaves, "run": require_json("meta", meta)},
        }
        arrays = {item: named for item, named in items.items() if named}  # Orbax has no empty items
        sealed = {item: seal(record) for item, record in records.items()}
        self._errors.check_room(step, sum(x.nbytes for x in _flatten_items(items).values()))
        with self._errors.translated():
            self._orbax.save_checkpointables_async(step, arrays | sealed, force=True)

    def restore(self, params: Any, opt: Any = None, *, step: int | None = None) -> SavedStep | None:
        """Returns the newest intact step, bit for bit as it was saved; None if nothing was ever saved.

        A damaged step is moved to `<step>.damaged`, a warning names the leaves, and the step before is used.

        Args:
          params: the abstract model, whose leaves (jax.ShapeDtypeStruct) have dtype, shape and sharding.
          opt: the abstract optimizer state, None = leave it on disk.
          step: the only step to try; if it is damaged, that is an error, and it is not moved.

        Raises:
          UserError: every step is damaged; the step does not exist; the step holds another model or optimizer.
        """
        self.wait()
        steps = self.steps() if step is None else [self._require_step(step)]
        targets = {"params": _restore_targets(params)} | ({} if opt is None else {"opt": _restore_targets(opt)})
        for candidate in reversed(steps):
            with _quiet_orbax():
                items, problems = self._read(candidate, targets)
            if items is not None:
                params = tree.refill(params, items["params"])
                opt = None if opt is None else tree.refill(opt, items["opt"])
                return SavedStep(candidate, params, opt, items["data"], items["meta"])
            if step is not None:
                raise self._damaged_error(step, problems)
            fallback = "there is no step before" if candidate == steps[0] else "the step before is used"
            log.warning("%s\n%s; %s", self._damage_report(candidate, problems), self._move_aside(candidate), fallback)
        # starting over silently would discard the run, so damage to all steps is an error, now and on the next start
        damaged = sorted(path.name for path in self.directory.glob("*.damaged*"))
        if damaged or steps:
            raise UserError(
                f"no checkpoint in {self.directory} is intact; damaged: {', '.join(damaged or map(str, steps))}. "
                f"To start over, remove them or choose another workdir"
            )
        return None

    def weights(self, step: int, params: Any) -> dict[str, Callable[[], jax.Array]]:
        """Returns functions by name that read and verify the stored leaves of a step's params.

        Args:
          step: the step.
          params: the abstract model, as in `restore`.

        Raises:
          UserError: the step does not exist, holds another model, or is damaged; damage to a leaf is detected when
            it is read. Nothing is moved.
        """
        targets = {"params": _restore_targets(params)}
        records, problems = self._read_records(self._require_step(step))
        if problems:
            raise self._damaged_error(step, problems)
        saved = records["meta"]["leaves"]
        self._refuse_other_model(step, saved, targets)

        def read(name: str) -> jax.Array:
            try:
                leaf = self._load(step, {"params": _placeholders_except(name, targets["params"])})["params"][name]
            except DAMAGE as error:
                raise self._damaged_error(step, [f"params.{name}: {_damage_reason(error)}"]) from None
            problems = _changed_leaves({"params": {name: leaf}}, saved)
            if problems:
                raise self._damaged_error(step, problems)
            return leaf

        return {name: partial(read, name) for name in targets["params"]}

    def wait(self) -> None:
        """Waits until the last save is complete on disk.

        Raises:
          UserError: the disk is full, or the folder cannot be written any more; later calls do nothing.
        """
        if not self._errors.failed:
            with self._errors.translated():
                self._orbax.wait()

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        self.wait()
        # a save that has failed would raise its error again
        if not self._errors.failed:
            self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remove_incomplete(self, keep: int) -> None:
        """Removes the remains of a save, or of a removal, that was killed.

        (Orbax removes those of a save in a thread, too late for a short run, and those of a removal at the next save.)
        """
        complete = self.steps()
        # one of the newest without a record is damaged, and reported when it is read
        complete = [step for step in complete if step in complete[-keep:] or self._has_record(step)]
        if jax.process_index() == 0:
            for path in self.directory.iterdir():
                # a bucket cannot rename: an incomplete step there has its final name, and lacks the marker file
                if ".orbax-checkpoint-tmp" in path.name or (path.name.isdigit() and int(path.name) not in complete):
                    path.rmtree(missing_ok=True)

    def _has_record(self, step: int) -> bool:
        return any((self.directory / str(step) / "meta").glob("*.json"))

    def _require_step(self, step: int) -> int:
        steps = self.steps()
        if step not in steps:
            available = ", ".join(map(str, steps)) or "none"
            raise UserError(f"step {step} is not in {self.directory}; there are: {available}")
        return step

    def _read(self, step: int, targets: Mapping[str, LeavesByName]) -> tuple[dict[str, Any] | None, list[str]]:
        """Returns (the items, no problems) or (None, a line for each damaged leaf)."""
        records, problems = self._read_records(step)
        if problems:
            return None, problems
        saved = records["meta"]["leaves"]
        self._refuse_other_model(step, saved, targets)
        arrays, failure = {}, None
        try:
            arrays = self._load(step, {item: named for item, named in targets.items() if named})
        except DAMAGE as error:
            failure = error
        # all processes take the same branch, or one would wait for the others in a collective operation
        if any_process([failure is not None])[0]:
            problems = self._unreadable_leaves(step, targets)
            if not problems:  # every leaf can be read alone, so the files are not the cause
                raise failure or RuntimeError(f"another process could not read step {step}")
            return None, problems
        items = {item: arrays.get(item, {}) for item in targets}
        problems = _changed_leaves(items, saved)
        if problems:
            return None, problems
        return {**items, "data": records["data"], "meta": records["meta"]["run"]}, []

    def _read_records(self, step: int) -> tuple[dict[str, Any], list[str]]:
        """Returns (the items data and meta, a line for each that is damaged)."""
        records: dict[str, Any] = {}
        problems = []
        for item in ("data", "meta"):
            try:
                records[item] = unseal(self._load(step, {item: None})[item])
            except DAMAGE as error:
                problems.append(f"{item}: {_damage_reason(error)}")
        if not problems and records["meta"]["step"] != step:
            problems.append(f"meta: it belongs to step {records['meta']['step']}")
        # steps of earlier versions have no digest of their positions
        if not problems and records["meta"].get("data") not in (None, digest(records["data"])):
            problems.append("data: the positions belong to another step")
        anywhere = any_process([bool(problems)])[0]
        return records, problems or (["data or meta: unreadable in another process"] if anywhere else [])

    def _refuse_other_model(self, step: int, saved: Mapping[str, Any], targets: Mapping[str, LeavesByName]) -> None:
        """Raises UserError if the step holds other leaves than the targets, which is not damage but another model."""
        stored = {name: _format_dtype_shape(leaf) for name, leaf in saved.items() if name.split(".")[0] in targets}
        configured = {name: _format_dtype_shape(_dtype_shape(x)) for name, x in _flatten_items(targets).items()}
        if stored != configured:
            raise UserError(
                f"step {step} in {self.directory} holds another model or optimizer than the one configured "
                f"(saved -> configured):\n{tree.difference(stored, configured)}\n"
                f"Use the settings it was saved with, or another workdir"
            )

    def _unreadable_leaves(self, step: int, targets: Mapping[str, LeavesByName]) -> list[str]:
        """Returns a line for each leaf that cannot be read alone. (Orbax reports only that the tree does not match.)"""
        names = list(_flatten_items(targets))
        reasons = {}
        for item, named in targets.items():
            for leaf in named:
                try:
                    self._load(step, {item: _placeholders_except(leaf, named)})
                except DAMAGE as error:
                    reasons[f"{item}.{leaf}"] = _damage_reason(error)
        broken = any_process([name in reasons for name in names])
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
        """Moves a damaged step out of the way; returns a description of the result."""
        if self._read_only:
            return "left where it is"
        result = "moved aside by process 0"
        if jax.process_index() == 0:
            place = self.directory / f"{step}.damaged"
            count = 1
            while place.exists():
                count += 1
                place = self.directory / f"{step}.damaged{count}"
            (self.directory / str(step)).rename(place)
            result = f"moved to {place.name}"
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"moved checkpoint {step}")
        self._orbax.reload()
        return result


def _context(*, single_process: bool = False) -> Any:
    """Returns the options with which Orbax saves and loads.

    Args:
      single_process: do not wait for the other processes: Orbax would wait forever at a barrier for a process that
        cannot read its part of a leaf; `any_process` does not.
    """
    registry = ocp.handlers.local_registry()
    for item in ("data", "meta"):  # else a dict of numbers would become one tiny array per number
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=item)
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False  # float weights do not compress, and the last save is waited for
    # devices with the same array each write a part of it; a program and a file for a part of a norm would cost more
    context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
    if single_process:
        context.multiprocessing.active_processes = {jax.process_index()}
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.barrier_sync_key_prefix = f"process_{jax.process_index()}"
    return context


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Silences Orbax's abandoned coroutines, which print pages when Python collects them after an unreadable leaf."""
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
    """Returns the leaves by name, as targets for Orbax to restore to; without a sharding, the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaves = tree.named(abstract).items()
    return {
        n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or device) for n, x in leaves
    }


def _flatten_items(items: Mapping[str, LeavesByName]) -> LeavesByName:
    return {f"{item}.{name}": x for item, named in items.items() for name, x in named.items()}


def _checksums(items: Mapping[str, LeavesByName]) -> dict[str, int]:
    return checksum.checksums(_flatten_items(items))


def _changed_leaves(items: Mapping[str, LeavesByName], saved: Mapping[str, Any]) -> list[str]:
    """Returns a line for each leaf whose checksum is not the one that was saved."""
    return [
        f"{name}: the contents have changed (checksum {total}, saved with {saved[name]['checksum']})"
        for name, total in _checksums(items).items()
        if total != saved[name]["checksum"]
    ]


def _placeholders_except(leaf: str, named: LeavesByName) -> LeavesByName:
    return {name: x if name == leaf else ocp.PLACEHOLDER for name, x in named.items()}


def _dtype_shape(x: Any) -> dict[str, Any]:
    return {"dtype": str(x.dtype), "shape": list(x.shape)}


def _format_dtype_shape(leaf: Mapping[str, Any]) -> str:
    return f"{leaf['dtype']}{leaf['shape']}"


def _damage_reason(error: Exception) -> str:
    """Returns the first line of the innermost cause; raises the error again if it is not about the files' contents."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).strip() or "no reason given"
    no_access = isinstance(cause, OSError | MemoryError) and not isinstance(cause, FileNotFoundError)
    if no_access or text.startswith(NOT_THE_FILES):
        raise error
    return f"{type(cause).__name__}: {text.splitlines()[0]}"
