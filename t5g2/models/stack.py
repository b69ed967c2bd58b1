"""Blocks, and the stack that runs them: one loop over whole patterns of layers, then the remaining layers.

B batch, T length, D width, P blocks of a pattern, R repeats of the pattern, L = R * P + len(tail) layers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from typing_extensions import override

from t5g2.core import sharding
from t5g2.core.batch import Sequences
from t5g2.core.scopes import ScopeName, in_loop, scope
from t5g2.core.sharding import constrain
from t5g2.models import kept, masks
from t5g2.models.attention import Attention, KeyValues
from t5g2.models.config import LayerKind, TextConfig
from t5g2.models.layers import Compute, GatedMLP, RMSNorm, rotary_cos_sin
from t5g2.models.masks import Keys, Mask

LONG_ROW, PART = 16384, 8192  # tokens of a device: the MLP of longer rows runs in parts, with remat
ENCODER = "encoder_length"  # logical axis of the encoder's tokens


@dataclass(frozen=True)
class LayerInputs:
    """Inputs that all layers of a stack share: the tokens, and by kind of layer the mask and the rotary embedding.

    Attributes:
      tokens: the tokens that the stack runs over.
      masks: visibility among these tokens.
      rotary: cosine and sine of their rotary angles.
      axis: logical axis of the tokens.
      encoder_offset: float32[], added to the scores of the encoder's keys in merged attention; None = nothing.
    """

    tokens: Sequences
    masks: Mapping[LayerKind, Mask]
    rotary: Mapping[LayerKind, tuple[Array, Array]]
    axis: str = "length"
    encoder_offset: Array | None = None

    @classmethod
    def create(
        cls,
        tokens: Sequences,
        config: TextConfig,
        mask: Callable[[LayerKind], Mask],
        *,
        axis: str = "length",
        encoder_offset: Array | None = None,
    ) -> "LayerInputs":
        """Returns the inputs for `tokens`; `mask` returns the mask of a kind of layer."""
        # angles are computed once for all layers of a kind
        kinds: dict[LayerKind, None] = dict.fromkeys(config.pattern)
        rotary: dict[LayerKind, tuple[Array, Array]] = {
            kind: rotary_cos_sin(tokens.positions, config.rope(kind), config.head_size) for kind in kinds
        }
        rotary = jax.tree.map(lambda x_BTP: constrain(x_BTP, "rows", axis, None), rotary)
        return cls(tokens, {kind: mask(kind) for kind in kinds}, rotary, axis, encoder_offset)


class Block(nnx.Module):
    """One layer: residual self-attention and MLP, each between two norms (Gemma 3 report, section 2).

    Its tokens attend to each other and to a cache; in subclasses also to the encoder.
    """

    attention_scope: ScopeName = "attention"

    def __init__(self, config: TextConfig, kind: LayerKind, *, key: jax.Array, param_dtype):
        self.kind: LayerKind = kind
        keys = jax.random.split(key)
        self.pre_attention_norm, self.post_attention_norm = _norm(config, param_dtype), _norm(config, param_dtype)
        self.attention = Attention(config, key=keys[0], param_dtype=param_dtype)
        self.pre_mlp_norm, self.post_mlp_norm = _norm(config, param_dtype), _norm(config, param_dtype)
        self.mlp = GatedMLP(config.width, config.mlp_width, key=keys[1], param_dtype=param_dtype)

    def encoder_keys_values(self, memory_BSD: Float[Array, "B S M"], *, compute: Compute) -> KeyValues | None:
        """Returns this layer's keys and values of the encoder's states; None if it does not attend to them."""
        del memory_BSD, compute
        return None

    def forward(
        self,
        x_BTD: Float[Array, "B T D"],
        inputs: LayerInputs,
        *,
        past: Keys | None = None,
        memory: Keys | None = None,
        compute: Compute,
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """Returns the next hidden states, and the keys and values of these tokens for a cache.

        Args:
          past: keys and values of this layer in the cache.
          memory: keys and values of the encoder's states, from `encoder_keys_values`.
        """
        del memory
        x_BTD, keys_values = self._self_attend(x_BTD, inputs, past, compute=compute)
        return self._transform(x_BTD, inputs.axis, compute), keys_values

    def _self_attend(
        self,
        x_BTD: Array,
        inputs: LayerInputs,
        past: Keys | None,
        others: Sequence[tuple[Keys, Mask]] = (),
        *,
        compute: Compute,
    ) -> tuple[Array, KeyValues]:
        """Returns x plus attention over the cache, `others` and the tokens themselves, and their keys and values."""
        with scope(self.attention_scope):
            rotary, mask, axis = inputs.rotary[self.kind], inputs.masks[self.kind], inputs.axis
            h_BTD = self.pre_attention_norm.normalize(x_BTD, compute)
            keys_values = self.attention.keys(h_BTD, rotary, axis=axis, compute=compute)
            own = keys_values.as_keys(inputs.tokens, axis)
            # masks are by position and segment, so one mask serves the cache and the new tokens
            sources = [*([] if past is None else [(past, mask)]), *others, (own, mask)]
            q_BTNH = self.attention.queries(h_BTD, rotary, axis=axis, compute=compute)
            o_BTD = self.attention.attend(q_BTNH, inputs.tokens, sources, axis=axis, compute=compute)
            return x_BTD + self.post_attention_norm.normalize(o_BTD, compute), keys_values

    @scope("mlp")
    def _transform(self, x_BTD: Array, axis: str, compute: Compute) -> Array:
        """Returns x plus its MLP; with remat long rows in parts, which costs one more forward pass of the MLP."""

        def transform(x):
            h = self.mlp.transform(self.pre_mlp_norm.normalize(x, compute))
            return x + self.post_mlp_norm.normalize(h, compute)

        rows, length, width = x_BTD.shape
        devices = sharding.parts(axis, length)  # each has its own columns, C, in parts
        columns = length // devices
        parts = math.ceil(columns / PART) if compute.remat != "none" and columns > LONG_ROW else 1
        if parts == 1:
            x_BTD = transform(x_BTD)
        else:
            # the gates of a whole row of 32,768 tokens would be most of what its backward pass holds
            size = math.ceil(columns / parts)
            x_BdCD = x_BTD.reshape(rows, devices, columns, width)
            padded_BdCD = jnp.pad(x_BdCD, ((0, 0), (0, 0), (0, parts * size - columns), (0, 0)))
            x_nBdcD = jnp.moveaxis(padded_BdCD.reshape(rows, devices, parts, size, width), 2, 0)
            x_nBdcD = constrain(x_nBdcD, None, "rows", axis, None, "embed_act")
            x_nBdcD = jax.lax.map(jax.checkpoint(transform, prevent_cse=False), x_nBdcD)
            x_BdCD = jnp.moveaxis(x_nBdcD, 0, 2).reshape(padded_BdCD.shape)[:, :, :columns]
            x_BTD = x_BdCD.reshape(rows, length, width)
        return constrain(x_BTD, "rows", axis, "embed_act")


class MergedBlock(Block):
    """A decoder layer with merged attention (T5Gemma 2 report, section 2).

    The decoder's past and all of the encoder are keys under one softmax, with one set of weights.
    """

    attention_scope = "merged"

    @scope("merged")
    def encoder_keys_values(self, memory_BSD: Float[Array, "B S M"], *, compute: Compute) -> KeyValues:
        """Returns keys and values by the weights of self-attention; keys are normed and not rotated."""
        return self.attention.keys(memory_BSD, None, axis=ENCODER, compute=compute)

    @override
    def forward(self, x_BTD, inputs, *, past=None, memory=None, compute):
        assert memory is not None
        memory = memory._replace(score_offset=inputs.encoder_offset)
        x_BTD, keys_values = self._self_attend(x_BTD, inputs, past, [(memory, masks.ALL)], compute=compute)
        return self._transform(x_BTD, inputs.axis, compute), keys_values


class CrossBlock(Block):
    """A decoder layer with separate cross-attention after self-attention (T5Gemma report, section 2).

    Cross-attention has no rotary embedding and no window; its keys and values come from states of the encoder's width.
    """

    def __init__(self, config: TextConfig, kind: LayerKind, *, memory_width: int, key: jax.Array, param_dtype):
        super().__init__(config, kind, key=key, param_dtype=param_dtype)
        self.pre_cross_norm, self.post_cross_norm = _norm(config, param_dtype), _norm(config, param_dtype)
        self.cross_attention = Attention(
            config, memory_width=memory_width, key=jax.random.fold_in(key, 2), param_dtype=param_dtype
        )

    @scope("cross")
    def encoder_keys_values(self, memory_BSD: Float[Array, "B S M"], *, compute: Compute) -> KeyValues:
        """Returns keys and values by the weights of cross-attention, not rotated."""
        return self.cross_attention.keys(memory_BSD, None, axis=ENCODER, compute=compute)

    @override
    def forward(self, x_BTD, inputs, *, past=None, memory=None, compute):
        assert memory is not None
        x_BTD, keys_values = self._self_attend(x_BTD, inputs, past, compute=compute)
        with scope("cross"):
            q_BTNH = self.cross_attention.queries(self.pre_cross_norm.normalize(x_BTD, compute), None, compute=compute)
            o_BTD = self.cross_attention.attend(q_BTNH, inputs.tokens, [(memory, masks.ALL)], compute=compute)
            x_BTD = x_BTD + self.post_cross_norm.normalize(o_BTD, compute)
        return self._transform(x_BTD, inputs.axis, compute), keys_values


def _norm(config: TextConfig, param_dtype) -> RMSNorm:
    return RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)


class PerLayer(NamedTuple):
    """One value for each layer, stored like the blocks of `Layers`: P values with a leading axis R, then the rest."""

    slots: tuple[Any, ...]
    tail: tuple[Any, ...]


class Layers(nnx.Module):
    """L layers, of any kind of module.

    Slot p holds the layers p, P + p, 2P + p, ... with a leading axis on every leaf; the tail holds the layers after the
    last whole pattern. Layer l is initialised from the l-th key, however it is stored.
    """

    def __init__(self, make: Callable[[Any, jax.Array], Any], pattern: Sequence[Any], layers: int, *, key: jax.Array):
        """Builds layers with `make(entry of the pattern, key)`; the pattern is repeated up to `layers`."""
        period = len(pattern)
        scanned = layers // period * period
        keys = jax.random.split(key, layers)
        # with fewer layers than a pattern has, all of them are in the tail
        indices = range(period if scanned else 0)
        slots = [jax.vmap(partial(make, pattern[p]))(keys[p:scanned:period]) for p in indices]
        self.slots = nnx.List(slots)
        self.tail = nnx.List([make(pattern[layer % period], keys[layer]) for layer in range(scanned, layers)])

    def map(self, function: Callable[[Any], Any]) -> PerLayer:
        """Returns function(block) of every layer, computed for all layers of a slot at once."""
        return PerLayer(tuple(jax.vmap(function)(slot) for slot in self.slots), tuple(map(function, self.tail)))

    def scan(
        self,
        step: Callable[[Any, Array, Any], tuple[Array, Any]],
        x: Array,
        extras: PerLayer | None = None,
        *,
        compute: Compute,
    ) -> tuple[Array, PerLayer]:
        """Runs x, y = step(block, x, extra) for every layer in order; returns the last x, and the y of every layer.

        Args:
          extras: the `extra` of every layer; None = None for all.
        """
        if extras is None:
            extras = PerLayer((None,) * len(self.slots), (None,) * len(self.tail))
        # within a scan XLA cannot merge recomputation with the forward pass, so no barriers are needed there
        remat = compute.remat != "none"
        step = in_loop(step)
        policy = kept.policy(compute.remat, offload=compute.offload)
        # the input of a block is kept by its name alone where it is moved to the host
        named = lambda block, x, extra: step(block, kept.kept(x, kept.INPUT), extra)  # noqa: E731
        recomputed = partial(jax.checkpoint, named if compute.offload else step, policy=policy)
        slot_step = recomputed(prevent_cse=not compute.scan) if remat else step
        tail_step = recomputed() if remat else step

        # the body of the loop is one whole pattern: its blocks differ in kind, its repeats only in weights
        def pattern(x, layers):
            ys = []
            for blocks, extras in _runs(*layers, nested=remat and compute.scan):
                if len(blocks) == 1:
                    x, y = slot_step(blocks[0], x, extras[0])
                    ys.append(y)
                else:
                    x, run_ys = jax.lax.scan(
                        lambda x, layer: slot_step(layer[0], x, layer[1]), x, _stack(blocks, extras)
                    )
                    ys += [jax.tree.map(lambda y, i=i: y[i], run_ys) for i in range(len(blocks))]
            return x, tuple(ys)

        slot_ys = ()
        if self.slots:
            x, slot_ys = (jax.lax.scan if compute.scan else _unrolled)(pattern, x, (self.slots, extras.slots))
        tail_ys = []
        for block, extra in zip(self.tail, extras.tail, strict=True):
            x, y = tail_step(block, x, extra)
            tail_ys.append(y)
        return x, PerLayer(slot_ys, tuple(tail_ys))


def _runs(blocks: Sequence[Any], extras: Sequence[Any], *, nested: bool) -> list[tuple[list[Any], list[Any]]]:
    """Returns the blocks and their extras in runs of equal neighbours if `nested`, else each alone.

    With remat a loop over a run keeps the backward pass at one block: of several blocks in one body XLA may recompute
    all before it goes back through the first, and then holds the activations of all (bench/long_rows.py).
    """
    runs: list[tuple[list[Any], list[Any]]] = []
    for block, extra in zip(blocks, extras, strict=True):
        last = None if not runs else (runs[-1][0][0], runs[-1][1][0])
        alike = nested and last is not None and jax.tree.structure(last) == jax.tree.structure((block, extra))
        if not alike:
            runs.append(([], []))
        runs[-1][0].append(block)
        runs[-1][1].append(extra)
    return runs


def _stack(blocks: Sequence[Any], extras: Sequence[Any]) -> Any:
    """Returns (block, extra) of a run, with a leading axis on every leaf."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(blocks, extras, strict=True))


