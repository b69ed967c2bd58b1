"""Tasks whose outputs are generated and compared with references, or with labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from typing_extensions import override

from t5g2.core.bounds import Size, checked
from t5g2.core.errors import UserError
from t5g2.core.seeds import derive_seed
from t5g2.data.sources.record_templates import Record, Template
from t5g2.eval.generation import (
    GREEDY,
    GenerationOptions,
    GenerationSetup,
    LanguageModule,
    Sampler,
    batches_by_length,
    complete,
)
from t5g2.eval.generation_cost import cost_scores
from t5g2.eval.generation_options import BeamCount, LengthPenalty
from t5g2.eval.metrics import catalogue
from t5g2.eval.metrics.intervals import Interval
from t5g2.eval.metrics.labels import OF_LABELS, OF_NUMBERS
from t5g2.eval.metrics.metric import Metric
from t5g2.eval.output_text import as_text
from t5g2.eval.reading import Reading, warn_beyond_context
from t5g2.eval.record_task import RecordTask, Scored, TaskExample, groups_of, result
from t5g2.eval.stop_strings import table_of
from t5g2.eval.task_interface import EvalContext, MeasureFunction, TaskResult


@dataclass(frozen=True, kw_only=True)
@checked
class GenerateAndCompare(RecordTask):
    """Generates an output for each record, and compares it with the record's references.

    A prediction is {"task", "input", "output", "reference", "scores"}. An example that fails, for example because its
    image cannot be read, has "error" too, counts in `<name>/errors`, and is scored with an empty output.

    Attributes:
      reference: template of the reference; a field that holds a list, "{answers}", has several.
      metrics: names of metrics (eval/metrics/catalogue.py), or metrics with settings of their own.
      max_new_tokens: largest number of tokens of an output.
      sampler: rule by which the next token is chosen.
      num_beams, length_penalty: beam search; 1 = none (GenerationOptions).
      stop: texts that end an output, without which it is compared.
      images: field of the images: one, or a list of them; "" = there are none.
    """

    reference: str
    metrics: tuple[str | Metric, ...] = ("exact_match", "token_f1")
    max_new_tokens: Size = 64
    sampler: Sampler = GREEDY
    num_beams: BeamCount = 1
    length_penalty: LengthPenalty = 1.0
    stop: tuple[str, ...] = ()
    images: str = ""

    @override
    def shot_answer(self, record: Record) -> str:
        return _references(Template(self.reference), record)[0]

    @override
    def prepare(self, context: EvalContext) -> MeasureFunction:
        try:
            metrics = catalogue.find(self.metrics)
            template = Template(self.reference)
        except UserError as error:
            raise UserError(f"evaluation task {self.name!r}: {error}") from None
        examples = self.read(context)
        references = []
        for example in examples:
            with self.naming(example.number):
                references.append(_references(template, example.record))
        try:
            _options(self, context)
            _check_references(metrics, references)
        except UserError as error:
            raise UserError(f"evaluation task {self.name!r}: {error}") from None
        if self.images and context.model_reading.read_images is None:
            raise UserError(
                f"evaluation task {self.name!r} has images, and this model takes text only; load a model with an image "
                f"tower, or leave the task out"
            )
        if self.images:
            self.check_images(examples, self.images)

        def measure(model: LanguageModule) -> TaskResult:
            outputs, errors, costs = _generate(self, model, examples, context)
            everything = range(len(examples))
            scored = [Scored(m, m.rows(outputs, references), everything, references) for m in metrics]
            predictions = [
                {"input": example.prompt, "output": output, "reference": several if len(several) > 1 else several[0]}
                for example, output, several in zip(examples, outputs, references, strict=True)
            ]
            measured = result(
                self.name, scored, predictions, errors=errors, seed=context.seed, groups=groups_of(examples)
            )
            spans = {f"{self.name}/{name}": interval for name, interval in costs.items()}
            scores = measured.scores | {name: interval.value for name, interval in spans.items()}
            return measured._replace(scores=scores, intervals={**measured.intervals, **spans})

        return measure


def _references(template: Template, record: Record) -> list[str]:
    values = template.texts(record)
    if not values:
        raise UserError(f"no reference: {template.text!r} is an empty list; give at least one, or leave the record out")
    return values


def _check_references(metrics: Sequence[Metric], references: Sequence[Sequence[str]]) -> None:
    """Raises UserError if a metric cannot compare with these, before the model has run on everything."""
    for metric in metrics:
        if isinstance(metric, (*OF_LABELS, *OF_NUMBERS)):
            metric.rows(["0"] * len(references), references)


def _options(task: GenerateAndCompare, context: EvalContext) -> GenerationOptions:
    """Returns the options of a task's generation; raises UserError if they exclude each other."""
    reading = context.model_reading
    return GenerationOptions(
        task.max_new_tokens,
        stop_ids=reading.stop_ids,
        pad_id=reading.tokenizer.special_tokens.pad,
        sampler=task.sampler,
        compute=context.compute,
        suppressed_ids=reading.suppressed_ids,
        num_beams=task.num_beams,
        length_penalty=task.length_penalty,
    )


