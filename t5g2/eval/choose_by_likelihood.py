"""Multiple choice: the model takes the choice that it gives the highest log-likelihood.

C choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from typing_extensions import override

from t5g2.core.bounds import checked
from t5g2.core.errors import UserError, unknown
from t5g2.data.sources.record_templates import Record, Template, class_name
from t5g2.eval.generation import LanguageModule
from t5g2.eval.likelihood import Likelihood, encode_pair, score_tokens
from t5g2.eval.metrics import catalogue, choices
from t5g2.eval.metrics.choices import ChoiceLikelihoods
from t5g2.eval.metrics.labels import F1, OF_LABELS, RocAuc
from t5g2.eval.metrics.metric import Metric, NamedMeans
from t5g2.eval.reading import warn_beyond_context
from t5g2.eval.record_task import RecordTask, Scored, groups_of, result
from t5g2.eval.task_interface import EvalContext, MeasureFunction, TaskResult

RULES = ("accuracy", "accuracy_per_token", "accuracy_per_byte", "accuracy_pmi")
# records that show if answers are texts or numbers
MOST_READ = 1000


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
      answer: template of the right choice: its text, or its number from 0. Where the choices are numbers themselves, it
        is their text if it can be in every record. A boolean of JSON is the choice true or yes, or false or no.
      unconditional: context of the log-likelihoods that `accuracy_pmi` subtracts (arXiv 2104.08315).
      metrics: names of metrics of labels that compare the output with the right choice: accuracy, f1, mcc; of two
        choices `auc` ranks the probability of the second. F1(positive=…) is of a choice's number from 0, or of its text
        where all records have the same choices.
    """

    choices: str | tuple[str, ...]
    answer: str
    unconditional: str = "Answer:"
    metrics: tuple[str | Metric, ...] = ()

    @override
    def shot_answers(self, records: Sequence[Record], numbers: Sequence[int]) -> list[str]:
        by_number = self._is_by_number(records)
        choices = [self._choices(records[number], by_number=by_number) for number in numbers]
        return [texts[right] for texts, right in choices]

    def _is_by_number(self, records: Sequence[Record]) -> bool:
        """Returns True if answers are numbers of choices; False if each is the text of one, which may be a number too.

        A single record cannot tell: of the choices 3, 1, 0 the answer 1 is both.
        """
        are_texts, are_numbers = True, True
        for place in range(min(len(records), MOST_READ)):
            try:
                texts, answer = self._values(records[place])
            except UserError:  # told where the record is asked about
                continue
            are_texts &= answer in texts
            are_numbers &= _is_number(answer, texts)
        return are_numbers and not are_texts

    def _values(self, record: Record) -> tuple[list[str], str]:
        """Returns the choices of a record, and its answer as it stands there."""
        if isinstance(self.choices, str):
            texts = Template(self.choices).texts(record)
        else:
            texts = [Template(choice).fill(record) for choice in self.choices]
        if len(texts) < 2:
            raise UserError(f"{len(texts)} choices; give at least two: choices = '{{field}}' of a list, or several")
        answers = Template(self.answer).texts(record)
        if len(answers) != 1:
            raise UserError(f"no reference: {self.answer!r} has {len(answers)} values; it is one")
        return texts, class_name(answers[0], texts)

    def _choices(self, record: Record, *, by_number: bool) -> tuple[list[str], int]:
        """Returns the choices of a record, and the number of the right one."""
        texts, answer = self._values(record)
        if answer in texts and not (by_number and _is_number(answer, texts)):
            return texts, texts.index(answer)
        if not _is_number(answer, texts):
            raise UserError(
                f"the answer {answer!r} is none of the choices ({', '.join(map(repr, texts))[:200]}); give its "
                f"text, or its number from 0 to {len(texts) - 1}"
            )
        return texts, int(answer)

    def _metrics(self, answers: Sequence[tuple[list[str], int]]) -> list[Metric]:
        """Returns the metrics, which compare numbers of choices.

        Raises:
          UserError: a metric is not of choices, or of one that there is not.
        """
        metrics, first = [], answers[0][0]
        # names of choices that are the same for all examples are labels too
        named = {text: str(number) for number, text in enumerate(first)} if all(x == first for x, _ in answers) else {}
        numbers = [str(number) for number in range(max(len(texts) for texts, _ in answers))]
        for metric in catalogue.find(self.metrics):
            if isinstance(metric, tuple(catalogue.KINDS.values())) and not isinstance(metric, OF_LABELS):
                raise UserError(f"{metric.names[0]} is not a metric of choices; give accuracy, f1, mcc or auc")
            if isinstance(metric, F1) and metric.positive:
                label = named.get(metric.positive, metric.positive)
                if label not in numbers:
                    raise unknown("choice", metric.positive, [*named, *numbers], where="of f1")
                metrics.append(replace(metric, positive=label))
                continue
            if isinstance(metric, RocAuc) and (len(numbers) != 2 or named.get(metric.positive, metric.positive) != "1"):
                raise UserError(
                    f"auc ranks the probability of the second of two choices, and there are {len(numbers)}, of which "
                    f"{metric.positive!r} is positive; leave positive out, or give accuracy or f1"
                )
            metrics.append(RocAuc() if isinstance(metric, RocAuc) else metric)
        return metrics

    @override
    def prepare(self, context: EvalContext) -> MeasureFunction:
        examples = self.read(context)
        by_number, answers = self._is_by_number(examples[0].records), []
        for example in examples:
            with self.naming(example.number):
                answers.append(self._choices(example.record, by_number=by_number))
        try:
            metrics = self._metrics(answers)
        except UserError as error:
            raise UserError(f"evaluation task {self.name!r}: {error}") from None
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


def _is_number(answer: str, texts: Sequence[str]) -> bool:
    return answer.isdecimal() and int(answer) < len(texts)


def _likelihoods(after: list[Likelihood], alone: list[Likelihood], texts: list[str]) -> ChoiceLikelihoods:
    def column(values: list[Any]) -> np.ndarray:
        return np.array(values)

    return ChoiceLikelihoods(
        column([score.sum for score in after]),
        column([score.sum for score in alone]),
        column([max(1, score.tokens) for score in after]),
        column([max(1, len(text.encode())) for text in texts]),
    )
