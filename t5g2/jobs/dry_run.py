"""A dry run: weights, shardings, memory and FLOPs of a run, and one batch of its data, without computing a weight.

Memory is printed twice. The first figure is from a formula (t5g2/jobs/memory_estimate.py), which takes no time at any
size. The second is from XLA: the step is compiled, but not run or allocated; this figure decides whether a run fits.
For simulated devices, which stand for accelerators, XLA is told to schedule the step for little memory, as it does
there; on a CPU it prefers parallel work, which takes up to twice as much. The figure is still an upper bound: a CPU
computes bfloat16 as float32, and fuses less.

r rows of a device, T tokens of a side, S keys, D width, N query heads, K key/value heads, H head size, F MLP width.
"""

import collections
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from t5g2.core import logs, metrics_writer, sharding, tree
from t5g2.core.device import GIB
from t5g2.core.errors import UserError
from t5g2.data.pipeline import Pipeline
from t5g2.jobs.memory_estimate import MemoryEstimate, estimate
from t5g2.models import flops
from t5g2.report.data_preview import describe_padding
from t5g2.train import adaptation, files_of_weights, image_rows, run_tokenizer
from t5g2.train import plan as plans
from t5g2.train.experiment import Experiment
from t5g2.train.plan import Plan

MOST = 2**40  # bytes; XLA for CPU in jax 0.12 divides by zero where a single array takes a quarter of this
SCORES = "; much of it is attention scores, which the reference backend holds whole: compute.backend=auto avoids it"


def check(
    experiment: Experiment,
    *,
    devices: int = 0,
    hbm_gib: float = 0.0,
    compiled: bool = True,
    allow_change: tuple[str, ...] = (),
) -> None:
    """Prints weights and their shardings, memory per device, FLOPs by part, and a summary of one batch.

    Args:
      devices: number of devices to simulate (on CPU); 0 = those of this machine.
      hbm_gib: memory of a device; 0 = no limit.
      allow_change: as in a run: "data.tokenizer" = the weights may have another tokenizer.
      compiled: compile the step too, which takes about half a minute and 2 GB for the largest models.

    Raises:
      UserError: mesh and devices, lengths and text, memory and limit, or the initial weights and the model do not fit.
    """
    if devices:
        _simulate(devices)
    logs.setup()
    metrics_writer.check_outputs(experiment.log.wandb)
    origin = _origin(experiment, allow_change)
    mesh = sharding.make(experiment.mesh)
    rows = plans.local_rows(experiment, mesh)
    with jax.set_mesh(mesh):
        # simulated devices stand for accelerators, which compute the loss in their own way
        plan = plans.make(experiment, mesh, platform="accelerator" if devices else None)
        # the data first: a missing file is an error within seconds, compiling takes longer
        with Pipeline(plan.data, seed=experiment.train.seed, rows=rows) as pipeline:
            batch = pipeline.next()
        print(f"{experiment.mesh.describe(mesh.size)}\n")
        print(weights_table(plan))
        print(_attention(plan))
        memory = estimate(plan)
        needed = _print_memory(plan, memory, simulated=devices > 0, compiled=compiled) / GIB
        counts = flops.count_rows(experiment.model, batch.batch.encoder, batch.batch.decoder)
        print(_batch(experiment, pipeline.statistics.summary(), training_flops(experiment, counts)))
    print(origin)
    if hbm_gib and needed > hbm_gib:
        remat = "" if experiment.compute.remat == "block" else "compute.remat=block, "
        raise UserError(
            f"the run needs {needed:.2f} GiB per device and a device has --hbm_gib={hbm_gib:g}; use more devices along "
            f"mesh.fsdp or mesh.tensor, more train.microbatches, {remat}or fewer data.rows"
            + (SCORES if memory.scores > memory.total / 4 else "")
        )
    print("check passed: the experiment can run")