def _unrolled(step, x, layers):
    """Returns what jax.lax.scan returns, without a loop in the program."""
    repeats = jax.tree.leaves(layers)[0].shape[0]
    ys = []
    for r in range(repeats):
        x, y = step(x, jax.tree.map(lambda leaf, r=r: leaf[r], layers))
        ys.append(y)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)


class Stack(nnx.Module):
    """The layers of an encoder or of a decoder, and the norm after them."""

    def __init__(
        self,
        config: TextConfig,
        *,
        key: jax.Array,
        param_dtype,
        block: Callable[..., Block] = Block,
    ):
        """Builds layers with `block`, which is called like the class Block: (config, kind, key=, param_dtype=)."""
        self.config = config
        make = lambda kind, key: block(config, kind, key=key, param_dtype=param_dtype)  # noqa: E731
        self.layers = Layers(make, config.pattern, config.layers, key=key)
        self.final_norm = _norm(config, param_dtype)

    def run(
        self,
        x_BTD: Float[Array, "B T D"],
        inputs: LayerInputs,
        memory: tuple[Float[Array, "B S M"], Sequences] | None = None,
        *,
        compute: Compute,
    ) -> Float[Array, "B T D"]:
        """Returns the final-normed states of tokens embedded as x; `memory` is the encoder's states and tokens."""

        def step(block: Block, x_BTD, _):
            # within the scan, so that the forward pass holds the encoder's keys of one layer at a time
            with scope(block.kind):
                keys_values = None if memory is None else block.encoder_keys_values(memory[0], compute=compute)
                encoder_keys = (
                    None if keys_values is None or memory is None else keys_values.as_keys(memory[1], ENCODER)
                )
                return block.forward(x_BTD, inputs, memory=encoder_keys, compute=compute)[0], None

        x_BTD, _ = self.layers.scan(step, x_BTD, compute=compute)
        return self.final_norm.normalize(x_BTD, compute)
