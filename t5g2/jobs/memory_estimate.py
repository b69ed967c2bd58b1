"""Estimate of the memory that one device needs, by formula, without compiling."""

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


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one device needs.

    Attributes:
      weights, optimizer, batch: exact: the arguments of the step. The weights of a teacher are included.
      gradients: exact: of all trained weights, float32, sharded like the weights; with microbatches twice as much,
        for the sum so far and the gradients that are added to it.
      blocks: estimate: activations that are kept for the backward pass; with remat the inputs of the blocks alone.
      scores: estimate: attention scores of one layer, or of all without remat; 0 with a backend that never holds them.
      transient: estimate of what exists at one point of a step only: one layer's activations and gathered weights, or
        the loss head's tile, table and its gradient, whichever is more.
    """

    weights: int
    optimizer: int
    batch: int
    gradients: int
    blocks: int
    scores: int
    transient: int

    @property
    def arguments(self) -> int:
        """The arguments of the step."""
        return self.weights + self.optimizer + self.batch

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.arguments + self.gradients + self.blocks + self.scores + self.transient


def estimate(plan: Plan) -> MemoryEstimate:
    """Estimates the memory of one device of the plan's mesh, without compiling."""
    experiment, state = plan.experiment, plan.abstract
    remat = experiment.compute.remat == "block"
    sides = _sides(experiment)
    # with remat the backward pass recomputes one layer at a time, so only one holds its scores
    counts = [1 if remat else side.config.layers for side in sides]
    weights = _bytes(state.params) + (0 if plan.teacher is None else _bytes(plan.teacher.abstract))
    # a weight that is frozen for good has no gradient at all
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
        transient=max(*(side.layer * remat + side.gathered for side in sides), _loss(plan)),
    )


@dataclass(frozen=True)
class _LayerBytes:
    """Bytes of one layer of a stack or an image tower on one device.

    Attributes:
      inputs: input of the layer.
      layer: activations that its backward pass needs.
      scores: attention scores.
      gathered: weights and gradients of the layer if FSDP gathers them; else 0.
    """

    config: TextConfig | VisionConfig
    inputs: int
    layer: int
    scores: int
    gathered: int


def _sides(experiment: Experiment) -> list[_LayerBytes]:
    model, data = experiment.model, experiment.data
    tower = _tower(experiment)
    if not isinstance(model, EncoderDecoderConfig):
        return [_side(experiment, model, data.decoder_length, keys=data.decoder_length), *tower]
    # merged attention reads the keys of both sides at once; separate cross-attention one side after the other
    both, encoder, decoder = data.encoder_length + data.decoder_length, data.encoder_length, data.decoder_length
    keys = both if model.cross == "merged" else max(encoder, decoder)
    return [
        _side(experiment, model.encoder, encoder, keys=encoder),
        _side(experiment, model.decoder, decoder, keys=keys),
        *tower,
    ]


def _side(experiment: Experiment, config: TextConfig, length: int, *, keys: int) -> _LayerBytes:
    mesh, compute = jax.sharding.get_abstract_mesh().shape, experiment.compute
    size, cut = jnp.dtype(compute.dtype).itemsize, mesh["tensor"]
    rows = experiment.data.rows // (mesh["data"] * mesh["fsdp"] * experiment.train.microbatches)
    tokens = rows * length
    heads, kv_heads = config.heads * config.head_size, config.kv_heads * config.head_size
    inputs = tokens * config.width * size
    # four norms and two residuals; queries and output, keys and values; gate, up and their product
    layer = 6 * inputs + tokens * size * (2 * (heads + kv_heads) + 3 * config.mlp_width) // cut
    # scores, weights and the gradients of both
    scores = 4 * 4 * rows * max(config.heads // cut, 1) * length * keys if _holds_scores(compute.backend) else 0
    # gathered weights are in the compute dtype, their gradients in float32
    matrices = config.width * (2 * (heads + kv_heads) + 3 * config.mlp_width) // cut
    return _LayerBytes(config, inputs, layer, scores, matrices * (size + 4) if mesh["fsdp"] > 1 else 0)


def _tower(experiment: Experiment) -> list[_LayerBytes]:
    """The image tower, which computes all image slots of all rows; a frozen one keeps nothing for a backward pass."""
    rows, images = experiment.data.images, experiment.model.image_stack.images
    if rows is None or images is None:
        return []
    mesh, compute, vision = jax.sharding.get_abstract_mesh().shape, experiment.compute, images.vision
    size, cut = jnp.dtype(compute.vision_dtype).itemsize, mesh["tensor"]
    number = experiment.data.rows // (mesh["data"] * mesh["fsdp"] * experiment.train.microbatches) * rows.per_row
    inputs, wide = (number * vision.patches * width * size for width in (vision.width, vision.mlp_width))
    pixels = 4 * 3 * number * vision.image_size**2
    # attention is tiled over queries whatever the backend, so no layer holds all of its scores
    tile = number * max(vision.heads // cut, 1) * min(vision.patches, QUERY_TILE) * vision.patches
    scores = 4 * tile if _holds_scores(compute.backend) else 0
    if experiment.optim.freezes_tower(experiment.model):
        # the residual, and queries, keys, values and output, or both sides of the MLP's activation
        passing = 2 * inputs + max(4 * inputs // cut + 2 * scores, 2 * wide // cut)
        return [_LayerBytes(vision, 0, 0, 0, passing + pixels)]
    layer = 4 * inputs + (4 * inputs + 2 * wide) // cut
    return [_LayerBytes(vision, inputs, layer, 4 * scores, pixels)]


def _loss(plan: Plan) -> int:
    """Bytes of the loss head and the embeddings: the table, gathered along D, its gradients, and a tile of logits."""
    experiment, mesh = plan.experiment, plan.mesh.shape
    model, train = experiment.model, experiment.train
    decoder = model.decoder_stack
    rows = experiment.data.rows // (mesh["data"] * mesh["fsdp"] * train.microbatches)
    vocabulary = decoder.vocab_size // mesh["tensor"]
    table = vocabulary * decoder.width
    tile = min(train.tile_tokens, rows * experiment.data.decoder_length) * vocabulary
    size = jnp.dtype(experiment.compute.dtype).itemsize
    # gradients from the head and from the lookup, in float32; logits and their gradients
    return table * size + 2 * 4 * table + 2 * 4 * tile


def _holds_scores(backend: str) -> bool:
    """True for the reference backend, the only one that holds the scores of all pairs."""
    return backend == "reference" or (backend == "auto" and set(BACKENDS) == {"reference"})


def _bytes(abstract: Any) -> int:
    return sum(_local(leaf) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(abstract))


def _local(leaf: Any) -> int:
    """Returns the number of elements of an array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))
