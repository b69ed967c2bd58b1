"""T5Gemma and T5Gemma 2: encoder-decoder models of Gemma 2 and Gemma 3 blocks.

B batch, T decoder length, S encoder length, I images of a row, D width, V vocabulary.

T5Gemma (arXiv 2504.06225): separate cross-attention, an embedding for each side. T5Gemma 2 (arXiv 2512.14856): merged
attention, one embedding for everything, images in the encoder. Sources beside the reports: transformers 5.23.0,
modeling_t5gemma.py and modeling_t5gemma2.py, which tests/parity compares with; what the reports leave open is as in
that code: encoder states are not normed again before the decoder's key projections, their keys are not rotated, and the
decoder's windows never hide them. Known deviation: the window of T5Gemma's encoder (config: encoder_window).
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from t5g2.core.batch import Sequences
from t5g2.models import cache as caches
from t5g2.models import image_embeddings as images
from t5g2.models import layers, masks
from t5g2.models.config import EncoderDecoderConfig, LayerKind, TextConfig
from t5g2.models.image_embeddings import with_blocks
from t5g2.models.layers import Compute, Embedder, Head, Unembedder
from t5g2.models.siglip import Projector, VisionTower
from t5g2.models.stack import Block, CrossBlock, LayerInputs, MergedBlock, Stack


class T5Gemma(nnx.Module):
    """An encoder that sees both ways, and a decoder whose layers attend to their own past and to all of the encoder."""

    def __init__(self, config: EncoderDecoderConfig, *, key: jax.Array, param_dtype=jnp.float32):
        keys = jax.random.split(key, 3)
        self.config = config
        encoder, decoder = config.encoder, config.decoder
        embedder = partial(Embedder, param_dtype=param_dtype, eoi_id=config.eoi_id)
        # further keys are folded in: they change no weight of a model that does not need them
        if config.tied_embedding:
            self.embedder = embedder(decoder.vocab_size, decoder.width, key=keys[0])
        else:
            self.encoder_embedder = embedder(encoder.vocab_size, encoder.width, key=keys[0])
            self.decoder_embedder = embedder(decoder.vocab_size, decoder.width, key=jax.random.fold_in(key, 1))
        self.encoder = Stack(encoder, key=keys[1], param_dtype=param_dtype)
        self.decoder = Stack(decoder, key=keys[2], param_dtype=param_dtype, block=partial(_decoder_block, config))
        if not decoder.tied_head:
            unembedder_key = jax.random.fold_in(key, 2)
            self.unembedder = Unembedder(decoder.vocab_size, decoder.width, key=unembedder_key, param_dtype=param_dtype)
        if encoder.images is not None:
            vision_key, projector_key = (jax.random.fold_in(key, number) for number in (3, 4))
            self.vision = VisionTower(encoder.images.vision, key=vision_key, param_dtype=param_dtype)
            self.projector = Projector(encoder.images, encoder.width, key=projector_key, param_dtype=param_dtype)

    def hidden(
        self,
        encoder: Sequences,
        decoder: Sequences,
        images: Float[Array, "B I H W 3"] | None = None,
        *,
        compute: Compute,
    ) -> Float[Array, "B T D"]:
        """Final-normed decoder states of every token, for the loss or for `logits`.

        In a packed row a decoder token sees the encoder tokens of its own segment.

        Args:
          images: float32 in [-1, 1], by row; t5g2.models.image_embeddings says which of the encoder's tokens they stand for.
        """
        return self.decode(decoder, self.encode(encoder, images, compute=compute), encoder, compute=compute)

    def encode(
        self, encoder: Sequences, images: Float[Array, "B I H W 3"] | None = None, *, compute: Compute
    ) -> Float[Array, "B S D"]:
        """Final-normed encoder states; what stands at padding is finite and means nothing.

        In a causal encoder the tokens of an image see each other nevertheless, as in a decoder-only model.
        """
        if self.config.encoder_attention == "causal" and self.config.encoder.images is not None:
            encoder = with_blocks(encoder, self.config.encoder.images)
        site = LayerInputs.create(encoder, self.config.encoder, lambda kind: masks.encoder(self.config, kind))
        return self.encoder.run(self._embed_encoder(encoder, images, compute), site, compute=compute)

    def decode(
        self, decoder: Sequences, memory_BSD: Float[Array, "B S M"], encoder: Sequences, *, compute: Compute
    ) -> Float[Array, "B T D"]:
        """Final-normed decoder states, given the states of `encoder`."""
        x_BTD = self._embed_decoder(decoder, compute)
        return self.decoder.run(x_BTD, self._site(decoder), (memory_BSD, encoder), compute=compute)

    def head(self) -> Head:
        """What the loss needs to turn states into logits."""
        table = self._decoder_embedder.table if self.config.decoder.tied_head else self.unembedder.table
        return Head(table[...], self.config.decoder.final_softcap)

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """float32 logits of every position; for decoding, not for training."""
        return layers.logits(hidden_BTD, self.head())

    def start_cache(
        self,
        rows: int,
        length: int,
        *,
        encoder: Sequences | None = None,
        images: Float[Array, "B I H W 3"] | None = None,
        compute: Compute,
    ) -> caches.Cache:
        """A cache for `rows` rows of up to `length` decoder tokens, padding included: empty but for the encoder's keys.

        Runs the encoder, once; its states are not needed again.
        """
        if encoder is None or encoder.tokens.shape[0] != rows:
            given = None if encoder is None else encoder.tokens.shape[0]
            raise ValueError(f"a cache of {rows} rows needs encoder tokens of as many rows; given: {given}")
        memory_BSD = self.encode(encoder, images, compute=compute)
        return caches.start(self.decoder, rows, length, memory_BSD=memory_BSD, encoder=encoder, compute=compute)

    def extend(
        self, decoder: Sequences, cache: caches.Cache, images: None = None, *, compute: Compute
    ) -> tuple[Float[Array, "B T D"], caches.Cache]:
        """States of tokens that follow those in the cache, and the cache with them: a whole prompt, or one token."""
        if images is not None:
            raise ValueError("an encoder-decoder model reads images with its encoder; give them to `start_cache`")
        x_BTD = self._embed_decoder(decoder, compute)
        return caches.extend(self.decoder, x_BTD, self._site(decoder), cache, compute=compute)

    @property
    def _decoder_embedder(self) -> Embedder:
        return self.embedder if self.config.tied_embedding else self.decoder_embedder

    def _embed_decoder(self, decoder: Sequences, compute: Compute) -> Float[Array, "B T D"]:
        return images.embed(self, self._decoder_embedder, None, decoder.tokens, None, compute=compute)

    def _embed_encoder(self, encoder: Sequences, pictures: Array | None, compute: Compute) -> Float[Array, "B S M"]:
        embedder = self.embedder if self.config.tied_embedding else self.encoder_embedder
        return images.embed(self, embedder, self.config.encoder.images, encoder.tokens, pictures, compute=compute)

    def _site(self, decoder: Sequences) -> LayerInputs:
        return LayerInputs.create(decoder, self.config.decoder, lambda kind: masks.decoder(self.config.decoder, kind))


def _decoder_block(whole: EncoderDecoderConfig, config: TextConfig, kind: LayerKind, *, key: jax.Array, param_dtype):
    """The kind of block that a layer of the decoder is."""
    if whole.cross_layers == "global" and kind == "local":
        return Block(config, kind, key=key, param_dtype=param_dtype)
    if whole.cross == "merged":
        return MergedBlock(config, kind, key=key, param_dtype=param_dtype)
    return CrossBlock(config, kind, memory_width=whole.encoder.width, key=key, param_dtype=param_dtype)
