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

from t5g2.core.batch import Sequences
from t5g2.core.sharding import constrain
from t5g2.models import masks
from t5g2.models.attention import Attention, KeyValues
from t5g2.models.config import LayerKind, TextConfig
from t5g2.models.layers import Compute, GatedMLP, RMSNorm, rotary_cos_sin
from t5g2.models.masks import Keys, Mask


@dataclass(frozen=True)
class LayerInputs:
    """The tokens that a stack runs over, and what all its blocks need to know of them, by kind of layer."""

    tokens: Sequences
    masks: Mapping[LayerKind, Mask]
    rotary: Mapping[LayerKind, tuple[Array, Array]]

    @classmethod
    def create(cls, tokens: Sequences, config: TextConfig, mask: Callable[[LayerKind], Mask]) -> "LayerInputs":
        """The site of `tokens`; `mask` gives the mask of a kind of layer. Angles are computed here, once."""
        kinds: dict[LayerKind, None] = dict.fromkeys(config.pattern)
        turns: dict[LayerKind, tuple[Array, Array]] = {
            kind: rotary_cos_sin(tokens.positions, config.rope(kind), config.head_size) for kind in kinds
        }
        return cls(tokens, {kind: mask(kind) for kind in kinds}, turns)


class Block(nnx.Module):
    """One layer: attention and MLP, each between two norms, each added to what came in (Gemma 3 report, section 2).

    Its tokens see themselves, and what a cache holds. Subclasses see the encoder too.
    """

    def __init__(self, config: TextConfig, kind: LayerKind, *, key: jax.Array, param_dtype):
        self.kind: LayerKind = kind
        keys = jax.random.split(key)
        self.pre_attention_norm, self.post_attention_norm = _norm(config, param_dtype), _norm(config, param_dtype)
        self.attention = Attention(config, key=keys[0], param_dtype=param_dtype)
        self.pre_mlp_norm, self.post_mlp_norm = _norm(config, param_dtype), _norm(config, param_dtype)
        self.mlp = GatedMLP(config.width, config.mlp_width, key=keys[1], param_dtype=param_dtype)

    def encoder_keys_values(self, memory_BSD: Float[Array, "B S M"], *, compute: Compute) -> KeyValues | None:
        """Keys and values of the encoder's states as this layer sees them; None = it does not see them."""
        del memory_BSD, compute
        return None

    def forward(
        self,
        x_BTD: Float[Array, "B T D"],
        site: LayerInputs,
        *,
        past: Keys | None = None,
        memory: Keys | None = None,
        compute: Compute,
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """The next hidden states, and the keys and values of these tokens for a cache.

        Args:
          past: what the cache holds of this layer.
          memory: what `remember` made of the encoder's states.
        """
        del memory
        x_BTD, own = self._attend(x_BTD, site, past, compute=compute)
        return self._transform(x_BTD, compute), own

    def _attend(
        self,
        x_BTD: Array,
        site: LayerInputs,
        past: Keys | None,
        others: Sequence[tuple[Keys, Mask]] = (),
        *,
        compute: Compute,
    ) -> tuple[Array, KeyValues]:
        turn, mask = site.rotary[self.kind], site.masks[self.kind]
        h_BTD = self.pre_attention_norm.normalize(x_BTD, compute)
        own = self.attention.keys(h_BTD, turn, compute=compute)
        sources = [*([] if past is None else [(past, mask)]), *others, (own.as_keys(site.tokens), mask)]
        q_BTNH = self.attention.queries(h_BTD, turn, compute=compute)
        o_BTD = self.attention.attend(q_BTNH, site.tokens, sources, compute=compute)
        return x_BTD + self.post_attention_norm.normalize(o_BTD, compute), own

    def _transform(self, x_BTD: Array, compute: Compute) -> Array:
        h_BTD = self.mlp.transform(self.pre_mlp_norm.normalize(x_BTD, compute))
        x_BTD = x_BTD + self.post_mlp_norm.normalize(h_BTD, compute)
        return constrain(x_BTD, "rows", "length", "embed_act")


class MergedBlock(Block):
    """A decoder's layer that attends to its own past and to all of the encoder with one set of weights, under one
    softmax (T5Gemma 2 report, section 2).
    """

    def encoder_keys_values(self, memory_BSD: Float[Array, "B S M"], *, compute: Compute) -> KeyValues:
        """Keys and values from the weights of self-attention; keys normed and not rotated."""
        return self.attention.keys(memory_BSD, None, compute=compute)

    def forward(self, x_BTD, site, *, past=None, memory=None, compute):
        """As Block.forward."""
        assert memory is not None
        x_BTD, own = self._attend(x_BTD, site, past, [(memory, masks.ALL)], compute=compute)
        return self._transform(x_BTD, compute), own


class CrossBlock(Block):
    """A decoder's layer with a sublayer of its own for the encoder, after self-attention (T5Gemma report, section 2):
    no rotation, no window, keys and values from states of the encoder's width.
    """

    def __init__(self, config: TextConfig, kind: LayerKind, *, memory_width: int, key: jax.Array, param_dtype):
        super().__init__(config, kind, key=key, param_dtype=param_dtype)
        self.pre_cross_norm, self.post_cross_norm = _norm(config, param_dtype), _norm(config, param_dtype)
        self.cross_attention = Attention(
            config, memory_width=memory_width, key=jax.random.fold_in(key, 2), param_dtype=param_dtype
        )

    def encoder_keys_values(self, memory_BSD: Float[Array, "B S M"], *, compute: Compute) -> KeyValues:
        """Keys and values from weights of their own, not rotated."""
        return self.cross_attention.keys(memory_BSD, None, compute=compute)

    def forward(self, x_BTD, site, *, past=None, memory=None, compute):
        """As Block.forward."""
        assert memory is not None
        x_BTD, own = self._attend(x_BTD, site, past, compute=compute)
        q_BTNH = self.cross_attention.queries(self.pre_cross_norm.normalize(x_BTD, compute), None, compute=compute)
        o_BTD = self.cross_attention.attend(q_BTNH, site.tokens, [(memory, masks.ALL)], compute=compute)
        x_BTD = x_BTD + self.post_cross_norm.normalize(o_BTD, compute)
        return self._transform(x_BTD, compute), own


def _norm(config: TextConfig, param_dtype) -> RMSNorm:
    return RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)


