"""Gemma 2 and Gemma 3: decoder-only models; Gemma 3 reads images too.

B batch, T length, I images of a row, D width, V vocabulary. Sources: Gemma 2 report (arXiv 2408.00118), Gemma 3 report
(arXiv 2503.19786) section 2; transformers 5.23.0, modeling_gemma2.py and modeling_gemma3.py, which tests/parity
compares with. Where the official code (google-deepmind/gemma) differs from it, a setting has both: ImageConfig.window,
Compute.norm_dtype, Compute.softmax_dtype.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5g2.core.batch import Sequences
from t5g2.models import cache as caches
from t5g2.models import image_embeddings as images
from t5g2.models import layers, masks
from t5g2.models.config import TextConfig
from t5g2.models.layers import Compute, Embedder, Head, Unembedder
from t5g2.models.siglip import Projector, VisionTower
from t5g2.models.stack import LayerInputs, Stack


class Gemma(Stack):
    """A stack of blocks over embedded tokens, images among them; the output head is the embedding, if tied."""

    def __init__(self, config: TextConfig, *, key: jax.Array, param_dtype=jnp.float32):
        keys = jax.random.split(key)
        super().__init__(config, key=keys[0], param_dtype=param_dtype)
        self.embedder = Embedder(config.vocab_size, config.width, key=keys[1], param_dtype=param_dtype)
        # further keys are folded in: they change no weight of a model that does not need them
        if not config.tied_head:
            unembedder_key = jax.random.fold_in(key, 2)
            self.unembedder = Unembedder(config.vocab_size, config.width, key=unembedder_key, param_dtype=param_dtype)
        if config.images is not None:
            vision_key, projector_key = (jax.random.fold_in(key, number) for number in (3, 4))
            self.vision = VisionTower(config.images.vision, key=vision_key, param_dtype=param_dtype)
            self.projector = Projector(config.images, config.width, key=projector_key, param_dtype=param_dtype)

    def hidden(
        self, encoder: None, decoder: Sequences, images: Float[Array, "B I H W 3"] | None = None, *, compute: Compute
    ) -> Float[Array, "B T D"]:
        """Final-normed states of every token, for the loss or for `logits`. There is no encoder side.

        Args:
          decoder: with images, its `blocks` are those of core.batch.image_blocks: an image's tokens see each other.
          images: float32 in [-1, 1], by row; t5g2.models.image_embeddings says which tokens they stand for.
        """
        _refuse(encoder)
        return self.run(self._embed(decoder, images, compute), self._site(decoder), compute=compute)

    def head(self) -> Head:
        """What the loss needs to turn states into logits."""
        table = self.embedder.table if self.config.tied_head else self.unembedder.table
        return Head(table[...], self.config.final_softcap)

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """float32 logits of every position; for decoding, not for training."""
        return layers.logits(hidden_BTD, self.head())

    def start_cache(
        self, rows: int, length: int, *, encoder: None = None, images: None = None, compute: Compute
    ) -> caches.Cache:
        """An empty cache for `rows` rows of up to `length` tokens, padding included."""
        _refuse(encoder)
        if images is not None:
            raise ValueError("a decoder-only model reads images with its prompt; give them to `extend`")
        return caches.start(self, rows, length, compute=compute)

    def extend(
        self,
        decoder: Sequences,
        cache: caches.Cache,
        images: Float[Array, "B I H W 3"] | None = None,
        *,
        compute: Compute,
    ) -> tuple[Float[Array, "B T D"], caches.Cache]:
        """States of tokens that follow those in the cache, and the cache with them: a whole prompt, or one token.

        An image's tokens come in one call: the first of them see the last.
        """
        return caches.extend(self, self._embed(decoder, images, compute), self._site(decoder), cache, compute=compute)

    def _embed(self, decoder: Sequences, pictures: Array | None, compute: Compute) -> Float[Array, "B T D"]:
        return images.embed(self, self.embedder, self.config.images, decoder.tokens, pictures, compute=compute)

    def _site(self, decoder: Sequences) -> LayerInputs:
        return LayerInputs.create(decoder, self.config, lambda kind: masks.decoder(self.config, kind))


def _refuse(encoder: None) -> None:
    if encoder is not None:
        raise ValueError("a decoder-only model has no encoder side; give encoder=None, or build an encoder-decoder")
