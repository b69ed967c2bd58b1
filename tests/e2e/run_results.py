"""Results that a run leaves in its workdir and that must not differ from run to run."""

import json
from pathlib import Path

# rates and times differ from run to run, and so do lines that a stop cut short; everything else must not
TIMED = ("wall", "tokens_per_s", "flops_per_s", "mfu", "memory", "steps_per_s", "seconds")


def metrics(workdir: Path) -> dict[tuple[int, str], float]:
    """Returns {(step, name): value} of what a run recorded, rates and times left out; a line without an end is none."""
    text = (workdir / "metrics.jsonl").read_text()
    values = {}
    for row in map(json.loads, text[: text.rfind("\n") + 1].splitlines()):
        for name, value in row.items():
            if name != "step" and not any(part in name for part in TIMED):
                assert (row["step"], name) not in values, f"{name} is recorded twice at step {row['step']}"
                values[row["step"], name] = value
    return values


def checksums(workdir: Path, step: int) -> dict[str, int]:
    """Returns the checksum of every leaf of a saved state."""
    meta = json.loads(next((workdir / "checkpoints" / str(step) / "meta").glob("*.json")).read_text())
    return {name: facts["checksum"] for name, facts in meta["body"]["leaves"].items()}


def saved_steps(workdir: Path) -> list[int]:
    """Returns the steps that a workdir holds, ascending."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())
