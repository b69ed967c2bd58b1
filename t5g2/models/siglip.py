"""SigLIP: the image tower of Gemma 3 and T5Gemma 2 with its projector, and the dual encoder (MedSigLIP).

B images or texts, T tokens of a tower (S as keys), P patches of an image, D width, N heads, H head size, F MLP width.
Sources: SigLIP (arXiv 2303.15343); google-research/big_vision, models/vit.py, for initial values; Gemma 3
report (arXiv 2503.19786), section 2.1; transformers 5.23.0, modeling_siglip.py and Gemma3MultiModalProjector, which
tests/parity compares with.

The image tower and the projector run in compute.vision_dtype, the text tower in compute.dtype. LayerNorm and softmax
run in compute.norm_dtype and compute.softmax_dtype whatever the activations are. Attention has no mask.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from t5g2.core.batch import Sequences
from t5g2.core.scopes import scope
from t5g2.core.sharding import constrain
from t5g2.models import masks
from t5g2.models.attention import attend
from t5g2.models.config import DualEncoderConfig, ImageConfig, SiglipTextConfig, VisionConfig
from t5g2.models.layers import Compute, ConstantInit, Initializer, Precision, RMSNorm, from_arguments, param, zeros
from t5g2.models.masks import Keys
from t5g2.models.stack import Layers

# initial values of the scalars (arXiv 2303.15343, section 3.2); in transformers both are 0
LOGIT_SCALE, LOGIT_BIAS = math.log(10.0), -10.0


def ones(key, shape, dtype) -> jax.Array:
    """Returns ones; for LayerNorm's scale."""
    del key
    return jnp.ones(shape, dtype)


@dataclass(frozen=True)
class Xavier:
    """Uniform within sqrt(6 / (fan in + fan out)), sampled in float32; the first `inputs` axes are the fan in."""

    inputs: int = 1

    def __call__(self, key, shape, dtype) -> jax.Array:
        """Returns a sample of this shape."""
        fans = math.prod(shape[: self.inputs]), math.prod(shape[self.inputs :])
        bound = math.sqrt(6.0 / sum(fans))
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)


def lecun(key, shape, dtype) -> jax.Array:
    """Samples a normal distribution of variance 1 / fan in (all axes but the last), truncated at two deviations."""
    fan_in = tuple(range(len(shape) - 1))
    return jax.nn.initializers.lecun_normal(fan_in, -1)(key, shape, jnp.float32).astype(dtype)


