"""Loaded decoder-only and encoder-decoder models: logits, encoder states, generation.

B batch, T decoder length, S encoder length, D width, V vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from typing_extensions import override

from t5g2.api import model_inputs, text_generation
from t5g2.api.model import Format, Model, chosen_dtype, json_field
from t5g2.api.model_inputs import check_texts
from t5g2.api.text_generation import TextOptions
from t5g2.checkpoint import bos, generation_ids
from t5g2.checkpoint.folder import ModelFolder
from t5g2.checkpoint.generation_ids import GenerationIds
from t5g2.core import files, sharding, tree
from t5g2.core.batch import Sequences
from t5g2.core.errors import UserError
from t5g2.core.logs import log
from t5g2.data.image_tokens import START_OF_IMAGE
from t5g2.data.images import check_images
from t5g2.eval import generation, output_text, text_embeddings
from t5g2.eval.generation import GenerationSetup, Output, batch_of, complete
from t5g2.eval.output_text import TextOutput
from t5g2.eval.sampling import GREEDY, Sampling
from t5g2.eval.stop_strings import table_of
from t5g2.models import build
from t5g2.models.config import DualEncoderConfig, ImageConfig, LanguageModelConfig
from t5g2.models.layers import Compute

Positions = Literal["raw", "counted"]
TOWER_PARTS = ("vision", "projector")


class LanguageModel(Model):
    """A loaded decoder-only or encoder-decoder model.

    Tokens are int[B, T], rows of one length; masks are bool or int of the same shape, True or 1 = a token, False or 0 =
    padding, and None = every column is a token. Padding may be on either side; outputs at padding are undefined. Images
    are given for each row (in the forms of model_inputs.images), as many as the row has places for.

    Attributes:
      positions: as in `load`.
      stop_ids: ids that end generation: those of generation_config.json or config.json if the folder has one, else
        EOS, and <end_of_turn> if there is such a token, as in google-deepmind/gemma.
      suppressed_ids: ids that are never generated; none, as in transformers. google-deepmind/gemma excludes
        <start_of_image> and <end_of_image> in Gemma 3.
      encoder_bos: True if the encoder's input begins with BOS in `generate` (checkpoint/bos.py).
    """

    def __init__(self, folder: ModelFolder, dtype: Any, compute: Compute, mesh: Mesh | None, positions: Positions):
        super().__init__(folder, dtype, compute, mesh)
        self.positions: Positions = positions
        self.suppressed_ids: tuple[int, ...] = ()
        self.encoder_bos = bos.is_read(folder) and self.config.is_encoder_decoder

    @property
    @override
    def config(self) -> LanguageModelConfig:
        config = self.folder.config
        assert not isinstance(config, DualEncoderConfig)
        return config

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end generation; may be set."""
        if self._generation_ids.eos is not None:
            return self._generation_ids.eos
        # instruction-tuned models end a turn with <end_of_turn>, and rarely with EOS
        named = self.tokenizer.named()
        return tuple(named[name] for name in ("eos", "end_of_turn") if name in named)

    @functools.cached_property
    def _generation_ids(self) -> GenerationIds:
        return generation_ids.read(self.folder.path)

    # former names, which read and set them
    ends = property(lambda self: self.stop_ids, lambda self, ids: setattr(self, "stop_ids", ids))
    suppressed = property(lambda self: self.suppressed_ids, lambda self, ids: setattr(self, "suppressed_ids", ids))

    def logits(
        self,
        decoder_tokens: Any,
        encoder_tokens: Any = None,
        *,
        encoder_mask: Any = None,
        decoder_mask: Any = None,
        images: Any = None,
    ) -> Float[np.ndarray, "B T V"]:
        """Returns float32[B, T, V], the logits of every token that may follow each token of the decoder.

        Args:
          decoder_tokens: int[B, T], with BOS first.
          encoder_tokens: int[B, S], input of the encoder; None for a decoder-only model.
          encoder_mask, decoder_mask: [B, S] and [B, T].
          images: for the image tokens of the encoder, or of a decoder-only model's tokens.

        Raises:
          UserError: tokens or masks of a wrong shape, ids outside the vocabulary, encoder tokens missing or not
            allowed, images that do not match the image tokens.
        """
        # images belong to the side that reads them: the encoder, or the decoder of a decoder-only model
        encoder = None
        if not self.config.is_encoder_decoder:
            if encoder_tokens is not None or encoder_mask is not None:
                raise UserError(
                    "encoder_tokens is given, but a decoder-only model has no encoder; give decoder_tokens only"
                )
            decoder, array = self._image_side_inputs("decoder", decoder_tokens, decoder_mask, images)
        else:
            if encoder_tokens is None:
                raise UserError("encoder_tokens is missing: this is an encoder-decoder model; give its input")
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
        """Returns float32[B, S, D], the states of the encoder after its last norm.

        Raises:
          UserError: as `logits`; or the model is decoder-only.
        """
        if not self.config.is_encoder_decoder:
            raise UserError("a decoder-only model has no encoder to encode with; load an encoder-decoder model")
        return self._run(_encode, *self._image_side_inputs("encoder", encoder_tokens, encoder_mask, images))

    def embed(
        self, texts: Sequence[str], *, pooling: text_embeddings.Pooling = "mean", rows: int = 32
    ) -> Float[np.ndarray, "N D"]:
        """Returns float32[N, D], a vector of length 1 for each text: states of the encoder, pooled over its tokens.

        A decoder-only model has none, so the states are its own; there "last" is the only one that sees the whole text.

        Args:
          pooling: "mean" of all tokens, or the "first" or the "last" one.
          rows: texts of a batch; batches are of similar lengths, and do not change the vectors.

        Raises:
          UserError: no tokenizer; a text longer than the model's context; an unknown pooling, rows below 1.
        """
        texts, options = check_texts("texts", texts), TextOptions.of({"rows": rows, "max_new_tokens": 1})
        token_rows, *_ = self._prompt_rows(texts, None, options)
        pad = self.tokenizer.special_tokens.pad
        with self.on_devices():
            return text_embeddings.embed(
                self.params, token_rows, pooling=pooling, rows=options.rows or 1, pad=pad, compute=self.compute
            )

    def generate(self, prompts: Sequence[str], images: Any = None, **options: Any) -> list[str]:
        """Returns the text that the model generates for each prompt.

        An encoder-decoder reads the prompt with its encoder; a decoder-only model continues it, after BOS. Prompts may
        have different lengths: padding does not change the output.

        Args:
          prompts: the texts.
          images: images of each prompt, at the places of its <start_of_image>, or in front if it has none.
          options: fields of TextOptions (text_generation.py), such as max_new_tokens, temperature, num_beams, stop.

        Raises:
          UserError: no tokenizer; images that do not match the prompts; a model without an image tower; an option that
            does not exist, or is out of its range; a prompt longer than the model's context.
        """
        outputs = self.outputs(prompts, images, **options)
        # a text of no tokens would not say so
        for output in outputs:
            if output.skipped is not None:
                log.warning("skipped: %s", output.skipped)
        return [output.text for output in outputs]

    def outputs(
        self, prompts: Sequence[str], images: Any = None, *, indices: Sequence[int] | None = None, **options: Any
    ) -> list[TextOutput]:
        """Returns what `generate` does with tokens and scores, num_return_sequences of each prompt after each other.

        Args:
          prompts, images, options: as in `generate`.
          indices: a number of each prompt, by which it draws the same in any call; None = 0, 1, 2, …

        Raises:
          UserError: as `generate`.
        """
        by_prompt = dict(self.outputs_as_done(prompts, images, indices=indices, **options))
        return [output for row in range(len(by_prompt)) for output in by_prompt[row]]

    def outputs_as_done(
        self, prompts: Sequence[str], images: Any = None, *, indices: Sequence[int] | None = None, **options: Any
    ) -> Iterator[tuple[int, list[TextOutput]]]:
        """Yields (index of a prompt, its outputs) as batches are done; arguments and errors are those of `outputs`."""
        settings, prompts = TextOptions.of(options), check_texts("prompts", prompts)
        numbers = text_generation.prompt_numbers(indices, len(prompts))
        token_rows, array, skipped = self._prompt_rows(prompts, images, settings)
        for row, reason in skipped.items():
            yield row, [TextOutput("", np.zeros(0, np.int32), skipped=reason)]
        rows, n = [row for row in range(len(prompts)) if row not in skipped], settings.num_return_sequences
        for batch in generation.batches_by_length([len(token_rows[row]) for row in rows], settings.rows):
            places = [rows[i] for i in batch]
            with self.on_devices():
                generated = complete(
                    self.params,
                    [token_rows[row] for row in places],
                    None if array is None else array[places],
                    indices=[numbers[row] for row in places],
                    setup=self._setup(settings),
                )
            for i, row in enumerate(places):
                yield row, [self._as_text(output, settings) for output in generated[i * n : (i + 1) * n]]

    def stream(self, prompt: str, images: Sequence[Any] | None = None, **options: Any) -> Iterator[str]:
        """Yields the text of `generate([prompt], [images])` piece by piece, as it is generated.

        Raises:
          UserError: as `generate`; or the options ask for several outputs or beams, which are known at the end only.
        """
        settings, [prompt] = TextOptions.of(options), check_texts("prompts", [prompt])
        if settings.num_return_sequences > 1 or settings.num_beams > 1:
            raise UserError("one output can be shown as it is made; set num_return_sequences and num_beams to 1")
        token_rows, array, skipped = self._prompt_rows([prompt], None if images is None else [images], settings)
        for reason in skipped.values():
            log.warning("skipped: %s", reason)
            return
        setup = self._setup(settings)
        with self.on_devices():
            batch, keys = batch_of(self.params, token_rows, array, setup=setup)
            shown = ""
            for generated in generation.stream(self.params, batch, options=setup.options, keys_R=keys):
                output = generation.outputs(generated, setup.options)[0]
                text = output_text.text_so_far(
                    output, self.tokenizer, settings.stop, skip_special_tokens=settings.skip_special_tokens
                )
                if len(text) > len(shown):
                    yield text[len(shown) :]
                    shown = text
            if rest := self._as_text(output, settings).text[len(shown) :]:
                yield rest

    def _prompt_rows(
        self, prompts: Sequence[str], images: Any, options: TextOptions
    ) -> tuple[list[np.ndarray], Any, dict[int, str]]:
        """Returns (the tokens of each prompt; the images as an array; by prompt, the reason to skip it)."""
        array, counts = None, [0] * len(prompts)
        if images is not None:
            if options.crops:
                prompts, images = model_inputs.with_crops(prompts, images, options.crops)
            array, counts = self._image_inputs(images, len(prompts))
        token_rows, skipped = self._fitted(prompts, counts, options)
        return token_rows, array, skipped

    def _fitted(
        self, prompts: Sequence[str], counts: Sequence[int], options: TextOptions, names: Sequence[str] | None = None
    ) -> tuple[list[np.ndarray], dict[int, str]]:
        """Returns (the tokens of each prompt, cut where it is too long; by prompt, the reason to skip it)."""
        config, names = self._image_config, names or [f"prompts[{row}]" for row in range(len(prompts))]
        encoded = zip(prompts, counts, strict=True)
        token_rows = [model_inputs.prompt(self.tokenizer, text, count, config) for text, count in encoded]
        self._check_ids(token_rows, counts, names)
        # a decoder-only model continues its prompt after BOS; an encoder was trained with or without it
        has_bos = self.encoder_bos or not self.config.is_encoder_decoder
        # a text of no tokens has BOS instead, as in Reading.inputs: there would be no state
        token_rows = [_after_bos(x, self._bos) if has_bos or not len(x) else x for x in token_rows]
        return text_generation.fit(token_rows, counts, names, self.config, options, first=int(has_bos))

    def check_prompts(
        self, prompts: Sequence[str], counts: Sequence[int], options: TextOptions, *, names: Sequence[str]
    ) -> None:
        """Raises UserError, with the name of the prompt, where `outputs` would, before anything is generated.

        Args:
          counts: the number of images of each prompt, crops included.
          names: the names of the prompts in messages.
        """
        self._fitted(prompts, counts, options, names)

    def _setup(self, options: TextOptions) -> GenerationSetup:
        """Returns the settings of tokens that follow from those of texts."""
        sampler = options.sampler or GREEDY
        if options.samples:
            sampler = self.sampler(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
        start, vocab_size = self._generation_ids.decoder_start, self.config.decoder_stack.vocab_size
        generation_options = options.generation(
            self.stop_ids,
            self.tokenizer.special_tokens.pad,
            sampler=sampler,
            compute=self.compute,
            suppressed_ids=self.suppressed_ids,
        )
        return GenerationSetup(
            generation_options,
            bos=self._bos if start is None else start,
            seed=options.seed,
            rows=options.rows,
            stops=table_of(tuple(options.stop), self.tokenizer, vocab_size) if options.stop else None,
        )

    def _as_text(self, output: Output, options: TextOptions) -> TextOutput:
        return output_text.as_text(
            output, self.tokenizer, options.stop, skip_special_tokens=options.skip_special_tokens
        )

    @property
    def _bos(self) -> int:
        bos = self._generation_ids.bos
        return self.tokenizer.special_tokens.bos if bos is None else bos

    def sampler(
        self, *, temperature: float | None = 1.0, top_k: int | None = None, top_p: float | None = None
    ) -> Sampling:
        """Returns a sampler for `generate`: temperature, then top-k, then top-p.

        Args:
          temperature, top_k, top_p: None = what generation_config.json recommends (Gemma 3: 64 and 0.95), or else 1 and
            none.
        """
        recommended = self.folder.path / generation_ids.GENERATION_FILE
        t: Any = json_field(recommended, "temperature") if temperature is None else temperature
        k: Any = json_field(recommended, "top_k") if top_k is None else top_k
        p: Any = json_field(recommended, "top_p") if top_p is None else top_p
        # transformers writes 0 and 1.0 for "off"
        return Sampling(1.0 if t is None else t, k or None, None if p == 1 else p)

    def _check_ids(self, token_rows: Sequence[np.ndarray], counts: Sequence[int], names: Sequence[str]) -> None:
        """Raises UserError if a prompt has a token without a row in the embedding, or image tokens of no image.

        Args:
          counts: the number of images of each prompt.
          names: the names of the prompts in messages.
        """
        stack, images = self.config.encoder_stack or self.config.decoder_stack, self._image_config
        for row, (tokens, count) in enumerate(zip(token_rows, counts, strict=True)):
            is_image = tokens == (images.token if images else -1)
            # without any image the token is one of text, if it has a row, as in transformers
            if images and any(counts) and is_image.sum() != count * images.tokens:
                spelling = self.tokenizer.decode([images.token])
                raise UserError(
                    f"{names[row]} spells {spelling!r}, which "
                    f"stands for a part of an image; leave it out, and write {START_OF_IMAGE} where an image belongs"
                )
            missing = tokens[(tokens >= stack.vocab_size) & ~(is_image & (count > 0))]
            if len(missing):
                token = int(missing[0])
                raise UserError(
                    f"{names[row]} has {self.tokenizer.decode([token])!r}, token {token}, and the embedding has "
                    f"{stack.vocab_size} rows; leave it out, or take a model that was trained with this token"
                )

    @override
    def save(self, directory: str | PathLike, *, format: Format = "t5g2") -> None:
        files.refuse_existing(directory)  # before the tower is read
        if self._image_config is not None:
            self.read_tower()
        super().save(directory, format=format)

    def embed_images(self, *arguments: Any, **named: Any) -> NoReturn:
        """Raises UserError: only a dual encoder embeds images and texts."""
        raise UserError("a language model does not embed images and texts; load a SigLIP model, or use encode")

    # the methods of a dual encoder exist here, so that a call fails with an explanation
    embed_texts = similarity = classify = retrieve = embed_images

    def read_tower(self) -> None:
        """Reads the image tower and its projector now, unless they are loaded; other weights are not changed."""
        if hasattr(self.params, TOWER_PARTS[0]):
            return
        values = tree.named(self.params)
        for part in TOWER_PARTS:
            leaves = {key: leaf for key, leaf in self.folder.leaves.items() if key[0].startswith(f"{part}.")}
            # a tower may be stored in another dtype than the text, so each part has its own
            abstract = build.abstract(self.config, chosen_dtype(replace(self.folder, leaves=leaves), self.dtype))
            abstract_part = getattr(abstract, part)
            dtypes = {key: leaf.dtype for key, leaf in tree.leaves(abstract_part).items()}

            def read(key: tree.LeafKey, part: str = part, dtypes: Any = dtypes) -> Any:
                return self.folder.leaves[(f"{part}.{key[0]}", key[1])].read().astype(dtypes[key])

            shardings = None if self.mesh is None else getattr(sharding.shardings(abstract, self.mesh), part)
            loaded = tree.build(abstract_part, read, shardings=shardings)
            values |= {f"{part}.{name}": value for name, value in tree.named(loaded).items()}
        # the loaded leaves and the old ones together are those of the model with its tower
        self.params = tree.refill(build.abstract(self.config), values)

    def _image_side_inputs(self, side: str, tokens: Any, mask: Any, images: Any) -> tuple[Sequences, Any]:
        """Returns (the sequences of the side that reads images, the images as an array)."""
        config = self._image_config
        sequences = self._sequences(side, tokens, mask, None if images is None else config)
        rows = len(sequences.tokens)
        array, counts = (None, [0] * rows) if images is None else self._image_inputs(images, rows)
        if config is not None:
            check_images(sequences.tokens, config.token, tokens_per_image=config.tokens, images_per_row=counts)
        return sequences, array

    def _sequences(self, side: str, tokens: Any, mask: Any, images: ImageConfig | None = None) -> Sequences:
        stack = self.config.encoder_stack if side == "encoder" else self.config.decoder_stack
        assert stack is not None
        tokens_BT = model_inputs.tokens(f"{side}_tokens", tokens, stack)
        valid_BT = model_inputs.mask(f"{side}_mask", mask, tokens_BT.shape)
        # an encoder attends both ways anyway, so only a decoder needs blocks of image tokens
        image_token = images.token if images and side == "decoder" else None
        return model_inputs.sequences(tokens_BT, valid_BT, counted=self.positions == "counted", image_token=image_token)

    def _image_inputs(self, images_by_row: Any, rows: int) -> tuple[Any, list[int]]:
        """Returns (the images as an array, None if there are none; the number of images of each row)."""
        if self._image_config is None:
            raise UserError("images are given, but this model has no image tower; load one that has, or give text only")
        size = self._image_config.vision.image_size
        array, counts = model_inputs.images(images_by_row, rows, size, self.image_processor)
        # rows of [] need no tower
        if not any(counts):
            return None, counts
        self.read_tower()
        return array, counts

    @property
    def _image_config(self) -> ImageConfig | None:
        return self.config.image_stack.images


def _after_bos(tokens: np.ndarray, bos: int) -> np.ndarray:
    """Returns the tokens after BOS; one that the prompt spells out itself is not repeated."""
    if len(tokens) and tokens[0] == bos:
        log.warning("a prompt begins with <bos> already; BOS is read once")
        return tokens
    return np.append(np.int32(bos), tokens)


@functools.partial(jax.jit, static_argnames="compute")
def _logits(params: Any, encoder: Sequences | None, decoder: Sequences, images: Any, *, compute: Compute):
    return params.logits(params.hidden(encoder, decoder, images, compute=compute))


@functools.partial(jax.jit, static_argnames="compute")
def _encode(params: Any, encoder: Sequences, images: Any, *, compute: Compute):
    return params.encode(encoder, images, compute=compute).astype(jnp.float32)
