"""A search for the settings nearest to those of a run with which its step fits the memory of a target."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from t5g2.core import sharding
from t5g2.core.device import GIB
from t5g2.core.errors import UserError
from t5g2.core.tpu_chips import Target
from t5g2.jobs import tpu_compiler
from t5g2.jobs.memory_estimate import estimate
from t5g2.train import plan as plans
from t5g2.train.experiment import Experiment
from t5g2.train.plan import Plan

TRIES = 3  # settings that are compiled


class Candidate(NamedTuple):
    """Settings, by dotted path, that differ from those of the run; the experiment with them."""

    changes: dict[str, Any]
    experiment: Experiment

    @property
    def flags(self) -> str:
        """The flags that set them."""
        return " ".join(f"--config.{path}={value}" for path, value in self.changes.items())


def report(plan: Plan, target: Target, most: int, *, used: int) -> str:
    """Returns the nearest settings that the estimate says fit, confirmed by the compiler, in lines.

    Args:
      most: bytes of a device that the step may take.
      used: those that the plan's step takes; estimates are corrected by what the compiler says of this one.
    """
    factor = used / estimate(plan).total
    lines, tries = ["the nearest settings, by the estimate and then by the compiler:"], 0
    for candidate in candidates(plan.experiment, plan.mesh.shape):
        try:
            mesh = sharding.make(candidate.experiment.mesh, list(plan.mesh.devices.flat))
            plans.all_rows(candidate.experiment, mesh)
            with jax.set_mesh(mesh):
                other = plans.make(candidate.experiment, mesh)
                estimated = factor * estimate(other).total
                if estimated > most:
                    continue
                used = tpu_compiler.compile_step(other).used
        except UserError:  # this mesh does not fit the rows, or the heads
            continue
        tries += 1
        verdict = "fits" if used <= most else "does not fit"
        lines.append(f"  {candidate.flags}: estimate {estimated / GIB:.2f} GiB, compiled {used / GIB:.2f}, {verdict}")
        if used <= most or tries == TRIES:
            break
    if not tries:
        lines.append(f"  none: with every remat, microbatch and mesh the estimate is above {target}'s memory")
    return "\n".join(lines)


def candidates(experiment: Experiment, axes: Mapping[str, int]) -> Iterator[Candidate]:
    """Yields settings from the nearest on: those that change least, and among them those that cost least time.

    The mesh changes most, because a batch is chosen with it in mind; then what is recomputed in the backward pass, and
    then the number of microbatches.

    Args:
      axes: sizes of the axes of the mesh, as they are on the devices.
    """
    train, compute = experiment.train, experiment.compute
    policies = ("none", "attention", "block")  # from the one that keeps most to the one that keeps least
    policies = policies[policies.index(compute.remat) :] if compute.remat in policies else (compute.remat, "block")
    parts = [train.microbatches * 2**power for power in range(12)]
    parts = [count for count in parts if experiment.data.rows % count == 0]
    for sizes, remat, count in itertools.product(_meshes(axes), policies, parts):
        changes: dict[str, Any] = {f"mesh.{axis}": size for axis, size in sizes.items()}
        if remat != compute.remat:
            changes["compute.remat"] = remat
        if count != train.microbatches:
            changes["train.microbatches"] = count
        if not changes:
            continue
        changed = dataclasses.replace(
            experiment,
            mesh=dataclasses.replace(experiment.mesh, **sizes),
            compute=dataclasses.replace(compute, remat=remat),
            train=dataclasses.replace(train, microbatches=count),
        )
        yield Candidate(changes, changed)


def _meshes(axes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Yields the axes of meshes that differ from the run's: none, and then rows over fsdp alone, with tensor or not."""
    yield {}
    devices = axes["data"] * axes["fsdp"] * axes["tensor"]
    for tensor in (1, 2, 4, 8):
        if devices % tensor == 0:
            sizes = {"data": 1, "fsdp": devices // tensor, "tensor": tensor}
            if any(axes[axis] != size for axis, size in sizes.items()):
                yield sizes
