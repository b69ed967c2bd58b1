"""The dry run: everything about a run that can be known before there is a weight, and one batch of its data.

Memory is told twice. Weights, optimizer and gradients follow exactly from shapes and mesh; activations are estimated
by formula, which takes no time at any size. And the step is compiled, with nothing run or allocated: XLA then says what
all of it takes, and that decides what fits. For simulated devices, which stand for accelerators, it is told to order
the step for little memory, as it does there; on a CPU it goes for parallel work, which takes up to twice as much. The
figure is still a cautious one: a CPU computes bfloat16 as float32, and fuses less.

r rows of a device, T tokens of a side, S keys, D width, N query heads, K key/value heads, H head size, F MLP width.
"""

import collections
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5g2.checkpoint import folder as folders
from t5g2.commands.data import padding
from t5g2.core import logs, settings, sharding, tree
from t5g2.core.errors import UserError
from t5g2.data.pipeline import Pipeline
from t5g2.models import flops
from t5g2.models.backends import BACKENDS
from t5g2.models.config import EncoderDecoderConfig, TextConfig, VisionConfig, to_dict
from t5g2.models.siglip import QUERY_TILE
from t5g2.train import adaptation as weights
from t5g2.train import image_rows
from t5g2.train import plan as start
from t5g2.train import step as steps
from t5g2.train.experiment import Experiment

