"""Runs that several sweeps have: trained once, by the first sweep that asks, and linked into the workdir of each.

    runs/table1/source-s0  ->  ../shared/3f2a91c04d5e6b78
    runs/table3/source-s0  ->  ../shared/3f2a91c04d5e6b78
    runs/shared/3f2a91c04d5e6b78/                          an ordinary workdir, named after its settings

So a source is shared by all sweeps whose workdirs lie side by side. Other settings have another folder, and a run that
is done is done for all. Of two sweeps that ask at once, one trains; the other waits for its job, or ends and says that
it is at work (job_files.py).
"""

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from t5g2.core.errors import UserError
from t5g2.sweep.job_files import JobFiles
from t5g2.sweep.sweep_job import SweepJob

FOLDER = "shared"


def shell_lines(jobs: Iterable[SweepJob]) -> dict[str, str]:
    """Returns {name of a job: commands of a shell that do for it what `link` does}."""
    lines = {}
    for job in jobs:
        if job.shared and (job.folder.is_symlink() or not job.folder.exists()):
            run, target = _run_and_target(job)
            words = ["mkdir", "-p", str(job.folder.parent), str(run)], ["ln", "-sfn", str(target), str(job.folder)]
            lines[job.name] = " && ".join(map(shlex.join, words))
    return lines


def _run_and_target(job: SweepJob) -> tuple[Path, Path]:
    """Returns the folder of a shared run, and the same as a link in the sweep's workdir names it."""
    workdir = job.folder.parent.resolve()
    shared = workdir.parent / FOLDER
    # a run of an earlier version keeps its name
    names = (name for name in (job.identity, *job.former) if (shared / name).exists())
    run = shared / next(names, job.identity)
    return run, Path(os.path.relpath(run, workdir))


def link(jobs: Iterable[SweepJob], job_files: JobFiles) -> None:
    """Makes the folder of each shared run a link to the one beside the sweep's workdir.

    A folder that is there already, of a sweep that did not share its run, stays.

    Raises:
      UserError: the folder or the link cannot be made.
    """
    for job in jobs:
        if not job.shared or (job.folder.exists() and not job.folder.is_symlink()):
            continue
        run, target = _run_and_target(job)
        try:
            run.mkdir(parents=True, exist_ok=True)
            if job.folder.is_symlink() and job.folder.readlink() != target:
                # of other settings; what was done with them is no longer this job's
                job.folder.unlink()
                job_files.mark(job).unlink(missing_ok=True)
            if not job.folder.is_symlink():
                job.folder.symlink_to(target)
        except OSError as error:
            raise UserError(
                f"{job.folder} cannot be made a link to {run} ({error}); make {run.parent} writable, or give the sweep "
                f"another --workdir"
            ) from None
