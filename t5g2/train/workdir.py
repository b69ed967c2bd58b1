"""The workdir of a run: whose it is, what it holds, and whether the run is done."""

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from t5g2.core.errors import UserError
from t5g2.train import experiment as experiments
from t5g2.train.experiment import Experiment

log = logging.getLogger("t5g2")

RECORD, DONE, CHECKPOINTS, MODEL, PROVENANCE = "experiment.json", "done.json", "checkpoints", "model", "provenance.json"


@contextmanager
def claimed(
    workdir: Path, experiment: Experiment, *, replay: int | None = None, allow_change: tuple[str, ...] = ()
) -> Iterator[None]:
    """Keeps other trainers out of the workdir, and compares the experiment with the one whose checkpoints it holds.

    Nothing in the folder is changed here: `record` makes it this experiment's once everything has been looked at that
    can be wrong; of a run that fails before, nothing is left. A replay only looks.

    Raises:
      UserError: the folder is a file, belongs to a sweep, holds a different experiment, or is in use.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; give a folder, which is made if it is missing")
    if (workdir / "sweep.json").exists():
        raise UserError(f"{workdir} is the workdir of a sweep; give the run a folder of its own")
    if jax.process_index() != 0 or replay is not None:  # one process writes
        compare_record(workdir, experiment, allow_change=allow_change)
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made or written to ({error}); give another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process trains in {workdir}; wait for it, or give another --workdir") from None
        try:
            compare_record(workdir, experiment, allow_change=allow_change)
            yield
        finally:
            if not (workdir / RECORD).exists():
                _remove_traces(workdir)


def compare_record(workdir: Path, experiment: Experiment, *, allow_change: tuple[str, ...] = ()) -> None:
    """Logs what differs, and may, from the experiment whose checkpoints the workdir holds; without any it is free.

    Raises:
      UserError: something differs that may not, or the record cannot be read.
    """
    saved = list((workdir / CHECKPOINTS).glob("[0-9]*"))
    if not saved or not (workdir / RECORD).exists():
        return
    try:
        record = read_json(workdir / RECORD)
    except ValueError as error:
        raise UserError(
            f"{workdir / RECORD} is damaged ({error}), so what {workdir / CHECKPOINTS} holds is "
            f"unknown; put the file back, or give another --workdir"
        ) from None
    changes = experiments.check_resume(record, experiments.dump(experiment), allow=allow_change)
    for path, (old, new) in changes.items():
        log.info("resumed with another %s: %r -> %r", path, old, new)


def record(workdir: Path, experiment: Experiment, provenance: Any) -> None:
    """Makes the workdir this experiment's: experiment.json, provenance.json; a run that goes on is not done."""
    if jax.process_index() != 0:
        return
    (workdir / DONE).unlink(missing_ok=True)
    write_json(workdir / RECORD, experiments.dump(experiment))
    if provenance is not None:
        write_json(workdir / PROVENANCE, provenance)


def is_done(workdir: Path, experiment: Experiment, step: int) -> bool:
    """Whether a run that stands at `step` has ended there, and left what it was to leave."""
    if step != experiment.train.steps or not (workdir / DONE).exists():
        return False
    return read_json(workdir / DONE)["step"] == step and ((workdir / MODEL).exists() or not experiment.save.model)


def _remove_traces(workdir: Path) -> None:
    """Removes what a claim has made, as far as nothing else is in it."""
    (workdir / ".lock").unlink(missing_ok=True)
    for folder in (workdir / CHECKPOINTS, workdir):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text())
