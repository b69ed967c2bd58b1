"""The dry run: everything about a run that can be known before there is a weight, and one batch of its data."""

import collections
from pathlib import Path

import jax
import numpy as np

from t5g2.adapt import rules
from t5g2.checkpoint import folder as folders
from t5g2.core import logs, mesh, settings, tree
from t5g2.core.errors import UserError
from t5g2.data.pipeline import Pipeline
from t5g2.models import flops
from t5g2.models.config import to_dict
from t5g2.train import start
from t5g2.train.experiment import Experiment
from t5g2.train.preview import padding


def check(experiment: Experiment, *, devices: int = 0, hbm_gib: float = 0.0) -> None:
    """Prints weights and their shardings, memory per device, FLOPs by part, and what one batch is like.

    Args:
      devices: simulate so many (on CPU); 0 = those of this machine.
      hbm_gib: memory of a device; 0 = do not compare.

    Raises:
      UserError: something does not fit: mesh and devices, lengths and text, memory, the weights to begin with.
    """
    if devices:
        _simulate(devices)
    logs.setup()
    origin = _origin(experiment)
    world = mesh.make(experiment.mesh)
    rows = start.local_rows(experiment, world)
    with jax.set_mesh(world):
        plan = start.plan(experiment, world)
        print(weights_table(plan))
        needed = _memory(plan)
        with Pipeline(experiment.data, seed=experiment.train.seed, rows=rows) as pipeline:
            batch = pipeline.next()
        print(_batch(experiment, pipeline.statistics.summary(), flops.of_batch(experiment.model, batch.batch)))
    print(origin)
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


def _origin(experiment: Experiment) -> str:
    """Where the weights will come from; a model folder that is there already is opened and compared.

    Raises:
      UserError: it is damaged, or its architecture does not fit the experiment's.
    """
    init = experiment.init
    if init.resume is not None:
        name, path = "init.resume", init.resume
    elif init.adapt is not None:
        name, path = "init.adapt.source", init.adapt.source
    elif init.params is not None:
        name, path = "init.params", init.params
    else:
        return "weights: new"
    if not Path(path).exists():
        return f"weights: {name}, {path}, does not exist yet; it must when the run starts"
    if init.adapt is not None:
        rules.check(folders.open_model(path).config, experiment.model)
    elif init.params is not None:
        there, here = (settings.flatten(to_dict(c)) for c in (folders.open_model(path).config, experiment.model))
        if there != here:
            raise UserError(
                f"{name}, {path}, holds another architecture than the config's (folder -> config):\n"
                f"{tree.difference(there, here)}\nChange the config's model, or adapt the weights with init.adapt"
            )
    return f"weights: from {name}, {path}"


def weights_table(plan: start.Plan) -> str:
    """A line a path: how many layers have it, its shape, and which of its axes this mesh cuts over which of its own."""
    leaves = tree.leaves(plan.abstract.params)
    paths, stored = (jax.tree.leaves(of) for of in (tree.paths(plan.abstract.params), plan.abstract.params))
    specs = {path: leaf.sharding.spec for path, leaf in zip(paths, stored, strict=True)}
    by_path = collections.defaultdict(list)
    for leaf in leaves.values():
        by_path[leaf.path].append(leaf)
    lines = ["weights                                   layers  shape of one          cut over"]
    for path, found in by_path.items():
        axes = found[0].axes
        spec = specs[path][-len(axes) :]  # a stack of layers has an axis in front
        over = [(entry,) if isinstance(entry, str) else entry for entry in spec]
        cut = ", ".join(f"{axis}: {' x '.join(names)}" for axis, names in zip(axes, over, strict=True) if names)
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
    return (
        f"one batch: {experiment.data.rows} rows, {tokens:,} tokens, {summary['examples_per_row']:.1f} examples a row; "
        f"padding: {padding(summary, encoder=experiment.data.encoder_length > 0)}\n"
        f"one update: {logs.short(flop)}FLOP for these masks, {logs.short(flop / tokens)}FLOP a token; "
        f"{experiment.train.steps:,} updates: {logs.short(flop * experiment.train.steps)}FLOP"
    )
