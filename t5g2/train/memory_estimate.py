"""An estimate of the memory that one device needs, by formula, without compiling."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5g2.core import tree
from t5g2.models.backends import BACKENDS
from t5g2.models.config import EncoderDecoderConfig, TextConfig, VisionConfig
from t5g2.models.siglip import QUERY_TILE
from t5g2.train.experiment import Experiment
from t5g2.train.plan import Plan

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
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


def estimate(plan: Plan) -> MemoryEstimate:
    """What one device of the plan's mesh needs, without compiling."""
    experiment, state = plan.experiment, plan.abstract
    remat = experiment.compute.remat == "block"
    sides = _sides(experiment)
    counts = [1 if remat else side.config.layers for side in sides]
    weights = _bytes(state.params) + (0 if plan.teacher is None else _bytes(plan.teacher.abstract))
    trained = [
        leaf
        for leaf, path in zip(*map(jax.tree.leaves, (state.params, tree.paths(state.params))), strict=True)
        if not experiment.optim.is_frozen(path)
    ]
    gradients = sum(4 * _local(leaf) for leaf in trained)
    scores = [count * side.scores for side, count in zip(sides, counts, strict=True)]
    return MemoryEstimate(
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
    mesh, compute = jax.sharding.get_abstract_mesh().shape, experiment.compute
    size, cut = jnp.dtype(compute.dtype).itemsize, mesh["tensor"]
    rows = experiment.data.rows // (mesh["data"] * mesh["fsdp"] * experiment.train.microbatches)
    tokens = rows * length
    heads, kv_heads = config.heads * config.head_size, config.kv_heads * config.head_size
    inputs = tokens * config.width * size
    # four norms, what they are added to; queries and output, keys and values; gate, up and their product
    layer = 6 * inputs + tokens * size * (2 * (heads + kv_heads) + 3 * config.mlp_width) // cut
    # scores, weights and the gradients of both
    scores = 4 * 4 * rows * max(config.heads // cut, 1) * length * keys if _holds_scores(compute.backend) else 0
    matrices = config.width * (2 * (heads + kv_heads) + 3 * config.mlp_width) // cut
    return _Side(config, inputs, layer, scores, matrices * (size + 4) if mesh["fsdp"] > 1 else 0)


def _tower(experiment: Experiment) -> list[_Side]:
    """The image tower, which reads every image of every row, there or not; a frozen one leaves nothing behind."""
    rows, images = experiment.data.images, experiment.model.image_stack.images
    if rows is None or images is None:
        return []
    mesh, compute, vision = jax.sharding.get_abstract_mesh().shape, experiment.compute, images.vision
    size, cut = jnp.dtype(compute.vision_dtype).itemsize, mesh["tensor"]
    number = experiment.data.rows // (mesh["data"] * mesh["fsdp"] * experiment.train.microbatches) * rows.per_row
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


def _loss(plan: Plan) -> int:
    """Bytes that the loss head and the embeddings take: the table whole along D and its gradients, a tile of logits."""
    experiment, mesh = plan.experiment, plan.mesh.shape
    model, train = experiment.model, experiment.train
    decoder = model.decoder_stack
    rows = experiment.data.rows // (mesh["data"] * mesh["fsdp"] * train.microbatches)
    vocabulary = decoder.vocab_size // mesh["tensor"]
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
