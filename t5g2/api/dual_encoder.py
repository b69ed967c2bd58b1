"""Loaded SigLIP models: embeddings of texts and images, zero-shot classification and retrieval.

B texts or images, I images, C classes, D width.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from typing_extensions import override

from t5g2.api import model_inputs
from t5g2.api.model import Model
from t5g2.core.errors import UserError
from t5g2.data.tokenizers import registry as tokenizers
from t5g2.data.tokenizers.base import Tokenizer
from t5g2.eval import zero_shot
from t5g2.eval.zero_shot import RetrievalRecall
from t5g2.models.config import DualEncoderConfig
from t5g2.models.layers import Compute


class DualEncoder(Model):
    """A loaded SigLIP model: texts and images as vectors of length 1 that can be compared."""

    @property
    @override
    def config(self) -> DualEncoderConfig:
        assert isinstance(self.folder.config, DualEncoderConfig)
        return self.folder.config

    def embed_images(self, images: Sequence[Any]) -> Float[np.ndarray, "B D"]:
        """Returns float32[images, D], each of length 1.

        Args:
          images: files, PIL images or arrays, as in model_inputs.images; at least one.

        Raises:
          UserError: no image, or a single one instead of a list; images that cannot be read.
        """
        vision = self.config.vision
        images = model_inputs.image_list(images)
        processor = self.image_processor
        array = np.stack([model_inputs.prepare_image(image, vision.image_size, processor) for image in images])
        return self._run(_embed_images, array)

    def embed_texts(self, texts: Any) -> Float[np.ndarray, "B D"]:
        """Returns float32[texts, D], each of length 1.

        Args:
          texts: a list of texts; or tokens, int[B, length], padded as in the training of the model.
        """
        config = self.config.text
        # a list without any text is taken for token ids
        if isinstance(texts, str) or not hasattr(texts, "__len__") or any(isinstance(text, str) for text in texts):
            texts = model_inputs.check_texts("texts", texts)
            array = model_inputs.siglip_tokens(self.tokenizer, texts, config)
        else:
            array = model_inputs.siglip_ids(texts, config)
        return self._run(_embed_texts, array)

    def similarity(self, images: Sequence[Any], texts: Any) -> Float[np.ndarray, "B I"]:
        """Returns float32[texts, images], logits whose sigmoid is the probability that text and image match."""
        embedded = self.embed_texts(texts), self.embed_images(images)
        with self.on_devices():
            return np.asarray(self.params.logits(*map(jnp.asarray, embedded)), np.float32)

    def classify(self, images: Sequence[Any], classes: Mapping[str, Any]) -> tuple[list[str], Float[np.ndarray, "I C"]]:
        """Classifies images by the prompts of classes, without training (zero-shot).

            classes = {"cat": ["a cat", "a photo of a cat"], "dog": ["a dog"]}
            names, scores_IC = model.classify(["1.jpg", "2.jpg"], classes)

        Args:
          images: as in `embed_images`.
          classes: prompts by the name of the class, at least one each, as in `embed_texts`; the embedding of a class is
            the mean of those of its prompts.

        Returns:
          (the most probable class of each image, float32[images, classes] the probability of each class in the order of
          `classes`). Each class is scored for itself, so the scores of an image do not sum to 1.

        Raises:
          UserError: there is no class, or a class has no prompt; images or prompts that cannot be read.
        """
        empty = [name for name, prompts in classes.items() if not len(prompts) or isinstance(prompts, str)]
        if empty or not classes:
            raise UserError(
                f"classes without a list of prompts: {', '.join(empty) or 'there is no class'}; give at least one "
                f'prompt for each class: {{"cat": ["a photo of a cat"]}}'
            )
        # all prompts are embedded in one batch
        prompts = [prompt for class_prompts in classes.values() for prompt in class_prompts]
        class_of_prompt = [number for number, class_prompts in enumerate(classes.values()) for _ in class_prompts]
        result = zero_shot.classify(
            self.embed_images(images),
            zero_shot.class_embeddings(self.embed_texts(prompts), class_of_prompt),
            logit_scale=float(self.params.logit_scale[...]),
            logit_bias=float(self.params.logit_bias[...]),
        )
        names = list(classes)
        return [names[number] for number in result.classes_N], result.scores_NC

    def retrieve(
        self, images: Sequence[Any], texts: Any, image_of_text: ArrayLike, *, ks: Sequence[int] = (1, 5, 10)
    ) -> RetrievalRecall:
        """Measures retrieval: recall at k of the texts of each image, and of the image of each text.

            recall = model.retrieve(["1.jpg", "2.jpg"], ["a cat", "a grey cat", "a dog"], [0, 0, 1], ks=[1])
            recall.image_to_text[1], recall.text_to_image[1]

        Args:
          images, texts: as in `embed_images` and `embed_texts`.
          image_of_text: for each text the number of the image that it belongs to, from 0; -1 = none of them.
          ks: numbers of first candidates among which a right one counts.

        Raises:
          UserError: image_of_text does not fit the images and texts; a k below 1; images or texts that cannot be read.
        """
        return zero_shot.retrieve(self.embed_images(images), self.embed_texts(texts), image_of_text, ks=ks)

    @functools.cached_property
    @override
    def tokenizer(self) -> Tokenizer:
        # SigLIP's SentencePiece vocabulary: </s>, id 1, pads too, and there is no BOS
        node = self.folder.tokenizer
        if node is None and (self.folder.path / "spiece.model").is_file():
            node = {"kind": "sentencepiece", "file": "spiece.model"}
        if node is None or node["kind"] == "bytes":
            raise UserError(f"{self.folder.path} has no SigLIP tokenizer (spiece.model); put it there, or give tokens")
        return tokenizers.from_dict({"ids": [["pad", 1], ["bos", 1]]} | node, self.folder.path)

    def logits(self, *arguments: Any, **named: Any) -> NoReturn:
        """Raises UserError: only a language model has logits of tokens and generates text."""
        raise UserError(
            "a dual encoder has no logits of tokens and generates no text; use embed_images, embed_texts and similarity"
        )

    # the methods of a language model exist here, so that a call fails with an explanation
    encode = embed = generate = outputs = outputs_as_done = stream = sampler = logits


@functools.partial(jax.jit, static_argnames="compute")
def _embed_images(params: Any, images: Any, *, compute: Compute):
    return params.embed_images(images, compute=compute)


@functools.partial(jax.jit, static_argnames="compute")
def _embed_texts(params: Any, tokens: Any, *, compute: Compute):
    return params.embed_texts(tokens, compute=compute)
