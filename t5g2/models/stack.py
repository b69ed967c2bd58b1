"""Blocks, and the stack that runs them: one loop over whole patterns of layers, then the layers that remain.

B batch, T length, D width, P blocks of a pattern, R repeats of the pattern, L = R * P + len(tail) layers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from t5g2.core.batch import Stream
from t5g2.core.mesh import constrain
from t5g2.models.attention import Attention, KeyValues
from t5g2.models.config import LayerKind, TextConfig
from t5g2.models.layers import Compute, GatedMLP, RMSNorm, rotation
from t5g2.models.masks import Keys, Mask


@dataclass(frozen=True)
class Site:
    """The tokens that a stack runs over, and what all its blocks need to know of them, by kind of layer."""

    tokens: Stream
    masks: Mapping[LayerKind, Mask]
    turns: Mapping[LayerKind, tuple[Array, Array]]

    @classmethod
    def of(cls, tokens: Stream, config: TextConfig, mask: Callable[[TextConfig, LayerKind], Mask]) -> "Site":
        """The site of `tokens`; `mask` is `masks.decoder` or `masks.encoder`. Angles are computed here, once."""
        kinds: dict[LayerKind, None] = dict.fromkeys(config.pattern)
        turns: dict[LayerKind, tuple[Array, Array]] = {
            kind: rotation(tokens.positions, config.rope(kind), config.head_size) for kind in kinds
        }
        return cls(tokens, {kind: mask(config, kind) for kind in kinds}, turns)


class Block(nnx.Module):
    """One layer: attention and MLP, each between two norms, each added to what came in (Gemma 3 report, section 2)."""

    def __init__(self, config: TextConfig, kind: LayerKind, *, key: jax.Array, param_dtype):
        self.kind: LayerKind = kind
        keys = jax.random.split(key)

        def norm():
            return RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)

        self.pre_attention_norm, self.post_attention_norm = norm(), norm()
        self.attention = Attention(config, key=keys[0], param_dtype=param_dtype)
        self.pre_mlp_norm, self.post_mlp_norm = norm(), norm()
        self.mlp = GatedMLP(config.width, config.mlp_width, key=keys[1], param_dtype=param_dtype)

    def forward(
        self, x_BTD: Float[Array, "B T D"], site: Site, others: Sequence[tuple[Keys, Mask]] = (), *, compute: Compute
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """The next hidden states, and the keys and values of these tokens for a cache.

        `others` are sources of keys beside the tokens themselves: a cache, the encoder's states.
        """
        turn = site.turns[self.kind]
        h_BTD = self.pre_attention_norm.normalize(x_BTD)
        own = self.attention.keys(h_BTD, turn)
        sources = [*others, (own.of(site.tokens), site.masks[self.kind])]
        o_BTD = self.attention.mix(self.attention.queries(h_BTD, turn), site.tokens, sources, compute=compute)
        x_BTD = x_BTD + self.post_attention_norm.normalize(o_BTD)
        h_BTD = self.pre_mlp_norm.normalize(x_BTD)
        x_BTD = x_BTD + self.post_mlp_norm.normalize(self.mlp.transform(h_BTD))
        return constrain(x_BTD, "rows", "length", "embed_act"), own


class PerLayer(NamedTuple):
    """One value for each layer, stored as `Layers` stores its blocks: P values with a leading axis R, then the rest."""

    slots: tuple[Any, ...]
    tail: tuple[Any, ...]


class Layers(nnx.Module):
    """L blocks. Slot p holds the layers p, P + p, 2P + p, ... with a leading axis on every leaf; the tail holds the
    layers that do not fill a pattern. Layer l is made from the l-th key, however it is stored.
    """

    def __init__(self, config: TextConfig, *, key: jax.Array, param_dtype):
        period = len(config.pattern)
        scanned = config.layers // period * period
        keys = jax.random.split(key, config.layers)

        def make(kind: LayerKind, key: jax.Array) -> Block:
            return Block(config, kind, key=key, param_dtype=param_dtype)

        first = range(period if scanned else 0)
        slots = [jax.vmap(partial(make, config.kind(p)))(keys[p:scanned:period]) for p in first]
        self.slots = nnx.List(slots)
        self.tail = nnx.List([make(config.kind(layer), keys[layer]) for layer in range(scanned, config.layers)])

    def map(self, function: Callable[[Block], Any]) -> PerLayer:
        """function(block) of every layer, all layers of a slot at once."""
        return PerLayer(tuple(jax.vmap(function)(slot) for slot in self.slots), tuple(map(function, self.tail)))

    def fold(
        self,
        step: Callable[[Block, Array, Any], tuple[Array, Any]],
        x: Array,
        extras: PerLayer | None = None,
        *,
        compute: Compute,
    ) -> tuple[Array, PerLayer]:
        """x, y = step(block, x, extra) for every layer in turn; gives the last x, and the y of every layer."""
        if extras is None:
            extras = PerLayer((None,) * len(self.slots), (None,) * len(self.tail))
        # inside a loop nothing can be merged with the forward pass, so remat needs no barriers there
        remat = compute.remat == "block"
        looped = jax.checkpoint(step, prevent_cse=not compute.scan) if remat else step
        alone = jax.checkpoint(step) if remat else step

        def pattern(x, layers):
            ys = []
            for block, extra in zip(*layers, strict=True):
                x, y = looped(block, x, extra)
                ys.append(y)
            return x, tuple(ys)

        slot_ys = ()
        if self.slots:
            x, slot_ys = (jax.lax.scan if compute.scan else _unrolled)(pattern, x, (self.slots, extras.slots))
        tail_ys = []
        for block, extra in zip(self.tail, extras.tail, strict=True):
            x, y = alone(block, x, extra)
            tail_ys.append(y)
        return x, PerLayer(slot_ys, tuple(tail_ys))


def _unrolled(step, x, layers):
    """What jax.lax.scan computes, one step after the other."""
    repeats = jax.tree.leaves(layers)[0].shape[0]
    ys = []
    for r in range(repeats):
        x, y = step(x, jax.tree.map(lambda leaf, r=r: leaf[r], layers))
        ys.append(y)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)


class Stack(nnx.Module):
    """The layers of an encoder or of a decoder, and the norm after them."""

    def __init__(self, config: TextConfig, *, key: jax.Array, param_dtype):
        self.config = config
        self.layers = Layers(config, key=key, param_dtype=param_dtype)
        self.final_norm = RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)

    def run(
        self,
        x_BTD: Float[Array, "B T D"],
        site: Site,
        others: Callable[[Block], Sequence[tuple[Keys, Mask]]] = lambda block: (),
        *,
        compute: Compute,
    ) -> Float[Array, "B T D"]:
        """Final-normed states of tokens embedded as x; `others` gives each block its further sources of keys."""

        def step(block: Block, x_BTD, _):
            return block.forward(x_BTD, site, others(block), compute=compute)[0], None

        x_BTD, _ = self.layers.fold(step, x_BTD, compute=compute)
        return self.final_norm.normalize(x_BTD)
