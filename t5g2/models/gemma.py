"""Gemma 3: a decoder-only model.

B batch, T length, D width, V vocabulary. Source: Gemma 3 report (arXiv 2503.19786) section 2; transformers 5.23.0,
modeling_gemma3.py, which tests/parity compares with.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5g2.core.batch import Stream
from t5g2.core.mesh import constrain
from t5g2.models import cache as caches
from t5g2.models import layers, masks
from t5g2.models.config import TextConfig
from t5g2.models.layers import Compute, Embedder, Head
from t5g2.models.stack import Site, Stack


class Gemma(Stack):
    """A stack of blocks over embedded tokens; the output head is the embedding."""

    def __init__(self, config: TextConfig, *, key: jax.Array, param_dtype=jnp.float32):
        keys = jax.random.split(key)
        super().__init__(config, key=keys[0], param_dtype=param_dtype)
        self.embedder = Embedder(config.vocab_size, config.width, key=keys[1], param_dtype=param_dtype)

    def hidden(self, encoder: None, decoder: Stream, *, compute: Compute) -> Float[Array, "B T D"]:
        """Final-normed states of every token, for the loss or for `logits`. There is no encoder side."""
        _refuse(encoder)
        return self.run(self._embed(decoder, compute), self._site(decoder), compute=compute)

    def head(self) -> Head:
        """What the loss needs to turn states into logits."""
        return Head(self.embedder.table[...], self.config.final_softcap)

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """float32 logits of every position; for decoding, not for training."""
        return layers.logits(hidden_BTD, self.head())

    def start_cache(self, rows: int, length: int, *, encoder: None = None, compute: Compute) -> caches.Cache:
        """An empty cache for `rows` rows of up to `length` tokens, padding included."""
        _refuse(encoder)
        return caches.start(self, rows, length, compute=compute)

    def extend(
        self, decoder: Stream, cache: caches.Cache, *, compute: Compute
    ) -> tuple[Float[Array, "B T D"], caches.Cache]:
        """States of tokens that follow those in the cache, and the cache with them: a whole prompt, or one token."""
        return caches.extend(self, self._embed(decoder, compute), self._site(decoder), cache, compute=compute)

    def _embed(self, decoder: Stream, compute: Compute) -> Float[Array, "B T D"]:
        x_BTD = self.embedder.embed(decoder.tokens, dtype=jnp.dtype(compute.dtype))
        return constrain(x_BTD, "rows", "length", "embed_act")

    def _site(self, decoder: Stream) -> Site:
        return Site.of(decoder, self.config, masks.decoder)


def _refuse(encoder: None) -> None:
    if encoder is not None:
        raise ValueError("a decoder-only model has no encoder side; give encoder=None, or build an encoder-decoder")
