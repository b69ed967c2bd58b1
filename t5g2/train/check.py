"""The dry run: everything about a run that can be known before there is a weight, and one batch of its data."""

import collections
from pathlib import Path

import jax
import numpy as np

from t5g2.core import logs, mesh, tree
from t5g2.core.errors import UserError
from t5g2.data.pipeline import Pipeline
from t5g2.models import flops
from t5g2.train import start
from t5g2.train.experiment import Experiment


def check(experiment: Experiment, *, devices: int = 0, hbm_gib: float = 0.0) -> None:
    """Prints weights and their shardings, memory per device, FLOPs by part, and what one batch is like.

    Args:
      devices: simulate so many (on CPU); 0 = those of this machine.
      hbm_gib: memory of a device; 0 = do not compare.

    Raises:
      UserError: something does not fit: mesh and devices, lengths and text, memory.
    """
    if devices:
        _simulate(devices)
    logs.setup()
    world = mesh.make(experiment.mesh)
    rows = start.local_rows(experiment, world)
    with jax.set_mesh(world):
        plan = start.plan(experiment, world)
        print(_weights(plan))
        needed = _memory(plan)
        with Pipeline(experiment.data, seed=experiment.train.seed, rows=rows) as pipeline:
            batch = pipeline.next()
        print(_batch(experiment, pipeline.statistics.summary(), flops.of_batch(experiment.model, batch.batch)))
    if experiment.init.adapt and not Path(experiment.init.adapt.source).exists():
        print(f"init.adapt.source, {experiment.init.adapt.source}, does not exist yet; it must when the run starts")
    if hbm_gib and needed > hbm_gib:
        raise UserError(
            f"the run needs {needed:.2f} GiB per device and a device has --hbm_gib={hbm_gib:g}; use more devices along "
            f"mesh.fsdp or mesh.tensor, more train.microbatches, compute.remat=block, or fewer data.rows"
        )
    print("the experiment is sound")


def _simulate(devices: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # the devices are there already, because something asked for them before
        if jax.device_count() != devices:
            raise UserError(
                f"--devices={devices}, but this process has {jax.device_count()} already; check from a new process"
            ) from None


def _weights(plan: start.Plan) -> str:
    """A line a path: how many layers have it, its shape, how it is cut."""
    leaves = tree.leaves(plan.abstract.params)
    by_path = collections.defaultdict(list)
    for leaf in leaves.values():
        by_path[leaf.path].append(leaf)
    lines = ["weights                                   layers  shape of one          cut over"]
    for path, found in by_path.items():
        spec = [", ".join(mesh.RULES[axis]) if axis else "" for axis in found[0].axes]
        cut = ", ".join(f"{axis}: {over}" for axis, over in zip(found[0].axes, spec, strict=True) if over)
        lines.append(f"{path:42}{len(found):6}  {list(found[0].shape)!s:20}  {cut or '-'}")
    components = collections.Counter()
    for leaf in leaves.values():
        components[leaf.path.split(".")[0]] += int(np.prod(leaf.shape))
    total = sum(components.values())
    parts = ", ".join(f"{name} {count:,}" for name, count in components.items())
    return "\n".join([*lines, f"{total:,} parameters: {parts}", ""])


def _memory(plan: start.Plan) -> float:
    """Compiles the step and prints GiB per device; returns their sum."""
    compiled = plan.compile()
    memory = compiled.memory_analysis()
    state, temporary = memory.argument_size_in_bytes / 2**30, memory.temp_size_in_bytes / 2**30
    print(f"memory per device: {state:.3f} GiB of state and batch, {temporary:.3f} GiB temporary")
    return state + temporary


def _batch(experiment: Experiment, summary: dict[str, float], flop: float) -> str:
    tokens = summary["encoder_tokens"] + summary["decoder_tokens"]
    padding = (
        f"{summary['encoder_padding']:.1%} of the encoder's slots, {summary['decoder_padding']:.1%} of the decoder's"
    )
    return (
        f"one batch: {experiment.data.rows} rows, {tokens:,} tokens, {summary['examples_per_row']:.1f} examples a row; "
        f"padding: {padding}\n"
        f"one update: {logs.short(flop)}FLOP for these masks, {logs.short(flop / tokens)}FLOP a token; "
        f"{experiment.train.steps:,} updates: {logs.short(flop * experiment.train.steps)}FLOP"
    )
