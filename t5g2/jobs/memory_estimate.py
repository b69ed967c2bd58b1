"""Estimate of the memory that one device needs, by formula, without compiling."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5g2.core import sharding, tree
from t5g2.models import kept
from t5g2.models.attention_sites import layers_of
from t5g2.models.backends import blockwise
from t5g2.models.config import EncoderDecoderConfig, TextConfig, VisionConfig
from t5g2.models.layers import Compute
from t5g2.models.loss_config import temporary_bytes
from t5g2.models.stack import ENCODER
from t5g2.train.experiment import Experiment
from t5g2.train.plan import Plan


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one device needs.

    Attributes:
      weights, optimizer, batch: exact: the arguments of the step. The weights of a teacher are included.
      gradients: exact: of all trained weights, float32, cut like the optimizer's state; with microbatches twice,
        for the sum so far and the gradients that are added to it.
      blocks: estimate: activations that are kept for the backward pass; with remat the inputs of the blocks alone, or
        also the outputs of attention.
      scores: estimate: attention scores of one layer, or of all without remat; of blocks alone, or a mask, with a
        backend that never holds them.
      transient: estimate of what exists at one point of a step only: one layer's activations and gathered weights, or
        the temporaries of the loss head and of the embedding, whichever is more.
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
    remat = experiment.compute.remat != "none"
    sides = _sides(experiment)
    weights = _bytes(state.params) + (0 if plan.teacher is None else _bytes(plan.teacher.abstract))
    # cut like the optimizer's state; a weight that is frozen for good has no gradient at all
    places = sharding.shardings(state.params, plan.mesh, zero1=experiment.mesh.zero1)
    gradients = sum(
        4 * math.prod(place.shard_shape(leaf.shape))
        for leaf, path, place in zip(
            *map(jax.tree.leaves, (state.params, tree.paths(state.params), places)), strict=True
        )
        if not experiment.optim.is_frozen(path)
    )
    return MemoryEstimate(
        weights=weights,
        optimizer=_bytes(state.opt),
        batch=_bytes(plan.batch),
        gradients=gradients * (1 if experiment.train.microbatches == 1 else 2),
        blocks=sum(side.config.layers * side.kept(experiment.compute) for side in sides),
        scores=_scores(plan),
        transient=max(*(side.layer * remat + side.gathered for side in sides), _loss(plan)),
    )


@dataclass(frozen=True)
class _LayerBytes:
    """Bytes of one layer of a stack or an image tower on one device.

    Attributes:
      inputs: input of the layer.
      attention: output of its attention.
      projections: its queries, keys and values.
      mlp: the products of its gates.
      layer: activations that its backward pass needs.
      gathered: weights and gradients of the layer if FSDP gathers them; else 0.
    """

    config: TextConfig | VisionConfig
    inputs: int
    attention: int
    projections: int
    mlp: int
    layer: int
    gathered: int

    def kept(self, compute: Compute) -> int:
        """Returns the bytes that a device keeps for the backward pass."""
        if compute.remat == "none":
            return self.layer
        return 0 if compute.offload else self.inputs + sum(getattr(self, name) for name in kept.names(compute.remat))


def _sides(experiment: Experiment) -> list[_LayerBytes]:
    model, data = experiment.model, experiment.data
    tower = _tower(experiment)
    if not isinstance(model, EncoderDecoderConfig):
        return [_side(experiment, model, data.decoder_length), *tower]
    return [
        _side(experiment, model.encoder, data.encoder_length // sharding.parts(ENCODER, data.encoder_length)),
        _side(experiment, model.decoder, data.decoder_length),
        *tower,
    ]


def _side(experiment: Experiment, config: TextConfig, length: int) -> _LayerBytes:
    mesh, compute = jax.sharding.get_abstract_mesh().shape, experiment.compute
    size, cut = jnp.dtype(compute.dtype).itemsize, mesh["tensor"]
    rows = experiment.data.rows // (mesh["data"] * mesh["fsdp"] * experiment.train.microbatches)
    tokens = rows * length
    heads, kv_heads = config.heads * config.head_size, config.kv_heads * config.head_size
    inputs = tokens * config.width * size
    # four norms and two residuals; queries and output, keys and values; gate, up and their product
    layer = 6 * inputs + tokens * size * (2 * (heads + kv_heads) + 3 * config.mlp_width) // cut
    # gathered weights are in the compute dtype, their gradients in float32
    matrices = config.width * (2 * (heads + kv_heads) + 3 * config.mlp_width) // cut
    gathered = matrices * (size + 4) if sharding.parts("embed", config.width) > 1 else 0
    attention, projections = (tokens * size * width // cut for width in (heads, heads + 2 * kv_heads))
    mlp = 2 * tokens * size * config.mlp_width // cut
    return _LayerBytes(config, inputs, attention, projections, mlp, layer, gathered)


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
    if experiment.optim.freezes_tower(experiment.model):
        # the residual, and queries, keys, values and output, or both sides of the MLP's activation
        passing = 2 * inputs + max(4 * inputs // cut, 2 * wide // cut)
        return [_LayerBytes(vision, 0, 0, 0, 0, 0, passing + pixels)]
    layer = 4 * inputs + (4 * inputs + 2 * wide) // cut
    return [_LayerBytes(vision, inputs, inputs // cut, 3 * inputs // cut, 0, layer, pixels)]


def _loss(plan: Plan) -> int:
    """Bytes of the loss head's temporaries, and of the gradient of the lookup, float32."""
    experiment, shape = plan.experiment, plan.head_shape
    size = jnp.dtype(experiment.compute.dtype).itemsize
    frozen = {
        path: experiment.optim.is_frozen(path)
        for path in jax.tree.leaves(tree.paths(plan.abstract.params))
        if path.endswith(".table")
    }
    # of an untied head the table is its own
    head = frozen.get("unembedder.table", frozen.get("decoder_embedder.table", frozen.get("embedder.table", False)))
    # of one group of rows XLA adds it to the head's, in place
    groups = sharding.parts("rows", experiment.data.rows // experiment.train.microbatches)
    groups *= sharding.devices("group_columns")
    lookup = 0 if groups == 1 or all(frozen.values()) else 4 * shape.rows * shape.width
    return temporary_bytes(experiment.loss, shape, itemsize=size, trained=not head) + lookup


def _scores(plan: Plan) -> int:
    """Bytes of attention scores: of one layer with remat, of all without; of blocks alone if no layer holds its own."""
    experiment, held, passing = plan.experiment, {}, [0]
    model, compute = experiment.model, experiment.compute
    choices = plan.attention()
    for name, site in plan.attention_sites().items():
        backend = choices[name].name
        frozen = name == "vision" and experiment.optim.freezes_tower(model)
        # scores, weights and the gradients of both
        if backend == "blockwise":
            passing.append(4 * 4 * blockwise.tile(site))
        elif backend == "cudnn":
            passing.append(site.rows * site.queries * sum(site.keys))
        elif backend == "reference" and frozen:
            passing.append(2 * 4 * site.scores)
        elif backend == "reference":
            held[name] = 4 * 4 * site.scores
    if compute.remat != "none":
        return max(*passing, 0, *held.values())
    return max(*passing, 0, sum(layers_of(model, name) * size for name, size in held.items()))


def _bytes(abstract: Any) -> int:
    return sum(_local(leaf) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(abstract))


def _local(leaf: Any) -> int:
    """Returns the number of elements of an array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))
