"""The Python surface: load a model folder and use it.

    model = t5g2.load("models/adapted")
    logits_BTV = model.logits(decoder_tokens, encoder_tokens)

B batch, T decoder length, S encoder length, D width, V vocabulary.
"""

from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.folder import ModelFolder
from t5g2.core.batch import Stream
from t5g2.core.errors import UserError, unknown
from t5g2.models.config import EncoderDecoderConfig, ModelConfig, TextConfig
from t5g2.models.layers import Compute

Positions = Literal["raw", "counted"]


def load(
    directory: str | PathLike,
    *,
    dtype: Any = None,
    compute: Compute | None = None,
    mesh: Mesh | None = None,
    positions: Positions = "raw",
) -> "LanguageModel":
    """The model of a folder, ready to use.

    Args:
      directory: a model folder.
      dtype: what the weights are cast to; None = as they are stored.
      compute: how the forward pass is computed; None = in float32 on a CPU, in bfloat16 on an accelerator.
      mesh: the devices that the weights are cut over, as core/mesh.py says; None = the default device.
      positions: of the tokens of a padded row. "raw" = the column, padding counted, as transformers does where no
        positions are given; "counted" = the number of valid tokens before it, as google-deepmind/gemma does. The same
        for rows padded on the right. Generation always counts.

    Raises:
      UserError: no such folder, a damaged one, an unknown choice.
    """
    if positions not in get_args(Positions):
        raise unknown("positions", positions, get_args(Positions))
    compute = default_compute() if compute is None else compute
    folder = folders.open_model(directory)
    params = folders.load_model(folder, mesh=mesh, param_dtype=dtype)
    return LanguageModel(folder, params, compute, mesh, positions)


def default_compute() -> Compute:
    """Float32 on a CPU, which has no bfloat16 to speak of; bfloat16 on an accelerator."""
    return Compute(dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")


@dataclass(eq=False)
class LanguageModel:
    """A decoder-only or an encoder-decoder model with its weights.

    Tokens are int[B, T], rows of one length; masks are bool or int of the same shape, True or 1 = a token, False or 0 =
    padding, and None = every column is a token. Padding may stand on either side. What comes out at padding means
    nothing.

    Attributes:
      folder: what it was loaded from.
      params: the module that holds the weights.
      compute, mesh, positions: as in `load`.
    """

    folder: ModelFolder = field(repr=False)
    params: Any = field(repr=False)
    compute: Compute
    mesh: Mesh | None = field(repr=False)
    positions: Positions

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.folder.config

    def logits(
        self, decoder_tokens: Any, encoder_tokens: Any = None, *, encoder_mask: Any = None, decoder_mask: Any = None
    ) -> Float[np.ndarray, "B T V"]:
        """float32[B, T, V]: of every token that may follow each token of the decoder.

        Args:
          decoder_tokens: int[B, T]; a decoder begins with BOS, and so does what a decoder-only model reads.
          encoder_tokens: int[B, S], what an encoder-decoder reads; None for a decoder-only model.
          encoder_mask, decoder_mask: [B, S] and [B, T].

        Raises:
          UserError: tokens or masks of a wrong shape, ids outside the vocabulary, an encoder side too many or too few.
        """
        decoder = self._stream("decoder", decoder_tokens, decoder_mask)
        encoder = None
        if isinstance(self.config, EncoderDecoderConfig):
            if encoder_tokens is None:
                raise UserError("encoder_tokens is missing: this is an encoder-decoder model; give what it reads")
            encoder = self._stream("encoder", encoder_tokens, encoder_mask)
            if encoder.tokens.shape[0] != decoder.tokens.shape[0]:
                raise UserError(
                    f"encoder_tokens has {encoder.tokens.shape[0]} rows and decoder_tokens {decoder.tokens.shape[0]}; "
                    f"give as many of both"
                )
        elif encoder_tokens is not None or encoder_mask is not None:
            raise UserError(
                "encoder_tokens is given, but a decoder-only model has no encoder; give decoder_tokens only"
            )
        return np.asarray(_logits(self.params, encoder, decoder, compute=self.compute))

    def encode(self, encoder_tokens: Any, *, encoder_mask: Any = None) -> Float[np.ndarray, "B S D"]:
        """float32[B, S, D]: the encoder's states after its last norm.

        Raises:
          UserError: as `logits`; or the model is decoder-only.
        """
        if not isinstance(self.config, EncoderDecoderConfig):
            raise UserError("a decoder-only model has no encoder to encode with; load an encoder-decoder model")
        encoder = self._stream("encoder", encoder_tokens, encoder_mask)
        return np.asarray(_encode(self.params, encoder, compute=self.compute))

    def _stream(self, side: str, tokens: Any, mask: Any) -> Stream:
        config = self.config
        stack = getattr(config, side) if isinstance(config, EncoderDecoderConfig) else config
        assert isinstance(stack, TextConfig)
        tokens_BT = _tokens(f"{side}_tokens", tokens, stack)
        valid_BT = _mask(f"{side}_mask", mask, tokens_BT.shape)
        if self.positions == "raw":
            positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
        else:
            positions_BT = np.maximum(np.cumsum(valid_BT, axis=1, dtype=np.int32) - 1, 0)
        return Stream(np.where(valid_BT, tokens_BT, 0), valid_BT.astype(np.int32), positions_BT)


@partial(jax.jit, static_argnames="compute")
def _logits(params: Any, encoder: Stream | None, decoder: Stream, *, compute: Compute):
    return params.logits(params.hidden(encoder, decoder, compute=compute))


@partial(jax.jit, static_argnames="compute")
def _encode(params: Any, encoder: Stream, *, compute: Compute):
    return params.encode(encoder, compute=compute).astype(jnp.float32)


def _tokens(name: str, tokens: Any, stack: TextConfig) -> Int[np.ndarray, "B T"]:
    try:
        array = np.asarray(tokens)
    except ValueError:  # rows of different lengths
        raise UserError(f"{name} has rows of different lengths; pad them to one, and say where with the mask") from None
    if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise UserError(
            f"{name} is {array.dtype}{list(array.shape)}; it must be whole numbers of shape [rows, length], such as "
            f"[[2, 17, 4]]"
        )
    most = max(stack.vocab_size - 1, -1 if stack.images is None else stack.images.token)
    if array.min() < 0 or array.max() > most:
        wrong = array.min() if array.min() < 0 else array.max()
        raise UserError(f"{name} holds the id {wrong}; ids of this model's vocabulary are 0 to {stack.vocab_size - 1}")
    return array.astype(np.int32)


def _mask(name: str, mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    if mask is None:
        return np.ones(shape, bool)
    array = np.asarray(mask)
    if array.shape != shape or not set(np.unique(array)) <= {0, 1}:
        raise UserError(
            f"{name} is {array.dtype}{list(array.shape)}; it must be bool or 0 and 1 of shape {list(shape)}, that of "
            f"the tokens"
        )
    return array.astype(bool)
