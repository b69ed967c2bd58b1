"""A linear probe of a dual encoder: logistic regression on the embeddings of images.

N images, C classes, D width.
"""

from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from t5g2.core.bounds import Positive, checked
from t5g2.core.errors import UserError
from t5g2.core.optional import require
from t5g2.data.sources.record_templates import RecordList, Template, class_number
from t5g2.eval.image_tasks import ImageTask, ImageTextEmbedder
from t5g2.eval.metrics.labels import EXTRA
from t5g2.eval.metrics.metric import NamedMeans
from t5g2.eval.record_task import Scored, TaskExample, groups_of, result
from t5g2.eval.task_interface import EvalContext, MeasureFunction, TaskResult
from t5g2.eval.task_records import RecordSource, open_records

MOST_STEPS = 1000  # of L-BFGS, as CLIP's evaluation has (arXiv 2103.00020, appendix A.3)


@dataclass(frozen=True, kw_only=True)
@checked
class ImageLinearProbe(ImageTask):
    """Logistic regression by scikit-learn on embeddings, trained on records of its own.

    Embeddings are scaled to length 1, and each of their numbers to mean 0 and variance 1 over the images to train on.

    `<name>/accuracy` is the share of the images whose class is right. An image that cannot be read is wrong, and counts
    in `<name>/errors`; among the images to train on it is an error.

    Attributes:
      train: the records to train on.
      label: template of the class: its name, or its number from 0.
      classes: names of the classes.
      inverse_penalty: scikit-learn's C: weight of the loss against half of the squared norm of the weights.
    """

    train: RecordSource
    label: str = "{label}"
    classes: tuple[str, ...]
    inverse_penalty: Positive = 1.0

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.train, list | tuple):
            object.__setattr__(self, "train", RecordList(tuple(self.train)))

    @override
    def prepare(self, context: EvalContext) -> MeasureFunction:
        pipeline, preprocessing, linear_model = (
            require(f"sklearn.{module}", EXTRA) for module in ("pipeline", "preprocessing", "linear_model")
        )
        examples = self.read(context)
        try:
            records = open_records(self.train, context.data.tokenizer)
        except UserError as error:
            raise UserError(f"evaluation task {self.name!r}, train: {error}") from None
        known = [TaskExample(records, number, "") for number in range(len(records))]
        labels, known_labels = self._labels(examples), self._labels(known)
        if len(set(known_labels)) < 2:
            raise UserError(f"evaluation task {self.name!r}: the records of train are of one class; give at least two")

        def measure(model: ImageTextEmbedder) -> TaskResult:
            training = self._images(model, known, context)
            if training.errors:
                number, problem = next(iter(training.errors.items()))
                raise UserError(f"evaluation task {self.name!r}, record {number + 1} of train: {problem}")
            regression = pipeline.make_pipeline(
                preprocessing.StandardScaler(),
                linear_model.LogisticRegression(C=self.inverse_penalty, max_iter=MOST_STEPS),
            )
            regression.fit(_units(training.images_ND), known_labels)
            embedded = self._images(model, examples, context)
            chosen = regression.predict(_units(embedded.images_ND)).tolist()
            outputs = dict(zip(embedded.numbers, chosen, strict=True))
            right = np.array([[outputs.get(n) == label] for n, label in enumerate(labels)], np.float64)
            predictions = [
                {"output": self.classes[outputs[n]] if n in outputs else "", "reference": self.classes[label]}
                for n, label in enumerate(labels)
            ]
            return result(
                self.name,
                [Scored(NamedMeans(("accuracy",)), right, range(len(examples)))],
                predictions,
                errors=embedded.errors,
                seed=context.seed,
                groups=groups_of(examples),
            )

        return measure

    def _labels(self, examples: list[TaskExample]) -> list[int]:
        labels = []
        for example in examples:
            with self.naming(example.number):
                labels.append(class_number(Template(self.label).fill(example.record), self.classes))
        return labels


def _units(x_ND: np.ndarray) -> np.ndarray:
    """Returns the rows scaled to length 1."""
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)
