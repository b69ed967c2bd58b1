"""Tasks of a dual encoder: zero-shot classification of images, and retrieval of texts and images.

N images, M texts, C classes, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float
from typing_extensions import override

from t5g2.core.bounds import Count, Size, checked
from t5g2.core.errors import UserError
from t5g2.data.sources.record_templates import Template, class_number
from t5g2.eval import zero_shot
from t5g2.eval.metrics.metric import NamedMeans
from t5g2.eval.record_task import RecordTask, Scored, TaskExample, groups_of, result
from t5g2.eval.task_interface import EvalContext, MeasureFunction, TaskResult


class ImageTextEmbedder(Protocol):
    """A model that embeds images and texts, as t5g2.load returns it for a dual encoder."""

    def embed_images(self, images: Sequence[Any]) -> Float[np.ndarray, "N D"]:
        """Returns float32[N, D], of files, PIL images or arrays."""
        ...

    def embed_texts(self, texts: Any) -> Float[np.ndarray, "M D"]:
        """Returns float32[M, D]."""
        ...


@dataclass(frozen=True, kw_only=True)
@checked
class ImageTask(RecordTask):
    """A task of a dual encoder, whose records have images.

    Attributes:
      image: field of the image: a path, its file's bytes, a PIL image or an array.
      rows: images that are embedded at a time.
    """

    template: str = ""
    image: str = "image"
    rows: Size = 32

    @override
    def read(self, context: EvalContext) -> list[TaskExample]:
        examples = super().read(context)
        self.check_images(examples, self.image)
        return examples

    def _images(self, model: Any, examples: Sequence[TaskExample], context: EvalContext) -> "_Embedded":
        """Returns the embeddings of the images that can be read."""
        if not hasattr(model, "embed_texts"):
            raise UserError(
                f"evaluation task {self.name!r} compares images with texts, which takes a dual encoder (SigLIP), and "
                f"this is a language model; load another model, or leave the task out"
            )
        blocks, numbers, errors = [], [], {}
        for start in range(0, len(examples), self.rows):
            context.raise_if_stopping()
            block = range(start, min(start + self.rows, len(examples)))
            embeddings, problems = _each(model.embed_images, [examples[n].record.get(self.image) for n in block])
            errors |= {block[place]: problem for place, problem in problems.items()}
            numbers += [number for place, number in enumerate(block) if place not in problems]
            blocks += embeddings
            context.advance(len(block), len(examples))
        if not blocks:
            raise UserError(f"evaluation task {self.name!r}: no image can be read: {next(iter(errors.values()))}")
        return _Embedded(np.concatenate(blocks), numbers, errors)


@dataclass(frozen=True)
class _Embedded:
    """Embeddings of images.

    Attributes:
      images_ND: of the images that were read.
      numbers: their examples.
      errors: the problems of the others, by example.
    """

    images_ND: Float[np.ndarray, "N D"]
    numbers: list[int]
    errors: dict[int, str]


def _each(embed: Callable[[list[Any]], np.ndarray], images: list[Any]) -> tuple[list[np.ndarray], dict[int, str]]:
    """Returns the embeddings of the images that can be read, and the problems of the others by their places."""
    try:
        return [embed(images)], {}
    except (ValueError, OSError) as error:
        if len(images) == 1:
            return [], {0: str(error)}
    # one of them cannot be read: each by itself tells which
    parts = [_each(embed, [image]) for image in images]
    problems = {place: problem for place, (_, several) in enumerate(parts) for problem in several.values()}
    return [block for blocks, _ in parts for block in blocks], problems


@dataclass(frozen=True, kw_only=True)
@checked
class ImageClassification(ImageTask):
    """Zero-shot classification: the class whose prompts are nearest to the image (CLIP, arXiv 2103.00020).

    `<name>/accuracy` is the share of the images whose class is right, `<name>/accuracy_by_class` the mean over the
    classes of their shares. An image that cannot be read is wrong, and counts in `<name>/errors`.

    Attributes:
      label: template of the right class: its name, or its number from 0.
      classes: names of the classes.
      prompts: texts that are averaged for a class, with {name} in the place of its name.
    """

    label: str = "{label}"
    classes: tuple[str, ...]
    prompts: tuple[str, ...] = ("a photo of a {name}.",)

    @override
    def prepare(self, context: EvalContext) -> MeasureFunction:
        if len(self.classes) < 2 or not self.prompts:
            raise UserError(
                f"evaluation task {self.name!r} has {len(self.classes)} classes and {len(self.prompts)} prompts; give "
                f"at least two classes and one prompt"
            )
        examples, labels = self.read(context), []
        for example in examples:
            with self.naming(example.number):
                labels.append(class_number(Template(self.label).fill(example.record), self.classes))
        texts = [Template(prompt).fill({"name": name}) for name in self.classes for prompt in self.prompts]

        def measure(model: ImageTextEmbedder) -> TaskResult:
            embedded = self._images(model, examples, context)
            of_prompts = np.repeat(np.arange(len(self.classes)), len(self.prompts))
            classes_CD = zero_shot.class_embeddings(model.embed_texts(texts), of_prompts)
            # scale and bias move no class before another
            chosen_N = zero_shot.classify(embedded.images_ND, classes_CD, logit_scale=0.0, logit_bias=0.0).classes_N
            outputs = dict(zip(embedded.numbers, chosen_N.tolist(), strict=True))
            right = np.array([[outputs.get(n) == label] for n, label in enumerate(labels)], np.float64)
            predictions = [
                {"output": self.classes[outputs[n]] if n in outputs else "", "reference": self.classes[label]}
                for n, label in enumerate(labels)
            ]
            scored = [Scored(NamedMeans(("accuracy",)), right, range(len(examples)))]
            whole = result(
                self.name, scored, predictions, errors=embedded.errors, seed=context.seed, groups=groups_of(examples)
            )
            shares = [right[np.array(labels) == label].mean() for label in set(labels)]
            return whole._replace(scores=whole.scores | {f"{self.name}/accuracy_by_class": float(np.mean(shares))})

        return measure


@dataclass(frozen=True, kw_only=True)
@checked
class ImageTextRetrieval(ImageTask):
    """Retrieval of the texts of an image, and of the image of a text, among all of the records.

    `<name>/image_to_text@k` and `<name>/text_to_image@k` are the shares of the queries with a right candidate among the
    first k (eval/zero_shot.py, retrieve). Images that cannot be read are left out, and count in `<name>/errors`.

    Attributes:
      texts: template of an image's text; a field that holds a list, "{captions}", has several.
      ks: the numbers k.
    """

    texts: str = "{captions}"
    ks: tuple[Count, ...] = (1, 5, 10)

    @override
    def prepare(self, context: EvalContext) -> MeasureFunction:
        examples, texts = self.read(context), []
        for example in examples:
            with self.naming(example.number):
                texts.append(Template(self.texts).texts(example.record))

        def measure(model: ImageTextEmbedder) -> TaskResult:
            embedded = self._images(model, examples, context)
            owners = [place for place, n in enumerate(embedded.numbers) for _ in texts[n]]
            if not owners:
                raise UserError(f"evaluation task {self.name!r}: no reference: no record has a text at {self.texts!r}")
            flat = [text for number in embedded.numbers for text in texts[number]]
            blocks = [model.embed_texts(flat[start : start + self.rows]) for start in range(0, len(flat), self.rows)]
            by_image, by_text = zero_shot.ranks(embedded.images_ND, np.concatenate(blocks), owners)
            scored = []
            for direction, ranks in (("image_to_text", by_image), ("text_to_image", by_text)):
                names = tuple(f"{direction}@{k}" for k in self.ks)
                # texts are no examples of their own, so only images have scores of their own
                numbers = [n for n, rank in zip(embedded.numbers, by_image) if rank] if ranks is by_image else []
                scored.append(Scored(NamedMeans(names), zero_shot.found_within(ranks, self.ks), numbers))
            predictions = [{"reference": several} for several in texts]
            return result(
                self.name, scored, predictions, errors=embedded.errors, seed=context.seed, groups=groups_of(examples)
            )

        return measure
