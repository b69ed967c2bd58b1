"""Average of the last checkpoints of a run, as a model folder."""

from os import PathLike
from pathlib import Path

from t5g2.checkpoint import averaging
from t5g2.checkpoint import folder as folders
from t5g2.core import files
from t5g2.models import build
from t5g2.train import files_of_weights
from t5g2.train import workdir as workdirs


def average_run(workdir: str | PathLike, out: str | PathLike, *, last: int) -> list[int]:
    """Writes the mean of a run's last checkpoints as a model folder, leaf by leaf; returns the steps.

    Raises:
      UserError: `out` exists, the workdir holds no run or fewer checkpoints, or one is damaged.
    """
    files.refuse_existing(out)
    workdir = Path(workdir)
    experiment = workdirs.read_experiment(workdir)
    abstract = build.abstract(experiment.model, experiment.train.param_dtype)
    tokenizer = experiment.data.tokenizer
    beside = files_of_weights.read_or_warn(workdirs.first_init(experiment), experiment)
    with workdirs.open_checkpoints(workdir, experiment, read_only=True) as checkpoints:
        # leaves are averaged as they are written, so the checkpoints stay open until the folder is complete
        steps = averaging.newest_steps(checkpoints, last)
        folders.save_leaves(
            out,
            experiment.model,
            averaging.mean_leaves(checkpoints, steps, abstract),
            json_files={
                folders.TOKENIZER: tokenizer.to_dict(),
                folders.PROVENANCE: {"average_of_steps": steps, "workdir": str(workdir.absolute())},
                **beside.json_files,
            },
            extra_files=beside.files,
        )
    what = f"checkpoints of steps {', '.join(map(str, steps))}" if len(steps) > 1 else f"checkpoint of step {steps[0]}"
    print(f"averaged the {what} into {Path(out).absolute()}")
    return steps
