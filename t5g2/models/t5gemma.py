"""T5Gemma and T5Gemma 2: encoder-decoder models of Gemma 2 and Gemma 3 blocks.

B batch, T decoder length, S encoder length, I images of a row, D width, V vocabulary.

T5Gemma (arXiv 2504.06225): separate cross-attention, an embedding for each side. T5Gemma 2 (arXiv 2512.14856): merged
attention, one embedding for everything, images in the encoder. Sources beside the reports: transformers 5.23.0,
modeling_t5gemma.py and modeling_t5gemma2.py, which tests/parity compares with. Details that the reports leave open
follow that code: encoder states are not normed again before the decoder's key projections, their keys are not rotated,
and the decoder's windows never hide them. Known deviation: the window of T5Gemma's encoder (config:
encoder_window).
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from t5g2.core.batch import Sequences
from t5g2.core.scopes import scope
from t5g2.models import cache as caches
from t5g2.models import image_embeddings, layers, masks
from t5g2.models.config import EncoderDecoderConfig, LayerKind, TextConfig
from t5g2.models.layers import Compute, Embedder, Head, Unembedder
from t5g2.models.probe_head import ProbeHead
from t5g2.models.siglip import Projector, VisionTower
from t5g2.models.stack import ENCODER, Block, CrossBlock, LayerInputs, MergedBlock, Stack


class T5Gemma(nnx.Module):
    """A bidirectional encoder, and a decoder whose layers attend to their own past and to all of the encoder."""

    def __init__(self, config: EncoderDecoderConfig, *, key: jax.Array, param_dtype=jnp.float32):
        keys = jax.random.split(key, 3)
        self.config = config
        encoder, decoder = config.encoder, config.decoder
        embedder = partial(Embedder, param_dtype=param_dtype, eoi_id=config.eoi_id)
        # further keys are folded in, so the weights of a model without these parts do not depend on them
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
        if config.probe is not None:
            probed = decoder if config.probe.state == "decoder_first" else encoder
            probe_key = jax.random.fold_in(key, 5)
            self.probe = ProbeHead(config.probe, probed.width, key=probe_key, param_dtype=param_dtype)

    def hidden(
        self,
        encoder: Sequences,
        decoder: Sequences,
        images: Float[Array, "B I H W 3"] | None = None,
        *,
        encoder_offset: Float[Array, ""] | None = None,
        compute: Compute,
    ) -> Float[Array, "B T D"]:
        """Returns the final-normed decoder states of every token, for the loss or for `logits`.

        In a packed row a decoder token attends to the encoder tokens of its own segment.

        Args:
          images: float32 in [-1, 1], by row, for the encoder; t5g2.models.image_embeddings has their order.
          encoder_offset: added to the scores of the encoder's keys in merged attention; None = nothing, as released.
        """
        memory_BSD = self.encode(encoder, images, compute=compute)
        return self.decode(decoder, memory_BSD, encoder, encoder_offset=encoder_offset, compute=compute)

    @scope("encoder")
    def encode(
        self, encoder: Sequences, images: Float[Array, "B I H W 3"] | None = None, *, compute: Compute
    ) -> Float[Array, "B S D"]:
        """Returns the final-normed encoder states; those at padding are finite and meaningless."""
        # the tokens of an image see each other in a causal encoder too, as in a decoder-only model
        if self.config.encoder_attention == "causal" and self.config.encoder.images is not None:
            encoder = image_embeddings.with_blocks(encoder, self.config.encoder.images)
        mask = lambda kind: masks.encoder(self.config, kind)  # noqa: E731
        inputs = LayerInputs.create(encoder, self.config.encoder, mask, axis=ENCODER)
        return self.encoder.run(self._embed_encoder(encoder, images, compute), inputs, compute=compute)

    @scope("decoder")
    def decode(
        self,
        decoder: Sequences,
        memory_BSD: Float[Array, "B S M"],
        encoder: Sequences,
        *,
        encoder_offset: Float[Array, ""] | None = None,
        compute: Compute,
    ) -> Float[Array, "B T D"]:
        """Returns the final-normed decoder states, given the encoder's states `memory_BSD` of `encoder`."""
        x_BTD, inputs = self._embed_decoder(decoder, compute), self._layer_inputs(decoder, encoder_offset)
        return self.decoder.run(x_BTD, inputs, (memory_BSD, encoder), compute=compute)

    def head(self) -> Head:
        """Returns the output head, which turns states into logits."""
        table = self._decoder_embedder.table if self.config.decoder.tied_head else self.unembedder.table
        return Head(table[...], self.config.decoder.final_softcap)

    @scope("head")
    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns float32 logits of every position; for decoding, not for training."""
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
        """Runs the encoder, and returns a cache with its keys for `rows` rows of up to `length` decoder tokens.

        The length includes padding. The encoder is not run again while decoding.
        """
        if encoder is None or encoder.tokens.shape[0] != rows:
            encoder_rows = None if encoder is None else encoder.tokens.shape[0]
            raise ValueError(f"a cache of {rows} rows needs encoder tokens of as many rows; given: {encoder_rows}")
        # only the keys and values of the encoder's states are kept, not the states
        memory_BSD = self.encode(encoder, images, compute=compute)
        with scope("decoder"):
            return caches.start(self.decoder, rows, length, memory_BSD=memory_BSD, encoder=encoder, compute=compute)

    @scope("decoder")
    def extend(
        self,
        decoder: Sequences,
        cache: caches.Cache,
        images: None = None,
        *,
        first: bool = False,
        compute: Compute,
    ) -> tuple[Float[Array, "B T D"], caches.Cache]:
        """Returns the states of a prompt or of one token after the tokens in the cache, and the extended cache.

        Args:
          first: the cache is empty, and is not read.
        """
        if images is not None:
            raise ValueError("an encoder-decoder model reads images with its encoder; give them to `start_cache`")
        x_BTD = self._embed_decoder(decoder, compute)
        return caches.extend(self.decoder, x_BTD, self._layer_inputs(decoder), cache, first=first, compute=compute)

    @property
    def _decoder_embedder(self) -> Embedder:
        return self.embedder if self.config.tied_embedding else self.decoder_embedder

    def _embed_decoder(self, decoder: Sequences, compute: Compute) -> Float[Array, "B T D"]:
        return image_embeddings.embed(self, self._decoder_embedder, None, decoder.tokens, None, compute=compute)

    def _embed_encoder(self, encoder: Sequences, images: Array | None, compute: Compute) -> Float[Array, "B S M"]:
        embedder = self.embedder if self.config.tied_embedding else self.encoder_embedder
        config = self.config.encoder.images
        return image_embeddings.embed(self, embedder, config, encoder.tokens, images, axis=ENCODER, compute=compute)

    def _layer_inputs(self, decoder: Sequences, encoder_offset: Array | None = None) -> LayerInputs:
        config = self.config.decoder
        mask = lambda kind: masks.decoder(config, kind)  # noqa: E731
        return LayerInputs.create(decoder, config, mask, encoder_offset=encoder_offset)


def _decoder_block(model: EncoderDecoderConfig, config: TextConfig, kind: LayerKind, *, key: jax.Array, param_dtype):
    """Returns the block of a decoder layer of this kind."""
    if model.cross_layers == "global" and kind == "local":
        return Block(config, kind, key=key, param_dtype=param_dtype)
    if model.cross == "merged":
        return MergedBlock(config, kind, key=key, param_dtype=param_dtype)
    return CrossBlock(config, kind, memory_width=model.encoder.width, key=key, param_dtype=param_dtype)
