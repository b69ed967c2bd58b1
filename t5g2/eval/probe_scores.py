"""Scores of a model's probe: the class, or the number, that it predicts for each text.

N examples, C outputs of the probe.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from typing_extensions import override

from t5g2.core.batch import Sequences
from t5g2.core.bounds import checked
from t5g2.core.errors import UserError, unknown
from t5g2.core.sharding import batch_sharding, constrain
from t5g2.data.pipeline import to_global
from t5g2.data.sources.labelled_text import label_number
from t5g2.data.sources.record_templates import Record, Template
from t5g2.eval.generation import LanguageModule, batches_by_length, pad_rows
from t5g2.eval.metrics import catalogue
from t5g2.eval.metrics.labels import F1, OF_LABELS, OF_NUMBERS, RocAuc
from t5g2.eval.metrics.metric import Metric, NamedMeans
from t5g2.eval.reading import warn_beyond_context
from t5g2.eval.record_task import RecordTask, Scored, groups_of, result
from t5g2.eval.task_interface import EvalContext, MeasureFunction, TaskResult
from t5g2.models import probe_head
from t5g2.models.config import ProbeConfig
from t5g2.models.layers import Compute


@dataclass(frozen=True, kw_only=True)
@checked
class ProbeScores(RecordTask):
    """Asks the model's probe for the label of each text, as the objective probe has trained it.

    `<name>/loss` is the mean cross-entropy in nats, or the mean squared error of numbers. A prediction is {"task",
    "input", "output", "reference", "probabilities" (of the classes), "scores"}.

    Attributes:
      template: the text.
      label: template of the label: the name of a class or its number from 0; a number, where the probe has no classes.
      metrics: names of metrics, or metrics with settings: of classes accuracy, f1 (macro, or of one class:
        F1(positive="yes")), mcc, and of two classes auc; of numbers pearson and spearman. None = accuracy, or both.
    """

    template: str = "{text}"
    label: str = "{label}"
    metrics: tuple[str | Metric, ...] | None = None

    @override
    def shot_answer(self, record: Record) -> str:
        return Template(self.label).fill(record)

    def check(self, probe: ProbeConfig | None) -> tuple[Metric, ...]:
        """Returns the metrics.

        Raises:
          UserError: the model has no probe, or one whose outputs a metric is not of.
        """
        where = f"evaluation task {self.name!r}"
        if probe is None:
            raise UserError(
                f"{where} asks the model's probe, and the model has none; train one (model.probe with the objective "
                f"probe), or leave the task out"
            )
        default = ("accuracy",) if probe.classes else ("pearson", "spearman")
        metrics = catalogue.find(default if self.metrics is None else self.metrics)
        predicted, allowed = "numbers", "pearson or spearman"
        if probe.classes:
            predicted, allowed = "classes", "accuracy, f1, mcc or auc"
        for metric in metrics:
            if isinstance(metric, OF_NUMBERS if probe.classes else OF_LABELS):
                raise UserError(
                    f"{where}: the probe predicts {predicted}, and {metric.names[0]} takes none; give {allowed}"
                )
            if isinstance(metric, F1) and metric.positive and metric.positive not in probe.classes:
                raise unknown("class", metric.positive, probe.classes, where=f"of f1 in {where}")
            if isinstance(metric, RocAuc) and len(probe.classes) != 2:
                raise UserError(
                    f"{where}: auc is of two classes, and the probe has {len(probe.classes)}; give accuracy or f1"
                )
            if isinstance(metric, RocAuc) and metric.positive not in ("1", probe.classes[1]):
                raise UserError(
                    f"{where}: auc ranks the probability of the second class, {probe.classes[1]!r}, and "
                    f"{metric.positive!r} is positive; leave positive out"
                )
        # the second class has the number 1 among labels
        return tuple(RocAuc() if isinstance(metric, RocAuc) else metric for metric in metrics)

    @override
    def prepare(self, context: EvalContext) -> MeasureFunction:
        examples, reading = self.read(context), context.model_reading
        texts = [reading.tokenizer.encode_document(example.prompt) for example in examples]

        def measure(model: LanguageModule) -> TaskResult:
            metrics, probe = self.check(model.config.probe), model.config.probe
            assert probe is not None
            labels = []
            for example in examples:
                with self.naming(example.number):
                    labels.append(label_number(Template(self.label).fill(example.record), probe.classes))
            is_encoder_decoder = model.config.is_encoder_decoder
            rows = [reading.inputs(tokens, is_encoder_decoder=is_encoder_decoder) for tokens in texts]
            warn_beyond_context(self.name, [len(tokens) for tokens in rows], model.config)
            y_NC, label_N = _outputs(model, rows, context), np.array(labels)
            one_row = jnp.asarray(y_NC[None]), jnp.asarray(label_N[None], jnp.float32)
            loss_N1 = np.asarray(probe_head.label_losses(*one_row, probe).loss_BT, np.float64).T
            everything = range(len(examples))
            scored = [Scored(NamedMeans(("loss",), shares=False), loss_N1, everything)]
            outputs, references = _readable(y_NC, probe), _readable_labels(label_N, probe)
            for metric in metrics:
                answers, right = outputs, [[reference] for reference in references]
                if isinstance(metric, RocAuc):
                    # the number that ranks examples is that of the second class, which "1" names
                    answers, right = (y_NC[:, 1] - y_NC[:, 0]).tolist(), [[int(label)] for label in labels]
                scored.append(Scored(metric, metric.rows(answers, right), everything, right))
            predictions = [
                {"input": example.prompt, "output": output, "reference": reference}
                for example, output, reference in zip(examples, outputs, references, strict=True)
            ]
            if probe.classes:
                for prediction, y_C in zip(predictions, y_NC, strict=True):
                    prediction["probabilities"] = np.asarray(jax.nn.softmax(y_C)).tolist()
            return result(self.name, scored, predictions, errors={}, seed=context.seed, groups=groups_of(examples))

        return measure


def _readable(y_NC: np.ndarray, probe: ProbeConfig) -> list[Any]:
    """Returns the likeliest class of each example by name, or its number."""
    if not probe.classes:
        return y_NC[:, 0].tolist()
    return [probe.classes[number] for number in y_NC.argmax(axis=1).tolist()]


def _readable_labels(label_N: np.ndarray, probe: ProbeConfig) -> list[Any]:
    return [probe.classes[int(label)] for label in label_N] if probe.classes else label_N.tolist()


def _outputs(model: LanguageModule, token_rows: Sequence[np.ndarray], context: EvalContext) -> Float[np.ndarray, "N C"]:
    """Returns float32[N, C], the probe's outputs for texts in tokens; batches are of texts of about one length."""
    reading, rows = context.model_reading, context.data.rows
    assert model.config.probe is not None
    y_NC = np.zeros((len(token_rows), model.config.probe.outputs), np.float32)
    for batch in batches_by_length([len(tokens) for tokens in token_rows], rows):
        context.raise_if_stopping()
        empty = [np.zeros(0, np.int32)] * (rows - len(batch))
        pad = reading.tokenizer.special_tokens.pad
        texts = pad_rows([*(token_rows[i] for i in batch), *empty], pad=pad, left=False)
        encoder, decoder = None, texts
        if model.config.is_encoder_decoder:
            start = [np.array([reading.decoder_start], np.int32)] * rows
            encoder, decoder = texts, pad_rows(start, pad=0, left=False, multiple=1)
        sides: Any = encoder, decoder
        if context.mesh is not None:
            sides = to_global(sides, batch_sharding(context.mesh), rows=rows)
        y_NC[batch] = np.asarray(_row_outputs(model, *sides, compute=context.compute))[: len(batch)]
        context.advance(len(batch), len(token_rows))
    return y_NC


@partial(jax.jit, static_argnames="compute")
def _row_outputs(
    model: LanguageModule, encoder: Sequences | None, decoder: Sequences, *, compute: Compute
) -> Float[Array, "B C"]:
    one_B1 = jnp.ones((decoder.tokens.shape[0], 1), jnp.int32)
    y_BC = probe_head.outputs(model, encoder, decoder, one_B1, compute=compute)[:, 0]
    return constrain(y_BC, None, None)  # replicated, so that every process can read them
