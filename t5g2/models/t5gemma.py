"""T5Gemma 2: an encoder-decoder model of Gemma 3 blocks, with merged attention and one embedding for everything.

B batch, T decoder length, S encoder length, D width, V vocabulary. Source: T5Gemma 2 report (arXiv 2512.14856) section
2; transformers 5.23.0, modeling_t5gemma2.py, which tests/parity compares with. What the report leaves open is as in
that code: encoder states are not normed again before the decoder's key projection, their keys are not rotated, and the
decoder's windows never hide them.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from t5g2.core.batch import Stream
from t5g2.core.mesh import constrain
from t5g2.models import cache as caches
from t5g2.models import layers, masks
from t5g2.models.config import EncoderDecoderConfig
from t5g2.models.layers import Compute, Embedder, Head
from t5g2.models.stack import Block, Site, Stack


class T5Gemma(nnx.Module):
    """An encoder that sees both ways, and a decoder whose every layer attends to its own past and to all of the encoder
    with one set of weights, under one softmax.
    """

    def __init__(self, config: EncoderDecoderConfig, *, key: jax.Array, param_dtype=jnp.float32):
        keys = jax.random.split(key, 3)
        self.config = config
        self.embedder = Embedder(
            config.decoder.vocab_size, config.decoder.width, key=keys[0], param_dtype=param_dtype, eoi_id=config.eoi_id
        )
        self.encoder = Stack(config.encoder, key=keys[1], param_dtype=param_dtype)
        self.decoder = Stack(config.decoder, key=keys[2], param_dtype=param_dtype)

    def hidden(self, encoder: Stream, decoder: Stream, *, compute: Compute) -> Float[Array, "B T D"]:
        """Final-normed decoder states of every token, for the loss or for `logits`.

        In a packed row a decoder token sees the encoder tokens of its own segment.
        """
        return self.decode(decoder, self.encode(encoder, compute=compute), encoder, compute=compute)

    def encode(self, encoder: Stream, *, compute: Compute) -> Float[Array, "B S D"]:
        """Final-normed encoder states; what stands at padding is finite and means nothing."""
        site = Site.of(encoder, self.encoder.config, masks.encoder)
        return self.encoder.run(self._embed(encoder, compute), site, compute=compute)

    def decode(
        self, decoder: Stream, memory_BSD: Float[Array, "B S D"], encoder: Stream, *, compute: Compute
    ) -> Float[Array, "B T D"]:
        """Final-normed decoder states, given the states of `encoder`."""

        def memory(block: Block):
            return [(block.attention.keys(memory_BSD, None).of(encoder), masks.ALL)]

        return self.decoder.run(self._embed(decoder, compute), self._site(decoder), memory, compute=compute)

    def head(self) -> Head:
        """What the loss needs to turn states into logits."""
        return Head(self.embedder.table[...], self.config.decoder.final_softcap)

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """float32 logits of every position; for decoding, not for training."""
        return layers.logits(hidden_BTD, self.head())

    def start_cache(self, rows: int, length: int, *, encoder: Stream | None = None, compute: Compute) -> caches.Cache:
        """A cache for `rows` rows of up to `length` decoder tokens, padding included: empty but for the encoder's keys.

        Runs the encoder, once; its states are not needed again.
        """
        if encoder is None or encoder.tokens.shape[0] != rows:
            given = None if encoder is None else encoder.tokens.shape[0]
            raise ValueError(f"a cache of {rows} rows needs encoder tokens of as many rows; given: {given}")
        memory_BSD = self.encode(encoder, compute=compute)
        return caches.start(self.decoder, rows, length, memory_BSD=memory_BSD, encoder=encoder, compute=compute)

    def extend(
        self, decoder: Stream, cache: caches.Cache, *, compute: Compute
    ) -> tuple[Float[Array, "B T D"], caches.Cache]:
        """States of tokens that follow those in the cache, and the cache with them: a whole prompt, or one token."""
        return caches.extend(self.decoder, self._embed(decoder, compute), self._site(decoder), cache, compute=compute)

    def _embed(self, tokens: Stream, compute: Compute) -> Float[Array, "B T D"]:
        x_BTD = self.embedder.embed(tokens.tokens, dtype=jnp.dtype(compute.dtype))
        return constrain(x_BTD, "rows", "length", "embed_act")

    def _site(self, decoder: Stream) -> Site:
        return Site.of(decoder, self.config.decoder, masks.decoder)
