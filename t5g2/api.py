"""The Python surface: load a model, from whichever kind of folder, and use it.

    model = t5g2.load("models/adapted")
    logits_BTV = model.logits(decoder_tokens, encoder_tokens)
    [text] = model.generate(["What is this?"], images=[["photo.jpg"]])

B batch, T decoder length, S encoder length, D width, V vocabulary.
"""

import contextlib
import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from t5g2 import api_inputs
from t5g2.checkpoint import export_folder, import_folder
from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.folder import ModelFolder
from t5g2.core import files, tree
from t5g2.core import sharding as meshes
from t5g2.core.batch import Sequences
from t5g2.core.errors import UserError, unknown
from t5g2.data.images import Resampling, check_images
from t5g2.data.tokenizers import registry as tokenizers
from t5g2.data.tokenizers.base import Tokenizer
from t5g2.eval.generation import GREEDY, GenerationOptions, Sampler, complete
from t5g2.models import build
from t5g2.models.config import DualEncoderConfig, EncoderDecoderConfig, ImageConfig, ModelConfig, TextConfig
from t5g2.models.layers import Compute

Positions = Literal["raw", "counted"]
Format = Literal["t5g2", "huggingface"]
TOWER = ("vision", "projector")


def load(
    directory: str | PathLike,
    *,
    dtype: Any = None,
    compute: Compute | None = None,
    mesh: Mesh | None = None,
    positions: Positions = "raw",
    config: ModelConfig | str | PathLike | None = None,
    image_size: int | None = None,
) -> "LanguageModel | DualEncoder":
    """The model of a folder, ready to use. The image tower of a language model is read when images are first given.

    Args:
      directory: a model folder, a Hugging Face folder or an official Flax one.
      dtype: what the weights are cast to; None = as they are stored (the text's and the tower's may differ).
      compute: how the forward pass is computed; None = in float32 on a CPU, in bfloat16 on an accelerator, and image
        towers in float32 on both.
      mesh: the devices that the weights are cut over, as core/sharding.py says; None = the default device.
      positions: of the tokens of a padded row. "raw" = the column, padding counted, as transformers does where no
        positions are given; "counted" = the number of tokens before it, as google-deepmind/gemma does. The same for
        rows padded on the right. Generation always counts.
      config: the architecture of a folder that does not say it: a size's name, or a file like model.json.
      image_size: of images in pixels, if not what the tower was trained with (896 or 448): its position embeddings are
        resampled.

    Raises:
      UserError: no such folder, a damaged one, an unknown choice.
    """
    if positions not in get_args(Positions):
        raise unknown("positions", positions, get_args(Positions))
    folder = import_folder.open_any(directory) if config is None else import_folder.open_foreign(directory, config)
    if image_size is not None:
        folder = folders.with_image_size(folder, image_size)
    compute = default_compute() if compute is None else compute
    if isinstance(folder.config, DualEncoderConfig):
        return DualEncoder(folder, dtype, compute, mesh)
    return LanguageModel(folder, dtype, compute, mesh, positions)


def default_compute() -> Compute:
    """Float32 on a CPU, which is no faster in bfloat16; bfloat16 on an accelerator."""
    return Compute(dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")


class Model:
    """What every loaded model has.

    Attributes:
      folder: what it was loaded from.
      params: the module that holds the weights.
      dtype, compute, mesh: as in `load`.
      resampling: how images get their size. preprocessor_config.json says so, where the folder has one; else bilinear,
        and bicubic for a dual encoder.
    """

    def __init__(self, folder: ModelFolder, dtype: Any, compute: Compute, mesh: Mesh | None):
        self.folder, self.dtype, self.compute, self.mesh = folder, dtype, compute, mesh
        self.resampling: Resampling = _resampling(folder)
        text = folders.without_images(folder)
        self.params: Any = folders.load_model(text, mesh=mesh, param_dtype=_chosen_dtype(text, dtype))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder.path)!r}, {self.compute})"

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.folder.config

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """What turns text into ids.

        Raises:
          UserError: the folder has none.
        """
        if self.folder.tokenizer is None:
            raise UserError(
                f"{self.folder.path} has no tokenizer, so it cannot read text; put its tokenizer.json or "
                f"tokenizer.model there, or give tokens"
            )
        return tokenizers.from_dict(self.folder.tokenizer, self.folder.path)

    def save(self, directory: str | PathLike, *, format: Format = "t5g2") -> None:
        """Writes the model, with its tokenizer: a model folder, or a Hugging Face folder that transformers loads.

        The latter is made from the former, which takes its place on the disk until it is done.

        Raises:
          UserError: the directory exists; transformers has no architecture for this model.
        """
        if format not in get_args(Format):
            raise unknown("format", format, get_args(Format))
        files.refuse_existing(directory)
        target = Path(directory).absolute()
        notes: dict[str, Any] = {"tokenizer": self.folder.tokenizer, "provenance": self.folder.provenance}
        notes["carry"] = self.folder.extra_files
        if format == "t5g2":
            folders.save_model(target, self.params, **notes)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside:
            folders.save_model(Path(beside) / "model", self.params, **notes)
            export_folder.export_model(Path(beside) / "model", target)

    def _run(self, function: Any, *arguments: Any) -> Float[np.ndarray, "..."]:
        with self._devices():
            return np.asarray(function(self.params, *arguments, compute=self.compute))

    def _devices(self) -> Any:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


