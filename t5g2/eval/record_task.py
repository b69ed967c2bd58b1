"""The shared part of tasks of records: prompts of templates, few-shot examples, predictions with their scores.

N examples, K numbers of an example.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from t5g2.core.bounds import Count, CountOrZero, checked
from t5g2.core.errors import UserError
from t5g2.core.seeds import derive_seed
from t5g2.data.sources.record_templates import Record, RecordList, Template
from t5g2.eval.metrics.intervals import Interval, intervals
from t5g2.eval.metrics.metric import Metric
from t5g2.eval.task_interface import EvalContext, Task, TaskResult
from t5g2.eval.task_records import RecordSource, open_records


@dataclass(frozen=True)
class TaskExample:
    """An example of a task.

    Attributes:
      records: those of the task, of which pixels are read only when they are needed.
      number: of its record, from 0.
      prompt: text that the model reads, few-shot examples included.
      group: examples of one group have scores of their own; "" = there are no groups.
    """

    records: Sequence[Record]
    number: int
    prompt: str
    group: str = ""

    @property
    def record(self) -> Record:
        """The record."""
        return self.records[self.number]


@dataclass(frozen=True, kw_only=True)
@checked
class RecordTask(Task):
    """A task whose examples are records: of files, of a data set, or a list of dicts.

    Attributes:
      data: the records.
      name: prefix of the scores.
      template: text that the model reads, with fields of the record in braces: "Question: {question}\\nAnswer:".
      shots: number of solved examples before it (few-shot), the first in an order that depends on the seed alone, and
        never the example itself.
      shot_data: the records of these; None = those of `data`.
      delimiter: text between a template and its answer.
      separator: text between examples.
      examples: number of examples, drawn by the seed alone; None = all.
      group: template of a group, such as "{language}": each score is also given for each, `<name>/<score>/<group>`.
    """

    data: RecordSource
    name: str
    template: str
    shots: CountOrZero = 0
    shot_data: RecordSource | None = None
    delimiter: str = " "
    separator: str = "\n\n"
    examples: Count | None = None
    group: str = ""

    def __post_init__(self):
        # a list is given where a Python file makes the records
        for field in ("data", "shot_data"):
            if isinstance(getattr(self, field), list | tuple):
                object.__setattr__(self, field, RecordList(tuple(getattr(self, field))))
        if "/" in self.name or not self.name:
            raise UserError(f"name = {self.name!r}; a task has a name, without / in it")

    def shot_answer(self, record: Record) -> str:
        """Returns the answer that a few-shot example shows.

        Raises:
          UserError: examples of this kind of task have no answers.
        """
        raise UserError(f"shots = {self.shots}, and {type(self).__name__} shows no solved examples; set shots to 0")

    def shot_answers(self, records: Sequence[Record], numbers: Sequence[int]) -> list[str]:
        """Returns the answers that few-shot examples show, those of some numbers among the records."""
        return [self.shot_answer(records[number]) for number in numbers]

    def read(self, context: EvalContext) -> list[TaskExample]:
        """Returns the examples.

        Raises:
          UserError: there are no records, or too few for the shots; a record lacks a field of the template.
        """
        try:
            records = open_records(self.data, context.data.tokenizer)
            template, group = Template(self.template), Template(self.group)
            shots = self._shots(records, template, context)
        except UserError as error:
            raise UserError(f"evaluation task {self.name!r}: {error}") from None
        examples = []
        for number in self._chosen(len(records), context.seed):
            with self.naming(number):
                before = [text for other, text in shots if other != number][: self.shots]
                prompt = self.separator.join([*before, template.fill(records[number])])
                examples.append(TaskExample(records, number, prompt, _without_slash(group.fill(records[number]))))
        return examples

    def _chosen(self, number: int, seed: int) -> list[int]:
        if self.examples is None or self.examples >= number:
            return list(range(number))
        order = np.random.default_rng(derive_seed(seed, "task", self.name)).permutation(number)
        return sorted(order[: self.examples].tolist())

    def _shots(self, records: Sequence[Record], template: Template, context: EvalContext) -> list[tuple[int, str]]:
        """Returns (number of the record, text) of one few-shot example more than is shown; -1 = of other records."""
        if not self.shots:
            return []
        is_own = self.shot_data is None or self.shot_data == self.data
        pool = records if is_own or self.shot_data is None else open_records(self.shot_data, context.data.tokenizer)
        if len(pool) < self.shots + is_own:
            raise UserError(f"shots = {self.shots}, and there are {len(pool)} records to show; lower shots")
        order = np.random.default_rng(derive_seed(context.seed, "shots", self.name)).permutation(len(pool))
        numbers = order[: self.shots + is_own].tolist()
        return [
            (number if is_own else -1, template.fill(pool[number]) + self.delimiter + answer)
            for number, answer in zip(numbers, self.shot_answers(pool, numbers), strict=True)
        ]

    def check_images(self, examples: Sequence[TaskExample], field: str) -> None:
        """Raises UserError if a record lacks the field of its images: no example could be read."""
        for example in examples:
            with self.naming(example.number):
                if field not in example.record:
                    names = ", ".join(example.record) or "none"
                    raise UserError(f"the record has no field {field!r}, which is to hold its images; it has {names}")

    def naming(self, number: int) -> "_Naming":
        """Returns a context in which errors of a record have the names of the task and of the record."""
        return _Naming(self.name, number + 1)


def _without_slash(group: str) -> str:
    if "/" in group:
        raise UserError(f"the group {group!r} has a /, which divides the names of scores; give one without")
    return group


class _Naming:
    def __init__(self, task: str, number: int):
        self._task, self._number = task, number

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UserError):
            raise UserError(f"evaluation task {self._task!r}, record {self._number}: {error}") from None


@dataclass(frozen=True)
class Scored:
    """Metrics of a task with what their examples contribute.

    Attributes:
      metric: the metric.
      rows: float64[N, K].
      numbers: the example of each row.
      references: as the metric compared with; for its signature.
    """

    metric: Metric
    rows: np.ndarray
    numbers: Sequence[int]
    references: Sequence[Sequence[Any]] = ()


def result(
    task: str,
    scored: Sequence[Scored],
    predictions: list[dict[str, Any]],
    *,
    errors: Mapping[int, str],
    seed: int,
    groups: Sequence[str] = (),
) -> TaskResult:
    """Returns the result of a task: scores with intervals, and predictions with the scores of each example.

    Args:
      predictions: one of each example; the task's name comes first in it, `scores` and `error` last.
      errors: the problem of each example that failed, by its number; it is counted in the score `<task>/errors`.
      groups: the group of each example; none, or "" = there are no groups.
    """
    scores, spans, signatures = {}, {}, {}
    of_examples: list[dict[str, float]] = [{} for _ in predictions]
    for part in scored:
        if len(part.rows):
            named = intervals(part.metric, part.rows, seed=seed)
            spans |= {f"{task}/{name}": interval for name, interval in named.items()}
            if signature := part.metric.signature(part.references):
                signatures |= {f"{task}/{name}": signature for name in named}
        values_NM = part.metric.of_examples(part.rows)
        for number, values_M in zip(part.numbers, () if values_NM is None else values_NM.tolist()):
            of_examples[number] |= dict(zip(part.metric.names, values_M, strict=True))
    spans |= _by_group(task, scored, groups, seed)
    scores |= {name: interval.value for name, interval in spans.items()}
    if errors:
        scores[f"{task}/errors"] = float(len(errors))
    for number, (prediction, values) in enumerate(zip(predictions, of_examples, strict=True)):
        if values:
            prediction["scores"] = values
        if number in errors:
            prediction["error"] = errors[number]
    return TaskResult(scores, [{"task": task, **prediction} for prediction in predictions], spans, signatures)


def groups_of(examples: Sequence[TaskExample]) -> list[str]:
    """Returns the group of each example."""
    return [example.group for example in examples]


def _by_group(task: str, scored: Sequence[Scored], groups: Sequence[str], seed: int) -> dict[str, Interval]:
    """Returns the scores of each group, in the order of their names."""
    spans = {}
    for part in scored:
        of_rows = np.array([groups[number] if groups else "" for number in part.numbers])
        for group in sorted({*of_rows.tolist()} - {""}):
            named = intervals(part.metric, part.rows[of_rows == group], seed=seed)
            spans |= {f"{task}/{name}/{group}": interval for name, interval in named.items()}
    return spans