def _simulate(devices: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # jax has initialised its devices already
        if jax.device_count() != devices:
            raise UserError(
                f"--devices={devices}, but this process has {jax.device_count()} already; check from a new process"
            ) from None


def _origin(experiment: Experiment, allow_change: tuple[str, ...]) -> str:
    """Returns the origin of weights and tokenizer, in words; a model folder that exists already is opened and compared.

    Raises:
      UserError: the folder is damaged, or its architecture or its tokenizer does not fit the experiment's.
    """
    init, tokenizer = experiment.init, experiment.data.tokenizer
    if init.resume is not None:
        name, path = "init.resume", init.resume
    elif init.adapt is not None:
        name, path = "init.adapt.source", init.adapt.source
    elif init.params is not None:
        name, path = "init.params", init.params
    else:
        return f"weights: new\n{run_tokenizer.check(tokenizer, init, experiment.model)}"
    sources = [path] if init.adapt is None else init.adapt.folders
    # a config may be checked before the run that writes its folder, so a missing one is no error
    missing = [folder for folder in sources if not Path(folder).exists()]
    if missing:
        return f"weights: {name}: {', '.join(missing)} does not exist yet; it must when the run starts"
    if init.adapt is not None:
        adaptation.check_adapt(init.adapt, experiment.model)
    elif init.params is not None:
        adaptation.open_same_architecture(path, experiment.model)
    image_rows.check_processor(experiment.data.images, init)
    files_of_weights.read(init, experiment)
    line = run_tokenizer.check(tokenizer, init, experiment.model, allow_change=allow_change)
    return f"weights: from {name}, {path}\n{line}"


def weights_table(plan: Plan) -> str:
    """Returns one line per path: its number of layers, its shape, and the mesh axes that its axes are split over."""
    leaves = tree.leaves(plan.abstract.params)
    paths, stored = (jax.tree.leaves(of) for of in (tree.paths(plan.abstract.params), plan.abstract.params))
    specs = {path: leaf.sharding.spec for path, leaf in zip(paths, stored, strict=True)}
    by_path = collections.defaultdict(list)
    for leaf in leaves.values():
        by_path[leaf.path].append(leaf)
    lines = ["weights                                   layers  shape of one          split over"]
    for path, path_leaves in by_path.items():
        axes = path_leaves[0].axes
        spec = specs[path][-len(axes) :]  # a stack of layers has an axis in front
        over = [(entry,) if isinstance(entry, str) else entry for entry in spec]
        cut = ", ".join(f"{axis}: {' x '.join(names)}" for axis, names in zip(axes, over, strict=True) if names)
        lines.append(f"{path:42}{len(path_leaves):6}  {list(path_leaves[0].shape)!s:20}  {cut or '-'}")
    components = collections.Counter()
    for leaf in leaves.values():
        components[component(leaf.path)] += math.prod(leaf.shape)
    total = sum(components.values())
    frozen = sum(math.prod(leaf.shape) for leaf in leaves.values() if plan.experiment.optim.is_frozen(leaf.path))
    parts = ", ".join(f"{name} {count:,}" for name, count in components.items())
    kept = f"; {frozen:,} of them frozen" if frozen else ""
    return "\n".join([*lines, f"{total:,} parameters: {parts}{kept}", ""])


def _attention(plan: Plan) -> str:
    """Returns one line per kind of layer: its attention backend, and the reason for it."""
    lines = [f"  {name:16}{choice.name:12}{choice.reason}" for name, choice in plan.attention().items()]
    backend = plan.experiment.compute.backend
    if plan.compute.backend != backend:
        lines.append(f"(the step is compiled here with blockwise attention in place of {backend})")
    elif plan.platform is not None and backend == "auto":
        lines.append("(of these simulated devices; with --config.compute.backend=splash or cudnn, of TPUs or GPUs)")
    return "\n".join(["attention", *lines, ""])


def component(path: str) -> str:
    """Returns the part of a model that a weight belongs to: embedding, encoder, decoder, vision, projector, ….

    The layers of a decoder-only model are its decoder; the end-of-image vector belongs to the embedding.
    """
    first = path.split(".")[0]
    if first.endswith("embedder"):
        return "head" if first == "unembedder" else "embedding"
    return "decoder" if first in ("layers", "final_norm") else first


def training_flops(experiment: Experiment, counts: flops.Counts) -> dict[str, int]:
    """Returns FLOPs of an update by part; a frozen image tower, or body under a probe, counts forward alone."""
    model, optim = experiment.model, experiment.optim
    return flops.training(
        model, counts, frozen_vision=optim.freezes_tower(model), frozen_body=optim.trains_probe_alone(model)
    )


def _print_memory(plan: Plan, memory: MemoryEstimate, *, simulated: bool, compiled: bool) -> int:
    """Prints the memory of a device; returns it in bytes: as compiled, or else as estimated."""
    lines = {
        "weights": memory.weights,
        "optimizer": memory.optimizer,
        "batch": memory.batch,
        "gradients": memory.gradients,
        "inputs of blocks, about": memory.blocks,
        "attention scores, about": memory.scores,
        "one layer or the loss, about": memory.transient,
        "in all, about": memory.total,
    }
    print(f"loss head: {plan.head_description}")
    print("memory per device, GiB")
    print("\n".join(f"  {name:30}{size / GIB:9.3f}" for name, size in lines.items()))
    if not compiled or memory.total > MOST:
        why = f": no device has {memory.total / GIB:,.0f} GiB" if compiled else ""
        print(f"the step was not compiled{why}; activations are an estimate\n")
        return memory.total
    start = time.perf_counter()
    analysis = compile_step(plan, little_memory=simulated).memory_analysis()
    state, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    print(
        f"compiled in {time.perf_counter() - start:.0f} s, nothing run or allocated: {(state + temporary) / GIB:.3f} "
        f"GiB per device, {state / GIB:.3f} of them weights, optimizer and batch"
    )
    if simulated:
        print("(by XLA for a CPU, which widens bfloat16 and fuses less: an accelerator takes less)")
    print()
    return state + temporary


def compile_step(plan: Plan, *, little_memory: bool) -> Any:
    """Returns the compiled step: as this machine runs it, or scheduled for little memory."""
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if little_memory else None
    return plan.lower().compile(compiler_options=options)


def _batch(experiment: Experiment, summary: Mapping[str, float], parts: Mapping[str, int]) -> str:
    tokens, flop = summary["encoder_tokens"] + summary["decoder_tokens"], sum(parts.values())
    shares = ", ".join(f"{name} {part / flop:.1%}" for name, part in sorted(parts.items(), key=lambda p: -p[1]) if part)
    return (
        f"one batch: {experiment.data.rows} rows, {tokens:,} tokens, {summary['examples_per_row']:.1f} examples a row; "
        f"padding: {describe_padding(summary, encoder=experiment.data.encoder_length > 0)}\n"
        f"one update: {flop:.3g} FLOPs for these masks, {flop / tokens:.3g} a token; "
        f"{experiment.train.steps:,} updates: {flop * experiment.train.steps:.3g}\n  {shares}"
    )
