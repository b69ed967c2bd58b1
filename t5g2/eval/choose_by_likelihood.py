"""Multiple choice: the model takes the choice that it gives the highest log-likelihood.

C choices.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import override

from t5g2.core.bounds import checked
from t5g2.core.errors import UserError
from t5g2.data.sources.record_templates import Record, Template
from t5g2.eval.generation import LanguageModule
from t5g2.eval.likelihood import Likelihood, encode_pair, score_tokens
from t5g2.eval.metrics import catalogue, choices
from t5g2.eval.metrics.choices import ChoiceLikelihoods
from t5g2.eval.metrics.labels import RocAuc
from t5g2.eval.metrics.metric import Metric, NamedMeans
from t5g2.eval.reading import warn_beyond_context
from t5g2.eval.record_task import RecordTask, Scored, groups_of, result
from t5g2.eval.task_interface import EvalContext, MeasureFunction, TaskResult

RULES = ("accuracy", "accuracy_per_token", "accuracy_per_byte", "accuracy_pmi")


@dataclass(frozen=True, kw_only=True)
@checked
class ChooseByLikelihood(RecordTask):
    """Takes the choice with the highest log-likelihood after the template, by four rules (eval/metrics/choices.py).

    `<name>/accuracy`, `accuracy_per_token`, `accuracy_per_byte` and `accuracy_pmi` are shares of the examples whose
    choice is right. A choice follows the template and the delimiter; an encoder-decoder model reads the template with
    its encoder. A prediction is {"task", "input", "choices", "output", "reference", "log_likelihoods", "scores"}, where
    the output is the choice by the plain log-likelihood.

    Attributes:
      choices: a template that is one field with a list, "{choices}", or a tuple of templates, the same for all records.
      answer: template of the right choice: its number from 0, or its text.
      unconditional: context of the log-likelihoods that `accuracy_pmi` subtracts (arXiv 2104.08315).
      metrics: names of metrics of labels that compare the output with the right choice, such as mcc; of two choices
        `auc` ranks the probability of the second.
    """

    choices: str | tuple[str, ...]
    answer: str
    unconditional: str = "Answer:"
    metrics: tuple[str | Metric, ...] = ()

    @override
    def shot_answer(self, record: Record) -> str:
        texts, right = self._choices(record)
        return texts[right]

    def _choices(self, record: Record) -> tuple[list[str], int]:
        """Returns the choices of a record, and the number of the right one."""
        if isinstance(self.choices, str):
            texts = [str(value) for value in Template(self.choices).values(record)]
        else:
            texts = [Template(choice).fill(record) for choice in self.choices]
        if len(texts) < 2:
            raise UserError(f"{len(texts)} choices; give at least two: choices = '{{field}}' of a list, or several")
        [answer, *others] = Template(self.answer).values(record) or [None]
        if answer is None or others:
            raise UserError(f"no reference: {self.answer!r} has {len(others) + 1 if others else 0} values; it is one")
        # a choice's text comes first: choices may be numbers themselves
        if str(answer) in texts:
            return texts, texts.index(str(answer))
        if not str(answer).isdigit() or int(answer) >= len(texts):
            raise UserError(
                f"the answer {str(answer)!r} is none of the choices ({', '.join(map(repr, texts))[:200]}); give its "
                f"text, or its number from 0 to {len(texts) - 1}"
            )
        return texts, int(answer)

    @override
    def prepare(self, context: EvalContext) -> MeasureFunction:
        try:
            metrics = catalogue.find(self.metrics)
        except UserError as error:
            raise UserError(f"evaluation task {self.name!r}: {error}") from None
        examples = self.read(context)
        answers = []
        for example in examples:
            with self.naming(example.number):
                answers.append(self._choices(example.record))
        pairs = [
            (example.prompt, self.delimiter + text)
            for example, (texts, _) in zip(examples, answers, strict=True)
            for text in texts
        ]
        # the same for all examples, mostly
        unconditional = list(dict.fromkeys((self.unconditional, choice) for _, choice in pairs))

        def measure(model: LanguageModule) -> TaskResult:
            scoring, is_encoder_decoder = context.scoring(), model.config.is_encoder_decoder
            tokens = [
                encode_pair(scoring.reading, *pair, is_encoder_decoder=is_encoder_decoder)
                for pair in [*pairs, *unconditional]
            ]
            lengths = [len(x.context) + (0 if is_encoder_decoder else len(x.continuation) - 1) for x in tokens]
            warn_beyond_context(self.name, lengths[: len(pairs)], model.config)
            scores = score_tokens(model, tokens, scoring=scoring)
            alone = dict(zip(unconditional, scores[len(pairs) :], strict=True))
            after = iter(scores)
            likelihoods = [
                _likelihoods(
                    [next(after) for _ in texts],
                    [alone[self.unconditional, self.delimiter + text] for text in texts],
                    texts,
                )
                for texts, _ in answers
            ]
            taken = [choices.taken(several) for several in likelihoods]
            right = [[number] for _, number in answers]
            rows = np.array([[picks[rule] == n for rule in RULES] for picks, [n] in zip(taken, right, strict=True)])
            scored = [Scored(NamedMeans(RULES), rows.astype(np.float64), range(len(examples)))]
            for metric in metrics:
                picks = [float(choices.probabilities(several)[1]) for several in likelihoods]
                outputs = picks if isinstance(metric, RocAuc) else [picks["accuracy"] for picks in taken]
                scored.append(Scored(metric, metric.rows(outputs, right), range(len(examples)), right))
            predictions = [
                {
                    "input": example.prompt,
                    "choices": texts,
                    "output": texts[picks["accuracy"]],
                    "reference": texts[number],
                    "log_likelihoods": several.sums_C.tolist(),
                }
                for example, (texts, number), picks, several in zip(examples, answers, taken, likelihoods, strict=True)
            ]
            return result(self.name, scored, predictions, errors={}, seed=context.seed, groups=groups_of(examples))

        return measure


def _likelihoods(after: list[Likelihood], alone: list[Likelihood], texts: list[str]) -> ChoiceLikelihoods:
    def column(values: list[Any]) -> np.ndarray:
        return np.array(values)

    return ChoiceLikelihoods(
        column([score.sum for score in after]),
        column([score.sum for score in alone]),
        column([max(1, score.tokens) for score in after]),
        column([max(1, len(text.encode())) for text in texts]),
    )