class LanguageModel(Model):
    """A decoder-only or an encoder-decoder model.

    Tokens are int[B, T], rows of one length; masks are bool or int of the same shape, True or 1 = a token, False or 0 =
    padding, and None = every column is a token. Padding may stand on either side. What comes out at padding means
    nothing. Images are given for each row (inputs.images says how), as many as the row has places for.

    Attributes:
      positions: as in `load`.
      ends: ids that end what is generated. generation_config.json says which, where the folder has one; else EOS, and
        <end_of_turn> if there is such a token, as in google-deepmind/gemma.
      suppressed: ids that are never generated; none, as in transformers. google-deepmind/gemma forbids Gemma 3
        <start_of_image> and <end_of_image>.
      encoder_bos: whether the encoder's input begins with BOS when text is given: so in imported models, as in
        transformers (the official sampler of T5Gemma leaves it out); not in those trained here, whose objectives do not
        put one there.
    """

    def __init__(self, folder: ModelFolder, dtype: Any, compute: Compute, mesh: Mesh | None, positions: Positions):
        super().__init__(folder, dtype, compute, mesh)
        self.positions: Positions = positions
        self.suppressed_ids: tuple[int, ...] = ()
        self.encoder_bos = (folder.provenance or {}).get("kind") == "import"

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end what is generated; may be set."""
        said = _json_field(self.folder.path / "generation_config.json", "eos_token_id")
        if said is not None:
            return tuple(said) if isinstance(said, list) else (said,)
        named = self.tokenizer.named()
        return tuple(named[name] for name in ("eos", "end_of_turn") if name in named)

    def logits(
        self,
        decoder_tokens: Any,
        encoder_tokens: Any = None,
        *,
        encoder_mask: Any = None,
        decoder_mask: Any = None,
        images: Any = None,
    ) -> Float[np.ndarray, "B T V"]:
        """float32[B, T, V]: of every token that may follow each token of the decoder.

        Args:
          decoder_tokens: int[B, T]; a decoder begins with BOS, and so does what a decoder-only model reads.
          encoder_tokens: int[B, S], what an encoder-decoder reads; None for a decoder-only model.
          encoder_mask, decoder_mask: [B, S] and [B, T].
          images: for the image tokens of the encoder, or of a decoder-only model's only side.

        Raises:
          UserError: tokens or masks of a wrong shape, ids outside the vocabulary, an encoder side too many or too few,
            images that do not match the image tokens.
        """
        encoder = None
        if not isinstance(self.config, EncoderDecoderConfig):
            if encoder_tokens is not None or encoder_mask is not None:
                raise UserError(
                    "encoder_tokens is given, but a decoder-only model has no encoder; give decoder_tokens only"
                )
            decoder, array = self._image_side_inputs("decoder", decoder_tokens, decoder_mask, images)
        else:
            if encoder_tokens is None:
                raise UserError("encoder_tokens is missing: this is an encoder-decoder model; give what it reads")
            encoder, array = self._image_side_inputs("encoder", encoder_tokens, encoder_mask, images)
            decoder = self._sequences("decoder", decoder_tokens, decoder_mask)
            if len(encoder.tokens) != len(decoder.tokens):
                raise UserError(
                    f"encoder_tokens has {len(encoder.tokens)} rows and decoder_tokens {len(decoder.tokens)}; give as "
                    f"many of both"
                )
        return self._run(_logits, encoder, decoder, array)

    def encode(
        self, encoder_tokens: Any, *, encoder_mask: Any = None, images: Any = None
    ) -> Float[np.ndarray, "B S D"]:
        """float32[B, S, D]: the encoder's states after its last norm.

        Raises:
          UserError: as `logits`; or the model is decoder-only.
        """
        if not isinstance(self.config, EncoderDecoderConfig):
            raise UserError("a decoder-only model has no encoder to encode with; load an encoder-decoder model")
        return self._run(_encode, *self._image_side_inputs("encoder", encoder_tokens, encoder_mask, images))

    def generate(
        self,
        prompts: Sequence[str],
        images: Any = None,
        *,
        crops: int = 0,
        max_new_tokens: int = 64,
        sampler: Sampler = GREEDY,
        seed: int = 0,
    ) -> list[str]:
        """What the model makes of each prompt, as text without special tokens.

        An encoder-decoder reads the prompt with its encoder; a decoder-only model continues it, after BOS. Prompts of
        different lengths are fine: each gets what it would get alone.

        Args:
          images: for each prompt. They stand where it says <start_of_image>, or, if it does not, in front.
          crops: of a long image, so many crops at most follow it (pan-and-scan), and the prompt says so, as in
            transformers' Gemma3Processor; 0 = none.

        Raises:
          UserError: no tokenizer; images that do not match the prompts; a model without an image tower.
        """
        if isinstance(prompts, str):
            raise UserError("prompts is one text; give a list of them: [prompt]")
        prompts, tokenizer, config = list(prompts), self.tokenizer, api_inputs.images_of(self.config)
        array, counts = None, [0] * len(prompts)
        if images is not None:
            if crops:
                prompts, images = api_inputs.with_crops(prompts, images, crops)
            array, counts = self._image_inputs(images, len(prompts))
        read = [api_inputs.prompt(tokenizer, text, n, config) for text, n in zip(prompts, counts, strict=True)]
        special_tokens = tokenizer.special_tokens
        if self.encoder_bos or not isinstance(self.config, EncoderDecoderConfig):
            read = [np.append(np.int32(special_tokens.bos), tokens) for tokens in read]
        decoding = GenerationOptions(
            max_new_tokens, self.stop_ids, special_tokens.pad, sampler, self.compute, self.suppressed_ids
        )
        with self._devices():
            made = complete(self.params, read, array, bos=special_tokens.bos, options=decoding, seed=seed)
        return [tokenizer.decode(tokens, show_special_tokens=False) for tokens in made]

    def save(self, directory: str | PathLike, *, format: Format = "t5g2") -> None:
        """Writes the model, with its tokenizer: a model folder, or a Hugging Face folder that transformers loads.

        Raises:
          UserError: the directory exists; transformers has no architecture for this model.
        """
        files.refuse_existing(directory)  # before the tower is read
        if api_inputs.images_of(self.config) is not None:
            self.read_tower()
        super().save(directory, format=format)

    def embed_images(self, *arguments: Any, **named: Any) -> NoReturn:
        """Refuses: that is what a dual encoder does."""
        raise UserError("a language model does not embed images and texts; load a SigLIP model, or use encode")

    embed_texts = similarity = embed_images

    def _image_side_inputs(self, side: str, tokens: Any, mask: Any, images: Any) -> tuple[Sequences, Any]:
        """The side that reads images, and the images."""
        config = api_inputs.images_of(self.config)
        stream = self._sequences(side, tokens, mask, None if images is None else config)
        rows = len(stream.tokens)
        array, counts = (None, [0] * rows) if images is None else self._image_inputs(images, rows)
        if config is not None:
            check_images(stream.tokens, config.token, tokens_per_image=config.tokens, images_per_row=counts)
        return stream, array

    def _sequences(self, side: str, tokens: Any, mask: Any, images: ImageConfig | None = None) -> Sequences:
        stack = getattr(self.config, side) if isinstance(self.config, EncoderDecoderConfig) else self.config
        assert isinstance(stack, TextConfig)
        tokens_BT = api_inputs.tokens(f"{side}_tokens", tokens, stack)
        valid_BT = api_inputs.mask(f"{side}_mask", mask, tokens_BT.shape)
        image_token = images.token if images and side == "decoder" else None
        return api_inputs.sequences(tokens_BT, valid_BT, counted=self.positions == "counted", image_token=image_token)

    def _image_inputs(self, given: Any, rows: int) -> tuple[Any, list[int]]:
        config = api_inputs.images_of(self.config)
        if config is None:
            raise UserError("images are given, but this model has no image tower; load one that has, or give text only")
        array, counts = api_inputs.images(given, rows, config.vision.image_size, self.resampling)
        if not any(counts):
            return None, counts
        self.read_tower()
        return array, counts

    def read_tower(self) -> None:
        """Reads the image tower and its projector now, unless they are there; other weights stay what they are."""
        if hasattr(self.params, TOWER[0]):
            return
        values = tree.named(self.params)
        for part in TOWER:
            leaves = {key: leaf for key, leaf in self.folder.leaves.items() if key[0].startswith(f"{part}.")}
            whole = build.abstract(self.config, _chosen_dtype(replace(self.folder, leaves=leaves), self.dtype))
            empty = getattr(whole, part)
            dtypes = {key: leaf.dtype for key, leaf in tree.leaves(empty).items()}

            def read(key: tree.LeafKey, part: str = part, dtypes: Any = dtypes) -> Any:
                return self.folder.leaves[(f"{part}.{key[0]}", key[1])].read().astype(dtypes[key])

            places = None if self.mesh is None else getattr(meshes.shardings(whole, self.mesh), part)
            made = tree.build(empty, read, shardings=places)
            values |= {f"{part}.{name}": value for name, value in tree.named(made).items()}
        self.params = tree.refill(build.abstract(self.config), values)


class DualEncoder(Model):
    """SigLIP: texts and images as vectors of length 1 that can be compared."""

    def embed_images(self, images: Sequence[Any]) -> Float[np.ndarray, "B D"]:
        """float32[images, D], each of length 1; an image is a file, a PIL image or an array, as in inputs.images."""
        assert isinstance(self.config, DualEncoderConfig)
        size = self.config.vision.image_size
        array = np.stack([api_inputs.prepare_image(image, size, self.resampling) for image in images])
        return self._run(_embed_images, array)

    def embed_texts(self, texts: Any) -> Float[np.ndarray, "B D"]:
        """float32[texts, D], each of length 1.

        Args:
          texts: a list of them; or tokens, int[B, length], padded as the model was trained to have it.
        """
        assert isinstance(self.config, DualEncoderConfig)
        config = self.config.text
        if isinstance(texts, str):
            raise UserError("texts is one text; give a list of them: [text]")
        if len(texts) and all(isinstance(text, str) for text in texts):
            array = api_inputs.siglip_tokens(self.tokenizer, texts, config)
        else:
            array = api_inputs.siglip_ids(texts, config)
        return self._run(_embed_texts, array)

    def similarity(self, images: Sequence[Any], texts: Any) -> Float[np.ndarray, "B I"]:
        """float32[texts, images]: logits that a text belongs to an image; their sigmoid is the model's probability."""
        embedded = self.embed_texts(texts), self.embed_images(images)
        with self._devices():
            return np.asarray(self.params.logits(*map(jnp.asarray, embedded)), np.float32)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """SigLIP's SentencePiece tokens: </s> pads, and there is no BOS."""
        node = self.folder.tokenizer
        if node is None and (self.folder.path / "spiece.model").is_file():
            node = {"kind": "sentencepiece", "file": "spiece.model"}
        if node is None or node["kind"] == "bytes":
            raise UserError(f"{self.folder.path} has no SigLIP tokenizer (spiece.model); put it there, or give tokens")
        return tokenizers.from_dict({"ids": [["pad", 1], ["bos", 1]]} | node, self.folder.path)

    def logits(self, *arguments: Any, **named: Any) -> NoReturn:
        """Refuses: that is what a language model does."""
        raise UserError(
            "a dual encoder has no logits of tokens and generates no text; use embed_images, embed_texts and similarity"
        )

    encode = generate = logits


