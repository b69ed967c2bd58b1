"""The parts of a sweep as launchers see them: commands that come after others, and know nothing of what they do."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from t5g2.core.errors import UserError
from t5g2.sweep.parts import Sweep, Variant, expand


@dataclass(frozen=True)
class SweepJob:
    """A `t5g2` command of a sweep.

    Attributes:
      name: name in the sweep, of which its files are named.
      label: beginning of its lines on the terminal: "[2/3] adapted".
      arguments: words after `t5g2` on the command line.
      after: names of the jobs that must be done before.
      folder: the file or folder in the sweep's workdir that the command writes.
      result: the file or folder that exists once the command has ended well.
      identity: hex digits that change with the job's settings, and with those of the jobs before it.
      group: name that alike jobs share: runs of several seeds, or of other values of the same settings; None = no other
        job is like it.
      index: place within the group.
      inputs: the folders of the jobs in `after`.
      every_host: True if it runs on all hosts as one; False = on one of them.
      shared: True if other sweeps have the same job, and its folder is shared with them (shared_runs.py).
    """

    name: str
    label: str
    arguments: tuple[str, ...]
    after: tuple[str, ...]
    folder: Path
    result: Path
    identity: str
    group: str | None = None
    index: int = 0
    inputs: tuple[Path, ...] = ()
    every_host: bool = True
    shared: bool = False


def jobs_of(sweep: Sweep, folder: Path) -> list[SweepJob]:
    """Returns the jobs of a sweep, each after those that it needs.

    Raises:
      UserError: a config is wrong, or two variants are the same experiment.
    """
    places = _places(sweep)
    parts = sweep.ordered()
    width = max((len(part.name) for part in parts), default=0)
    settings: dict[str, str] = {}
    jobs: list[SweepJob] = []
    for number, part in enumerate(parts, 1):
        # every config is loaded here, so that a mistake in the last variant is an error before the first runs
        own = part.identity(folder)
        if isinstance(part, Variant):
            if own in settings:
                raise UserError(
                    f"{settings[own]} and {part.name} are the same experiment, setting by setting; take one of them "
                    f"out, or give it the overrides in which it differs"
                )
            settings[own] = part.name
        identities = {job.name: job.identity for job in jobs}
        text = own + "".join(identities[name] for name in sorted(part.after))
        result = part.result(folder)
        group, index = places.get(part.name, (None, 0))
        jobs.append(
            SweepJob(
                name=part.name,
                label=f"[{number}/{len(parts)}] {part.name:{width}}",
                arguments=tuple(part.arguments(folder)),
                after=part.after,
                folder=folder / result.relative_to(folder).parts[0],
                result=result,
                identity=hashlib.sha256(text.encode()).hexdigest()[:16],
                group=group,
                index=index,
                inputs=tuple(job.folder for job in jobs if job.name in part.after),
                every_host=part.every_host,
                shared=isinstance(part, Variant) and part.shared,
            )
        )
    return jobs


def _places(sweep: Sweep) -> dict[str, tuple[str, int]]:
    """Returns {run: (its group, place in it)} of runs that are alike."""
    alike: dict[object, list[str]] = {}
    for part in sweep.parts:
        if part.seeds is not None:
            alike[part.name] = [run.name for run in expand(part)]
        elif isinstance(part, Variant):
            # such as those of a grid
            alike.setdefault((part.config, *part.overrides, part.after), []).append(part.name)
    groups = [names for names in alike.values() if len(names) > 1]
    return {name: (names[0], place) for names in groups for place, name in enumerate(names)}


def needed(job: SweepJob, jobs: Sequence[SweepJob]) -> list[SweepJob]:
    """Returns those of `jobs` that must be done before `job`."""
    return [other for other in jobs if other.name in job.after]