class _PromptBatch(NamedTuple):
    """Prompts that can be read.

    Attributes:
      numbers: of their examples.
      tokens: int32[T] of each.
      images: float32 of each, [I, H, W, 3]; empty without images.
    """

    numbers: list[int]
    tokens: list[np.ndarray]
    images: list[np.ndarray]


def _generate(
    task: GenerateAndCompare, model: LanguageModule, examples: Sequence[TaskExample], context: EvalContext
) -> tuple[list[str], dict[int, str], dict[str, Interval]]:
    """Returns the text that follows each prompt; the problems of prompts that cannot be read, by their numbers; costs.

    Prompts of about one length are a batch, whose images alone are in memory.
    """
    reading = context.model_reading
    options = _options(task, context)
    rows, vocab_size = context.data.rows, model.config.decoder_stack.vocab_size
    setup = GenerationSetup(
        options,
        reading.decoder_start,
        seed=derive_seed(context.seed, "draws", task.name),
        rows=rows,
        stops=table_of(task.stop, reading.tokenizer, vocab_size) if task.stop else None,
    )
    texts, errors = [""] * len(examples), {}
    prompts, new_tokens = [], []
    lengths = [len(reading.tokenizer.encode(example.prompt)) for example in examples]
    warn_beyond_context(task.name, lengths, model.config)
    for numbers in batches_by_length(lengths, rows):
        context.raise_if_stopping()
        batch, problems = _read(task, {number: examples[number] for number in numbers}, model, reading)
        errors |= problems
        images = _stacked(batch.images) if any(map(len, batch.images)) else None
        outputs = complete(model, batch.tokens, images, setup=setup, indices=batch.numbers)
        for number, output in zip(batch.numbers, outputs, strict=True):
            texts[number] = as_text(output, reading.tokenizer, task.stop, skip_special_tokens=True).text.strip()
        prompts += batch.tokens
        new_tokens += [output.length for output in outputs]
        context.advance(len(numbers), len(examples))
    costs = cost_scores(model, prompts, new_tokens, setup) if context.cost and prompts and not task.images else {}
    return texts, errors, costs


def _read(
    task: GenerateAndCompare, examples: Mapping[int, TaskExample], model: LanguageModule, reading: Reading
) -> tuple[_PromptBatch, dict[int, str]]:
    """Returns the prompts of the examples that can be read, and the problems of the others by their numbers."""
    batch, problems = _PromptBatch([], [], []), {}
    for number, example in examples.items():
        try:
            if task.images and reading.read_images is not None:
                value = example.record.get(task.images)
                several = value if isinstance(value, list | tuple) else [value]
                tokens, images = reading.read_images(example.prompt, several)
                batch.images.append(images)
            else:
                tokens = reading.tokenizer.encode(example.prompt)
        except (ValueError, OSError) as error:  # of this example alone
            problems[number] = str(error)
            continue
        batch.numbers.append(number)
        batch.tokens.append(reading.inputs(tokens, is_encoder_decoder=model.config.is_encoder_decoder))
    return batch, problems


def _stacked(images: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the images of several prompts as one array; of a prompt with fewer, zeros follow."""
    most = max(len(several) for several in images)
    return np.stack([np.pad(several, [(0, most - len(several)), (0, 0), (0, 0), (0, 0)]) for several in images])