GIB = 2**30
MOST = 2**40  # bytes; XLA for CPU in jax 0.12 divides by zero where a single array takes a quarter of this
SCORES = "; much of it is attention scores, which the reference backend holds whole, so shorter rows save the most"


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      weights, optimizer, batch: exact; what the step is given. The weights of a teacher are among them.
      gradients: exact: of all that is trained, float32, as the weights are cut, and a second time while microbatches
        are added up.
      blocks: estimate: the inputs of all blocks that the backward pass needs, or all that it needs without remat.
      scores: estimate: attention scores of one layer, or of all without remat; 0 with a backend that never holds them.
      passing: estimate: one layer's activations and gathered weights, or the loss head's tile, table and its gradient,
        whichever is more.
    """

    weights: int
    optimizer: int
    batch: int
    gradients: int
    blocks: int
    scores: int
    passing: int

    @property
    def given(self) -> int:
        """What is there before the step runs, and stays."""
        return self.weights + self.optimizer + self.batch

    @property
    def total(self) -> int:
        """All of it."""
        return self.given + self.gradients + self.blocks + self.scores + self.passing


def check(experiment: Experiment, *, devices: int = 0, hbm_gib: float = 0.0, compiled: bool = True) -> None:
    """Prints weights and their shardings, memory per device, FLOPs by part, and what one batch is like.

    Args:
      devices: simulate so many (on CPU); 0 = those of this machine.
      hbm_gib: memory of a device; 0 = do not compare.
      compiled: compile the step too; takes about half a minute and 2 GB for the largest models.

    Raises:
      UserError: something does not fit: mesh and devices, lengths and text, memory, the weights to begin with.
    """
    if devices:
        _simulate(devices)
    logs.setup()
    origin = _origin(experiment)
    world = sharding.make(experiment.mesh)
    rows = start.local_rows(experiment, world)
    with jax.set_mesh(world):
        plan = start.plan(experiment, world)
        # before the step is compiled, which takes longer than to find that there is no such file
        with Pipeline(plan.data, seed=experiment.train.seed, rows=rows) as pipeline:
            batch = pipeline.next()
        print(weights_table(plan))
        memory = estimate(plan)
        needed = _print_memory(plan, memory, simulated=devices > 0, compiled=compiled) / GIB
        counts = flops.count_rows(experiment.model, batch.batch.encoder, batch.batch.decoder)
        print(_batch(experiment, pipeline.statistics.summary(), training_flops(experiment, counts)))
    print(origin)
    if hbm_gib and needed > hbm_gib:
        raise UserError(
            f"the run needs {needed:.2f} GiB per device and a device has --hbm_gib={hbm_gib:g}; use more devices along "
            f"mesh.fsdp or mesh.tensor, more train.microbatches, compute.remat=block, or fewer data.rows"
            + (SCORES if memory.scores > memory.total / 4 else "")
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
    folders_of = [path] if init.adapt is None else init.adapt.folders
    missing = [folder for folder in folders_of if not Path(folder).exists()]
    if missing:
        return f"weights: {name}: {', '.join(missing)} does not exist yet; it must when the run starts"
    if init.adapt is not None:
        weights.check_adapt(init.adapt, experiment.model)
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
        components[component(leaf.path)] += math.prod(leaf.shape)
    total = sum(components.values())
    frozen = sum(math.prod(leaf.shape) for leaf in leaves.values() if plan.experiment.optim.is_frozen(leaf.path))
    parts = ", ".join(f"{name} {count:,}" for name, count in components.items())
    kept = f"; {frozen:,} of them frozen" if frozen else ""
    return "\n".join([*lines, f"{total:,} parameters: {parts}{kept}", ""])


def component(path: str) -> str:
    """The part of a model that a weight belongs to: embedding, encoder, decoder, vision, projector, ….

    The layers of a decoder-only model are its decoder, the end-of-image vector is of the embedding.
    """
    first = path.split(".")[0]
    if first.endswith("embedder"):
        return "head" if first == "unembedder" else "embedding"
    return "decoder" if first in ("layers", "final_norm") else first


def training_flops(experiment: Experiment, counts: flops.Counts) -> dict[str, int]:
    """FLOPs of an update by part; those of an image tower that is frozen whole, of its forward pass alone."""
    frozen = experiment.optim.freezes_tower(experiment.model)
    return flops.training(experiment.model, counts, frozen_vision=frozen)


def _print_memory(plan: start.Plan, memory: Memory, *, simulated: bool, compiled: bool) -> int:
    """Prints what a device needs; returns it in bytes: as compiled, or else as estimated."""
    told = {
        "weights": memory.weights,
        "optimizer": memory.optimizer,
        "batch": memory.batch,
        "gradients": memory.gradients,
        "inputs of blocks, about": memory.blocks,
        "attention scores, about": memory.scores,
        "one layer or the loss, about": memory.passing,
        "in all, about": memory.total,
    }
    print("memory per device, GiB")
    print("\n".join(f"  {name:30}{size / GIB:9.3f}" for name, size in told.items()))
    if not compiled or memory.total > MOST:
        why = f": no device has {memory.total / GIB:,.0f} GiB" if compiled else ""
        print(f"the step was not compiled{why}; activations are an estimate\n")
        return memory.total
    began = time.perf_counter()
    analysis = (compile_for_little_memory(plan) if simulated else plan.compile()).memory_analysis()
    state, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    print(
        f"compiled in {time.perf_counter() - began:.0f} s, nothing run or allocated: {(state + temporary) / GIB:.3f} "
        f"GiB per device, {state / GIB:.3f} of them weights, optimizer and batch"
    )
    if simulated:
        print("(by XLA for a CPU, which widens bfloat16 and fuses less: an accelerator takes less)")
    print()
    return state + temporary


def compile_for_little_memory(plan: start.Plan) -> Any:
    """The compiled step, ordered for little memory."""
    step = steps.make_train_step(plan.optimizer, plan.settings())
    teacher = None if plan.teacher is None else plan.teacher[1]
    places = jax.tree.map(lambda x: x.sharding, plan.abstract), sharding.replicated(plan.world)
    lowered = jax.jit(step, out_shardings=places, donate_argnums=0).lower(plan.abstract, plan.batch, teacher)
    return lowered.compile(compiler_options={"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"})


def estimate(plan: start.Plan) -> Memory:
    """What one device of the plan's mesh needs, without compiling."""
    experiment, state = plan.experiment, plan.abstract
    remat = experiment.compute.remat == "block"
    sides = _sides(experiment)
    counts = [1 if remat else side.config.layers for side in sides]
    weights = _bytes(state.params) + (0 if plan.teacher is None else _bytes(plan.teacher[1]))
    trained = [
        leaf
        for leaf, path in zip(*map(jax.tree.leaves, (state.params, tree.paths(state.params))), strict=True)
        if not experiment.optim.is_frozen(path)
    ]
    gradients = sum(4 * _local(leaf) for leaf in trained)
    scores = [count * side.scores for side, count in zip(sides, counts, strict=True)]
    return Memory(
        weights=weights,
        optimizer=_bytes(state.opt),
        batch=_bytes(plan.batch),
        gradients=gradients * (1 if experiment.train.microbatches == 1 else 2),
        blocks=sum(side.config.layers * (side.inputs if remat else side.layer) for side in sides),
        scores=max(scores) if remat else sum(scores),
        passing=max(*(side.layer * remat + side.gathered for side in sides), _loss(plan)),
    )


@dataclass(frozen=True)
class _Side:
    """Bytes of one layer of a stack or an image tower, on one device: its input, what its backward pass needs, its
    attention scores, its weights and their gradients where they are gathered for it.
    """

    config: TextConfig | VisionConfig
    inputs: int
    layer: int
    scores: int
    gathered: int


def _sides(experiment: Experiment) -> list[_Side]:
    model, data = experiment.model, experiment.data
    tower = _tower(experiment)
    if not isinstance(model, EncoderDecoderConfig):
        return [_side(experiment, model, data.decoder_length, keys=data.decoder_length), *tower]
    both, encoder, decoder = data.encoder_length + data.decoder_length, data.encoder_length, data.decoder_length
    keys = both if model.cross == "merged" else max(encoder, decoder)
    return [
        _side(experiment, model.encoder, encoder, keys=encoder),
        _side(experiment, model.decoder, decoder, keys=keys),
        *tower,
    ]