class PerLayer(NamedTuple):
    """One value for each layer, stored as `Layers` stores its blocks: P values with a leading axis R, then the rest."""

    slots: tuple[Any, ...]
    tail: tuple[Any, ...]


class Layers(nnx.Module):
    """L layers, of any kind of module. Slot p holds the layers p, P + p, 2P + p, ... with a leading axis on every leaf;
    the tail holds the layers that do not fill a pattern. Layer l is made from the l-th key, however it is stored.
    """

    def __init__(self, make: Callable[[Any, jax.Array], Any], pattern: Sequence[Any], layers: int, *, key: jax.Array):
        """`make` gives the layer for an entry of the pattern and a key; the pattern is repeated up to `layers`."""
        period = len(pattern)
        scanned = layers // period * period
        keys = jax.random.split(key, layers)
        first = range(period if scanned else 0)
        slots = [jax.vmap(partial(make, pattern[p]))(keys[p:scanned:period]) for p in first]
        self.slots = nnx.List(slots)
        self.tail = nnx.List([make(pattern[layer % period], keys[layer]) for layer in range(scanned, layers)])

    def map(self, function: Callable[[Any], Any]) -> PerLayer:
        """function(block) of every layer, all layers of a slot at once."""
        return PerLayer(tuple(jax.vmap(function)(slot) for slot in self.slots), tuple(map(function, self.tail)))

    def scan(
        self,
        step: Callable[[Any, Array, Any], tuple[Array, Any]],
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

    def __init__(
        self,
        config: TextConfig,
        *,
        key: jax.Array,
        param_dtype,
        block: Callable[..., Block] = Block,
    ):
        """`block` makes a layer as the class Block does: config, kind, key and param_dtype."""
        self.config = config
        make = lambda kind, key: block(config, kind, key=key, param_dtype=param_dtype)  # noqa: E731
        self.layers = Layers(make, config.pattern, config.layers, key=key)
        self.final_norm = _norm(config, param_dtype)

    def run(
        self,
        x_BTD: Float[Array, "B T D"],
        site: LayerInputs,
        memory: tuple[Float[Array, "B S M"], Sequences] | None = None,
        *,
        compute: Compute,
    ) -> Float[Array, "B T D"]:
        """Final-normed states of tokens embedded as x; `memory` is the encoder's states and tokens."""

        def step(block: Block, x_BTD, _):
            made = None if memory is None else block.encoder_keys_values(memory[0], compute=compute)
            seen = None if made is None or memory is None else made.as_keys(memory[1])
            return block.forward(x_BTD, site, memory=seen, compute=compute)[0], None

        x_BTD, _ = self.layers.scan(step, x_BTD, compute=compute)
        return self.final_norm.normalize(x_BTD, compute)
