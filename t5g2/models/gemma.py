"""Gemma 2 and Gemma 3: decoder-only models; Gemma 3 reads images too.

B batch, T length, I images of a row, D width, V vocabulary. Sources: Gemma 2 report (arXiv 2408.00118), Gemma 3 report
(arXiv 2503.19786) section 2; transformers 5.23.0, modeling_gemma2.py and modeling_gemma3.py, which tests/parity
compares with. Where the official code (google-deepmind/gemma) differs, both are options: ImageConfig.window,
Compute.norm_dtype, Compute.softmax_dtype.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5g2.core.batch import Sequences
from t5g2.core.scopes import scope
from t5g2.models import cache as caches
from t5g2.models import image_embeddings, layers, masks
from t5g2.models.config import TextConfig
from t5g2.models.layers import Compute, Embedder, Head, Unembedder
from t5g2.models.probe_head import ProbeHead
from t5g2.models.siglip import Projector, VisionTower
from t5g2.models.stack import LayerInputs, Stack


class Gemma(Stack):
    """A stack of blocks over embedded tokens and images; a tied output head is the embedding table."""

    def __init__(self, config: TextConfig, *, key: jax.Array, param_dtype=jnp.float32):
        keys = jax.random.split(key)
        super().__init__(config, key=keys[0], param_dtype=param_dtype)
        self.embedder = Embedder(config.vocab_size, config.width, key=keys[1], param_dtype=param_dtype)
        # further keys are folded in, so the weights of a model without these parts do not depend on them
        if not config.tied_head:
            unembedder_key = jax.random.fold_in(key, 2)
            self.unembedder = Unembedder(config.vocab_size, config.width, key=unembedder_key, param_dtype=param_dtype)
        if config.images is not None:
            vision_key, projector_key = (jax.random.fold_in(key, number) for number in (3, 4))
            self.vision = VisionTower(config.images.vision, key=vision_key, param_dtype=param_dtype)
            self.projector = Projector(config.images, config.width, key=projector_key, param_dtype=param_dtype)
        if config.probe is not None:
            probe_key = jax.random.fold_in(key, 5)
            self.probe = ProbeHead(config.probe, config.width, key=probe_key, param_dtype=param_dtype)

    @scope("decoder")
    def hidden(
        self, encoder: None, decoder: Sequences, images: Float[Array, "B I H W 3"] | None = None, *, compute: Compute
    ) -> Float[Array, "B T D"]:
        """Returns the final-normed states of every token, for the loss or for `logits`.

        Args:
          encoder: None; there is no encoder.
          decoder: with images, its `blocks` are those of core.batch.image_blocks: an image's tokens see each other.
          images: float32 in [-1, 1], by row; t5g2.models.image_embeddings has their order.
        """
        _refuse_encoder(encoder)
        return self.run(self._embed(decoder, images, compute), self._layer_inputs(decoder), compute=compute)

    def head(self) -> Head:
        """Returns the output head, which turns states into logits."""
        table = self.embedder.table if self.config.tied_head else self.unembedder.table
        return Head(table[...], self.config.final_softcap)

    @scope("head")
    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns float32 logits of every position; for decoding, not for training."""
        return layers.logits(hidden_BTD, self.head())

    def start_cache(
        self, rows: int, length: int, *, encoder: None = None, images: None = None, compute: Compute
    ) -> caches.Cache:
        """Returns an empty cache for `rows` rows of up to `length` tokens, padding included."""
        _refuse_encoder(encoder)
        if images is not None:
            raise ValueError("a decoder-only model reads images with its prompt; give them to `extend`")
        return caches.start(self, rows, length, compute=compute)

    @scope("decoder")
    def extend(
        self,
        decoder: Sequences,
        cache: caches.Cache,
        images: Float[Array, "B I H W 3"] | None = None,
        *,
        first: bool = False,
        compute: Compute,
    ) -> tuple[Float[Array, "B T D"], caches.Cache]:
        """Returns the states of a prompt or of one token after the tokens in the cache, and the extended cache.

        All tokens of an image must be in one call: the first of them see the last.

        Args:
          first: the cache is empty, and is not read.
        """
        x_BTD = self._embed(decoder, images, compute)
        return caches.extend(self, x_BTD, self._layer_inputs(decoder), cache, first=first, compute=compute)

    def _embed(self, decoder: Sequences, images: Array | None, compute: Compute) -> Float[Array, "B T D"]:
        config = self.config.images
        return image_embeddings.embed(self, self.embedder, config, decoder.tokens, images, compute=compute)

    def _layer_inputs(self, decoder: Sequences) -> LayerInputs:
        return LayerInputs.create(decoder, self.config, lambda kind: masks.decoder(self.config, kind))


def _refuse_encoder(encoder: None) -> None:
    if encoder is not None:
        raise ValueError("a decoder-only model has no encoder; give encoder=None, or build an encoder-decoder")
