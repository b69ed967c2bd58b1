"""Loss of texts of records: nats per token, perplexity, bits per byte, with intervals over the texts."""

from dataclasses import dataclass

from typing_extensions import override

from t5g2.core.bounds import Size, checked
from t5g2.core.errors import UserError
from t5g2.data.sources.record_templates import Record, Template
from t5g2.eval.generation import LanguageModule
from t5g2.eval.likelihood import loglikelihood, loglikelihood_rolling
from t5g2.eval.metrics.losses import TextLosses
from t5g2.eval.record_task import RecordTask, Scored, groups_of, result
from t5g2.eval.task_interface import EvalContext, MeasureFunction, TaskResult


@dataclass(frozen=True, kw_only=True)
@checked
class TextLoss(RecordTask):
    """Loss of a text of each record after its template; for any model, whatever it was trained on.

    Without a template the whole text is predicted, in windows if it is long (eval/likelihood.py,
    loglikelihood_rolling). `<name>/bits_per_byte` can be compared across tokenizers.

    Attributes:
      target: template of the text that is predicted.
      window_tokens: largest number of tokens that are predicted at a time, if there is no template.
      context_tokens: tokens before a window that are read at least, if there are so many.
    """

    template: str = ""
    target: str = "{text}"
    window_tokens: Size = 1024
    context_tokens: Size = 1

    @override
    def shot_answer(self, record: Record) -> str:
        return Template(self.target).fill(record)

    @override
    def prepare(self, context: EvalContext) -> MeasureFunction:
        if self.shots and not self.template:
            raise UserError(
                f"evaluation task {self.name!r}: shots = {self.shots}, and without a template whole texts are "
                f"predicted, after nothing; give one, or set shots to 0"
            )
        examples, targets = self.read(context), []
        for example in examples:
            with self.naming(example.number):
                targets.append(Template(self.target).fill(example.record))

        def measure(model: LanguageModule) -> TaskResult:
            if self.template:
                pairs = [
                    (example.prompt, self.delimiter + text) for example, text in zip(examples, targets, strict=True)
                ]
                scores = loglikelihood(model, pairs, scoring=context.scoring())
            else:
                scores = loglikelihood_rolling(
                    model,
                    targets,
                    window=self.window_tokens,
                    context_tokens=self.context_tokens,
                    scoring=context.scoring(),
                )
            metric = TextLosses()
            rows = metric.rows([(-score.sum, score.tokens, score.text_bytes) for score in scores], ())
            predictions = [
                {"input": example.prompt, "reference": text} for example, text in zip(examples, targets, strict=True)
            ]
            scored = [Scored(metric, rows, range(len(examples)))]
            return result(self.name, scored, predictions, errors={}, seed=context.seed, groups=groups_of(examples))

        return measure