@functools.partial(jax.jit, static_argnames="compute")
def _logits(params: Any, encoder: Sequences | None, decoder: Sequences, images: Any, *, compute: Compute):
    return params.logits(params.hidden(encoder, decoder, images, compute=compute))


@functools.partial(jax.jit, static_argnames="compute")
def _encode(params: Any, encoder: Sequences, images: Any, *, compute: Compute):
    return params.encode(encoder, images, compute=compute).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="compute")
def _embed_images(params: Any, images: Any, *, compute: Compute):
    return params.embed_images(images, compute=compute)


@functools.partial(jax.jit, static_argnames="compute")
def _embed_texts(params: Any, tokens: Any, *, compute: Compute):
    return params.embed_texts(tokens, compute=compute)


def _resampling(folder: ModelFolder) -> Resampling:
    default: Resampling = "bicubic" if isinstance(folder.config, DualEncoderConfig) else "bilinear"
    file = folder.path / "preprocessor_config.json"
    pillows: dict[int, Resampling] = {2: "bilinear", 3: "bicubic"}
    return pillows.get(_json_field(file, "resample"), default)


def _json_field(file: Path, key: str) -> Any:
    """What a carried file of JSON says under a key, if there is such a file and it says so.

    Raises:
      UserError: it is not JSON.
    """
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text()).get(key)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is not JSON of an object ({error}); download it again, or remove it") from None


def _chosen_dtype(folder: ModelFolder, chosen: Any) -> np.dtype:
    """What was chosen, or the dtype that the leaves have; the widest, where they have several."""
    chosen = folders.weight_dtype(chosen)
    dtypes = {jnp.dtype(leaf.dtype) for leaf in folder.leaves.values()} if chosen is None else {chosen}
    return functools.reduce(jnp.promote_types, sorted(dtypes, key=str))
