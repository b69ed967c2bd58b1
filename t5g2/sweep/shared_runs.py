"""Runs that several sweeps have: trained once, by the first sweep that asks, and linked into the workdir of each.

    runs/table1/source-s0  ->  ../shared/3f2a91c04d5e6b78
    runs/table3/source-s0  ->  ../shared/3f2a91c04d5e6b78
    runs/shared/3f2a91c04d5e6b78/                          an ordinary workdir, named after its settings

So a source is shared by all sweeps whose workdirs lie side by side. Other settings have another folder, and a run that
is done is done for all. Of two sweeps that ask at once, one trains; the other ends, and says that the folder is in use.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from t5g2.core.errors import UserError
from t5g2.sweep.job_files import JobFiles
from t5g2.sweep.sweep_job import SweepJob

FOLDER = "shared"


def link(jobs: Iterable[SweepJob], job_files: JobFiles) -> None:
    """Makes the folder of each shared run a link to the one beside the sweep's workdir.

    A folder that is there already, of a sweep that did not share its run, stays.

    Raises:
      UserError: the folder or the link cannot be made.
    """
    for job in jobs:
        if not job.shared or (job.folder.exists() and not job.folder.is_symlink()):
            continue
        workdir = job.folder.parent.resolve()
        run = workdir.parent / FOLDER / job.identity
        target = Path(os.path.relpath(run, workdir))
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