def embedding(key, shape, dtype) -> jax.Array:
    """Samples a normal distribution of variance 1 / D; for tables of tokens and positions."""
    return (shape[-1] ** -0.5 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def small_normal(key, shape, dtype) -> jax.Array:
    """Samples a normal distribution of standard deviation 1e-6; for the biases of an MLP."""
    return (1e-6 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


class Dense(nnx.Module):
    """A product of x's last axes with the first axes of a kernel, plus a bias."""

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        inputs: int = 1,
        init: Initializer,
        bias: Initializer = zeros,
        key: jax.Array,
        param_dtype,
    ):
        """Initialises a kernel of this shape, whose first `inputs` axes are those of the input."""
        keys = jax.random.split(key)
        self.inputs = inputs
        self.kernel = param(keys[0], shape, axes=axes, init=init, dtype=param_dtype)
        # a bias is small, so it is sharded only like the activations that it is added to
        bias_axes = tuple(None if axis == "embed" else axis for axis in axes[inputs:])
        self.bias = param(keys[1], shape[inputs:], axes=bias_axes, init=bias, dtype=param_dtype)

    def transform(self, x: Array, dtype=None) -> Array:
        """Returns the product in x's dtype with float32 sums, rounded to `dtype` or x's own once, after the bias."""
        return _dense(x, self.kernel[...], self.bias[...], self.inputs, dtype or x.dtype)


@partial(from_arguments, static_argnums=(3, 4))
def _dense(x: Array, kernel: Array, bias: Array, inputs: int, dtype) -> Array:
    kernel, bias = kernel.astype(x.dtype), bias.astype(x.dtype)
    outer, size = x.shape[: x.ndim - inputs], math.prod(kernel.shape[:inputs])
    y = jnp.dot(x.reshape(-1, size), kernel.reshape(size, -1), preferred_element_type=jnp.float32)
    y = y + bias.astype(jnp.float32).reshape(1, -1)
    return y.astype(dtype).reshape(*outer, *kernel.shape[inputs:])


class LayerNorm(nnx.Module):
    """(x - mean) / standard deviation * scale + bias, over the last axis."""

    def __init__(self, size: int, *, eps: float, param_dtype):
        self.eps = eps
        self.scale = param(None, (size,), axes=(None,), init=ones, dtype=param_dtype)
        self.bias = param(None, (size,), axes=(None,), init=zeros, dtype=param_dtype)

    def normalize(self, x: Float[Array, "... D"], compute: Compute) -> Float[Array, "... D"]:
        """Returns x normalised in compute.norm_dtype, and rounded to x's dtype once."""
        return _layer_norm(x, self.scale[...], self.bias[...], self.eps, compute.norm_dtype)


@partial(from_arguments, static_argnums=(3, 4))
def _layer_norm(x: Array, scale: Array, bias: Array, eps: float, dtype: Precision) -> Array:
    y = x.astype(dtype)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    scale, bias = (jnp.broadcast_to(p.astype(y.dtype), x.shape) for p in (scale, bias))
    return (y * scale + bias).astype(x.dtype)


class SiglipAttention(nnx.Module):
    """Attention without a mask, all projections with a bias."""

    def __init__(self, width: int, heads: int, *, key: jax.Array, param_dtype):
        size = width // heads
        keys = jax.random.split(key, 4)

        def dense(key, shape, axes, inputs):
            return Dense(shape, axes, inputs=inputs, init=Xavier(inputs), key=key, param_dtype=param_dtype)

        shape, axes = (width, heads, size), ("embed", "heads", "head_size")
        self.q, self.k, self.v = (dense(key, shape, axes, 1) for key in keys[:3])
        self.o = dense(keys[3], (heads, size, width), ("heads", "head_size", "embed"), 2)

    @scope("attention")
    def attend(self, q_BTD: Float[Array, "B T D"], x_BSD: Float[Array, "B S D"], *, compute: Compute) -> Array:
        """Returns [B, T, D], the attention of the states q over all states x."""
        axes = ("rows", "length", "heads_act", None)
        q_BTNH = constrain(self.q.transform(q_BTD), *axes)
        k_BSNH, v_BSNH = (constrain(dense.transform(x_BSD), *axes) for dense in (self.k, self.v))
        query = _all_visible(*q_BTD.shape[:2])
        tokens = query if q_BTD is x_BSD else _all_visible(*x_BSD.shape[:2])
        sources = [(Keys(k_BSNH, v_BSNH, tokens), masks.ALL)]
        o_BTNH = attend(q_BTNH, query, sources, scale=q_BTNH.shape[-1] ** -0.5, compute=compute)
        return self.o.transform(constrain(o_BTNH, *axes))


def _all_visible(rows: int, length: int) -> Sequences:
    """Returns tokens that all see each other: one segment, no padding."""
    ones_BT = jnp.ones((rows, length), jnp.int32)
    return Sequences(ones_BT, ones_BT, ones_BT)


class SiglipMLP(nnx.Module):
    """down(gelu(up x)), with the tanh approximation of gelu."""

    def __init__(self, width: int, hidden: int, *, key: jax.Array, param_dtype):
        keys = jax.random.split(key)
        dense = partial(Dense, init=Xavier(), bias=small_normal, param_dtype=param_dtype)
        self.up = dense((width, hidden), ("embed", "mlp"), key=keys[0])
        self.down = dense((hidden, width), ("mlp", "embed"), key=keys[1])

    @scope("mlp")
    def transform(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the output of the MLP; the nonlinearity is applied to float32 sums."""
        h_BTF = jax.nn.gelu(self.up.transform(x_BTD, jnp.float32), approximate=True).astype(x_BTD.dtype)
        return self.down.transform(constrain(h_BTF, "rows", "length", "mlp_act"))


class SiglipBlock(nnx.Module):
    """One layer: residual attention and MLP, each after a norm."""

    def __init__(self, config: VisionConfig | SiglipTextConfig, *, key: jax.Array, param_dtype):
        keys = jax.random.split(key)
        self.pre_attention_norm, self.pre_mlp_norm = _norm(config, param_dtype), _norm(config, param_dtype)
        self.attention = SiglipAttention(config.width, config.heads, key=keys[0], param_dtype=param_dtype)
        self.mlp = SiglipMLP(config.width, config.mlp_width, key=keys[1], param_dtype=param_dtype)

    def forward(self, x_BTD: Float[Array, "B T D"], *, compute: Compute) -> Float[Array, "B T D"]:
        """Returns the next hidden states."""
        h_BTD = self.pre_attention_norm.normalize(x_BTD, compute)
        x_BTD = x_BTD + self.attention.attend(h_BTD, h_BTD, compute=compute)
        x_BTD = x_BTD + self.mlp.transform(self.pre_mlp_norm.normalize(x_BTD, compute))
        return constrain(x_BTD, "rows", "length", "embed_act")


class SiglipTower(nnx.Module):
    """The layers of an image or a text tower, and the norm after them."""

    def __init__(self, config: VisionConfig | SiglipTextConfig, *, key: jax.Array, param_dtype):
        self.config = config
        make = lambda _, key: SiglipBlock(config, key=key, param_dtype=param_dtype)  # noqa: E731
        self.layers = Layers(make, (None,), config.layers, key=key)
        self.final_norm = _norm(config, param_dtype)

    def run(self, x_BTD: Float[Array, "B T D"], *, compute: Compute) -> Float[Array, "B T D"]:
        """Returns the final-normed states of tokens embedded as x."""

        def step(block: SiglipBlock, x_BTD, _):
            return block.forward(x_BTD, compute=compute), None

        x_BTD, _ = self.layers.scan(step, constrain(x_BTD, "rows", "length", "embed_act"), compute=compute)
        return self.final_norm.normalize(x_BTD, compute)


def _norm(config: VisionConfig | SiglipTextConfig, param_dtype) -> LayerNorm:
    return LayerNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)


class VisionTower(SiglipTower):
    """Patches of an image as tokens; with config.pool, also one vector for the whole image."""

    config: VisionConfig

    def __init__(self, config: VisionConfig, *, key: jax.Array, param_dtype=jnp.float32):
        keys = jax.random.split(key, 4)
        super().__init__(config, key=keys[0], param_dtype=param_dtype)
        patch, width = config.patch_size, config.width
        shape, axes = (patch, patch, 3, width), (None, None, None, "embed")
        self.patches = Dense(shape, axes, inputs=3, init=lecun, key=keys[1], param_dtype=param_dtype)
        shape = (config.patches, width)
        self.positions = param(keys[2], shape, axes=(None, "embed"), init=embedding, dtype=param_dtype)
        if config.pool:
            self.pool = Pool(config, key=keys[3], param_dtype=param_dtype)

    @scope("vision")
    def encode(self, images_BHWC: Float[Array, "B H W 3"], *, compute: Compute) -> Float[Array, "B P D"]:
        """Returns final-normed states of every patch, in compute.vision_dtype; patches in rows from the top left.

        Args:
          images_BHWC: in [-1, 1], of config.image_size on both sides.

        Raises:
          ValueError: images of another shape.
        """
        config, patch, size = self.config, self.config.patch_size, self.config.image_size
        if images_BHWC.shape[1:] != (size, size, 3):
            raise ValueError(
                f"images of shape {images_BHWC.shape}; this tower takes [B, {size}, {size}, 3]: resize them"
            )
        # a convolution whose stride is its kernel's size is a product of matrices
        whole = config.side * patch
        images_BHWC = images_BHWC[:, :whole, :whole]
        x = images_BHWC.astype(compute.vision_dtype).reshape(-1, config.side, patch, config.side, patch, 3)
        x_BPppC = jnp.moveaxis(x, 2, 3).reshape(-1, config.patches, patch, patch, 3)
        x_BPD = self.patches.transform(x_BPppC, jnp.float32)
        x_BPD = x_BPD + self.positions[...].astype(compute.vision_dtype).astype(jnp.float32)[None]
        return self.run(x_BPD.astype(compute.vision_dtype), compute=compute)

    def pooled(self, images_BHWC: Float[Array, "B H W 3"], *, compute: Compute) -> Float[Array, "B D"]:
        """Returns one vector per image, in compute.vision_dtype, not normalised.

        Raises:
          ValueError: the tower has no pooling head.
        """
        if not self.config.pool:
            raise ValueError("this tower has no pooling head (pool=False); use `encode`, or build it with pool=True")
        return self.pool.reduce(self.encode(images_BHWC, compute=compute), compute=compute)


class Pool(nnx.Module):
    """Attention of one learned query over all patches without a residual, then a residual MLP (big_vision: MAPHead)."""

    def __init__(self, config: VisionConfig, *, key: jax.Array, param_dtype):
        keys = jax.random.split(key, 3)
        # fan in 1, because big_vision initialises the query as a matrix [1, D]
        self.probe = param(keys[0], (config.width,), axes=(None,), init=Xavier(0), dtype=param_dtype)
        self.attention = SiglipAttention(config.width, config.heads, key=keys[1], param_dtype=param_dtype)
        self.norm = _norm(config, param_dtype)
        self.mlp = SiglipMLP(config.width, config.mlp_width, key=keys[2], param_dtype=param_dtype)

    @scope("vision")
    def reduce(self, x_BPD: Float[Array, "B P D"], *, compute: Compute) -> Float[Array, "B D"]:
        """Returns one vector for the patches of each image."""
        probe_B1D = jnp.broadcast_to(self.probe[...].astype(x_BPD.dtype), (x_BPD.shape[0], 1, x_BPD.shape[2]))
        z_B1D = self.attention.attend(probe_B1D, x_BPD, compute=compute)
        return (z_B1D + self.mlp.transform(self.norm.normalize(z_B1D, compute)))[:, 0]


class Projector(nnx.Module):
    """Projection of the states of an image's patches to the embeddings of its tokens in a language model.

    The kernel is initialised to zero, as in transformers, so a new projector outputs zeros. The norm before it gets a
    gradient only once the kernel is not zero, that is from the second step on.
    """

    def __init__(self, config: ImageConfig, width: int, *, key: jax.Array, param_dtype=jnp.float32):
        del key  # nothing is random
        self.config = config
        vision = config.vision
        self.norm = RMSNorm(vision.width, eps=vision.norm_eps, param_dtype=param_dtype)
        shape, axes = (vision.width, width), (None, "embed")
        self.kernel = param(None, shape, axes=axes, init=zeros, dtype=param_dtype)

    @scope("projector")
    def project(self, patches_BPD: Float[Array, "B P D"], *, compute: Compute) -> Float[Array, "B K M"]:
        """Returns [B, tokens, width of the language model]: means of equal squares of patches, normed and projected."""
        rows, patches, width = patches_BPD.shape
        side = math.isqrt(self.config.tokens)
        square = math.isqrt(patches) // side
        x = patches_BPD.astype(jnp.float32).reshape(rows, side, square, side, square, width)
        x_BKD = self.norm.normalize(jnp.mean(x, axis=(2, 4)).reshape(rows, -1, width), compute)
        kernel_DM = self.kernel[...].astype(compute.vision_dtype)
        x_BKM = jnp.einsum("BKD,DM->BKM", x_BKD.astype(kernel_DM.dtype), kernel_DM, preferred_element_type=jnp.float32)
        return x_BKM.astype(compute.vision_dtype)


class TokenEmbedding(nnx.Module):
    """A table of token embeddings, which are not scaled."""

    def __init__(self, vocab_size: int, width: int, *, key: jax.Array, param_dtype):
        self.table = param(key, (vocab_size, width), axes=("vocab", "embed"), init=embedding, dtype=param_dtype)


class TextTower(SiglipTower):
    """A text tower for a fixed number of tokens; the text's vector is the state of the last, mostly a padding token.

    Padding is not masked, as in training, so texts must be padded with the same token (MedSigLIP: 1).
    """

    config: SiglipTextConfig

    def __init__(self, config: SiglipTextConfig, *, key: jax.Array, param_dtype=jnp.float32):
        keys = jax.random.split(key, 4)
        super().__init__(config, key=keys[0], param_dtype=param_dtype)
        self.embedder = TokenEmbedding(config.vocab_size, config.width, key=keys[1], param_dtype=param_dtype)
        shape = (config.length, config.width)
        self.positions = param(keys[2], shape, axes=(None, "embed"), init=embedding, dtype=param_dtype)
        shape, axes = (config.width, config.projection), ("embed", None)
        self.head = Dense(shape, axes, init=lecun, key=keys[3], param_dtype=param_dtype)

    @scope("text")
    def encode(self, tokens_BT: Int[Array, "B T"], *, compute: Compute) -> Float[Array, "B D"]:
        """Returns one vector of size config.projection per text, in compute.dtype, not normalised.

        Raises:
          ValueError: texts of another length than config.length.
        """
        if tokens_BT.shape[1:] != (self.config.length,):
            raise ValueError(f"texts of shape {tokens_BT.shape}; pad every one to {self.config.length} tokens")
        # each row is gathered whole, as in layers.Embedder.embed
        x_BTD = constrain(self.embedder.table[...], "vocab_act", None)[tokens_BT].astype(compute.dtype)
        x_BTD = x_BTD + self.positions[...].astype(compute.dtype)[None]
        return self.head.transform(self.run(x_BTD, compute=compute)[:, -1])


class Siglip(nnx.Module):
    """An image and a text tower whose embeddings are compared; two scalars turn cosines into logits."""

    def __init__(self, config: DualEncoderConfig, *, key: jax.Array, param_dtype=jnp.float32):
        self.config = config
        keys = jax.random.split(key)
        self.vision = VisionTower(config.vision, key=keys[0], param_dtype=param_dtype)
        self.text = TextTower(config.text, key=keys[1], param_dtype=param_dtype)
        scalar = partial(param, None, (), axes=(), dtype=param_dtype)
        self.logit_scale, self.logit_bias = (
            scalar(init=ConstantInit(LOGIT_SCALE)),
            scalar(init=ConstantInit(LOGIT_BIAS)),
        )

    def embed_images(self, images_BHWC: Float[Array, "B H W 3"], *, compute: Compute) -> Float[Array, "B D"]:
        """Returns float32[B, D] of length 1, for images in [-1, 1] of the tower's size."""
        return _unit(self.vision.pooled(images_BHWC, compute=compute))

    def embed_texts(self, tokens_BT: Int[Array, "B T"], *, compute: Compute) -> Float[Array, "B D"]:
        """Returns float32[B, D] of length 1, for tokens padded to the tower's length."""
        return _unit(self.text.encode(tokens_BT, compute=compute))

    def logits(self, texts_MD: Float[Array, "M D"], images_ND: Float[Array, "N D"]) -> Float[Array, "M N"]:
        """Returns float32[M, N] for every text with every image: cosine * exp(logit_scale) + logit_bias.

        The sigmoid of an entry is the probability that the two belong together, independent of the other pairs.
        """
        scale, bias = (p[...].astype(jnp.float32) for p in (self.logit_scale, self.logit_bias))
        # at a scale of 100, the reduced precision of an accelerator's default product would give errors of up to 1
        cosine_MN = jnp.matmul(texts_MD, images_ND.T, precision="highest", preferred_element_type=jnp.float32)
        return cosine_MN * jnp.exp(scale) + bias


def _unit(x_BD: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Returns x scaled to length 1, in float32; zeros stay zeros, with a finite gradient."""
    x_BD = x_BD.astype(jnp.float32)
    return x_BD * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x_BD), axis=-1, keepdims=True), 1e-12))
