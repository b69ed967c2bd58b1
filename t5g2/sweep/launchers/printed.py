"""The launcher `print`: the commands for a shell."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from t5g2.sweep import shared_runs
from t5g2.sweep.job_files import JobFiles
from t5g2.sweep.launchers.launcher import Launcher
from t5g2.sweep.sweep_job import SweepJob
from t5g2.sweep.words import command_line


@dataclass(frozen=True)
class Printed(Launcher):
    """Prints the commands, each after those that it needs."""

    writes: ClassVar[bool] = False

    @override
    def launch(self, jobs: Sequence[SweepJob], job_files: JobFiles) -> bool:
        links = shared_runs.shell_lines(jobs)
        for job in jobs:
            print(f"# {job.name}" + (f", after {', '.join(job.after)}" if job.after else ""))
            if job.name in links:
                print(links[job.name])
            print(command_line(job.arguments))
        return False