def _side(experiment: Experiment, config: TextConfig, length: int, *, keys: int) -> _Side:
    world, compute = jax.sharding.get_abstract_mesh().shape, experiment.compute
    size, cut = jnp.dtype(compute.dtype).itemsize, world["tensor"]
    rows = experiment.data.rows // (world["data"] * world["fsdp"] * experiment.train.microbatches)
    tokens = rows * length
    heads, kv_heads = config.heads * config.head_size, config.kv_heads * config.head_size
    inputs = tokens * config.width * size
    # four norms, what they are added to; queries and output, keys and values; gate, up and their product
    layer = 6 * inputs + tokens * size * (2 * (heads + kv_heads) + 3 * config.mlp_width) // cut
    # scores, weights and the gradients of both
    scores = 4 * 4 * rows * max(config.heads // cut, 1) * length * keys if _holds_scores(compute.backend) else 0
    matrices = config.width * (2 * (heads + kv_heads) + 3 * config.mlp_width) // cut
    return _Side(config, inputs, layer, scores, matrices * (size + 4) if world["fsdp"] > 1 else 0)


def _tower(experiment: Experiment) -> list[_Side]:
    """The image tower, which reads every image of every row, there or not; a frozen one leaves nothing behind."""
    rows, images = experiment.data.images, image_rows.images_of(experiment.model)
    if rows is None or images is None:
        return []
    world, compute, vision = jax.sharding.get_abstract_mesh().shape, experiment.compute, images.vision
    size, cut = jnp.dtype(compute.vision_dtype).itemsize, world["tensor"]
    number = experiment.data.rows // (world["data"] * world["fsdp"] * experiment.train.microbatches) * rows.per_row
    inputs, wide = (number * vision.patches * width * size for width in (vision.width, vision.mlp_width))
    pixels = 4 * 3 * number * vision.image_size**2
    tile = number * max(vision.heads // cut, 1) * min(vision.patches, QUERY_TILE) * vision.patches
    scores = 4 * tile if _holds_scores(compute.backend) else 0
    if experiment.optim.freezes_tower(experiment.model):
        # what is added to, and queries, keys, values and output, or both sides of the MLP's activation
        passing = 2 * inputs + max(4 * inputs // cut + 2 * scores, 2 * wide // cut)
        return [_Side(vision, 0, 0, 0, passing + pixels)]
    layer = 4 * inputs + (4 * inputs + 2 * wide) // cut
    return [_Side(vision, inputs, layer, 4 * scores, pixels)]


def _loss(plan: start.Plan) -> int:
    """Bytes that the loss head and the embeddings take: the table whole along D and its gradients, a tile of logits."""
    experiment, world = plan.experiment, plan.world.shape
    model, train = experiment.model, experiment.train
    decoder = model.decoder if isinstance(model, EncoderDecoderConfig) else model
    rows = experiment.data.rows // (world["data"] * world["fsdp"] * train.microbatches)
    vocabulary = decoder.vocab_size // world["tensor"]
    table = vocabulary * decoder.width
    tile = min(train.tile_tokens, rows * experiment.data.decoder_length) * vocabulary
    size = jnp.dtype(experiment.compute.dtype).itemsize
    # gradients by the head and by the lookup, in float32; logits and their slopes
    return table * size + 2 * 4 * table + 2 * 4 * tile


def _holds_scores(backend: str) -> bool:
    """Whether attention holds the scores of all pairs: the reference backend does, and no other."""
    return backend == "reference" or (backend == "auto" and set(BACKENDS) == {"reference"})


def _bytes(abstract: Any) -> int:
    return sum(_local(leaf) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(abstract))


def _local(leaf: Any) -> int:
    """How many numbers of an array one device holds."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _batch(experiment: Experiment, summary: Mapping[str, float], parts: Mapping[str, int]) -> str:
    tokens, flop = summary["encoder_tokens"] + summary["decoder_tokens"], sum(parts.values())
    shares = ", ".join(f"{name} {part / flop:.1%}" for name, part in sorted(parts.items(), key=lambda p: -p[1]) if part)
    return (
        f"one batch: {experiment.data.rows} rows, {tokens:,} tokens, {summary['examples_per_row']:.1f} examples a row; "
        f"padding: {padding(summary, encoder=experiment.data.encoder_length > 0)}\n"
        f"one update: {flop:.3g} FLOPs for these masks, {flop / tokens:.3g} a token; "
        f"{experiment.train.steps:,} updates: {flop * experiment.train.steps:.3g}\n  {shares}"
    )
