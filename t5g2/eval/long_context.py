"""The shared part of long-context tasks: examples of a grid of lengths and depths, and their scores by both.

The tasks are RULER's (arXiv 2404.06654; needle_tasks.py, word_lists.py) and MRCR's (arXiv 2409.12640;
coreference.py).
"""

import abc
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import numpy as np
from typing_extensions import override

from t5g2.core.bounds import Bounds, Count, Seed, Size, checked
from t5g2.core.errors import UserError
from t5g2.core.seeds import derive_seed
from t5g2.data.sources.record_templates import RecordList
from t5g2.data.sources.text_source import TextSource
from t5g2.data.tokenizers.base import Tokenizer
from t5g2.eval.generate_and_compare import GenerateAndCompare
from t5g2.eval.haystack import largest_size, running_words
from t5g2.eval.metrics.intervals import intervals
from t5g2.eval.metrics.metric import NamedMeans
from t5g2.eval.metrics.string_match import AnswerMetric, StringMatch
from t5g2.eval.task_interface import EvalContext, MeasureFunction, Task, TaskResult

BOS = 1


class Cell(NamedTuple):
    """Place of an example in the grid.

    Attributes:
      length: tokens of BOS, prompt and answer.
      depth: number of the depth; 0 where there are none.
      example: number within the cell.
      seed: seed of all that is drawn.
    """

    length: int
    depth: int
    example: int
    seed: int

    def draw(self) -> np.random.Generator:
        """Returns the generator of everything that is drawn: the same numbers from the start, each time."""
        return np.random.default_rng(derive_seed(self.seed, "example"))


class LongExample(NamedTuple):
    """A prompt with what is expected.

    Attributes:
      prompt: the text that the model reads.
      answers: what is expected of the output.
      depths: percent of the haystack before each answer; empty if an answer has no place.
    """

    prompt: str
    answers: tuple[str, ...]
    depths: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
@checked
class LongContextTask(Task):
    """A task whose examples have given lengths in tokens of the model, with what is asked for at given depths.

    A prompt is as long as BOS and `max_new_tokens` leave room for, to less than one unit of its haystack (a word, a
    line, an item of a list with its repeats), and never longer. Lengths beyond the model's own are allowed. Examples
    depend on the settings of the task, its text and the tokenizer alone.

    Scores are 0 to 1: `<name>/<metric>` over all examples, `<name>/<length>`, and `<name>/<length>/<depth>` over the
    answers at that depth. A prediction has `length`, `tokens` (of the prompt, without BOS) and `depth` of each answer.

    Attributes:
      name: prefix of the scores.
      text: text of the haystack.
      lengths: numbers of tokens of BOS, prompt and room for the answer.
      depths: places of what is asked for, in percent of the haystack.
      examples: number of examples of a length and depth.
      seed: seed of the examples.
      max_new_tokens: largest number of tokens of an output.
    """

    name: str
    text: TextSource | None = None
    lengths: tuple[Size, ...] = (1024, 2048, 4096, 8192)
    depths: tuple[Annotated[int, Bounds(least=0, most=100)], ...] = (0, 25, 50, 75, 100)
    examples: Count = 4
    seed: Seed = 0
    max_new_tokens: Size = 128

    def __post_init__(self):
        if "/" in self.name or not self.name:
            raise UserError(f"name = {self.name!r}; a task has a name, without / in it")
        for field in ("lengths", "depths"):
            values = getattr(self, field)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{field} = {values}; give at least one, and none of them twice")

    @property
    def metric(self) -> AnswerMetric:
        """The metric of the task."""
        return StringMatch()

    @property
    def has_depths(self) -> bool:
        """True if what is asked for has a place in the haystack."""
        return True

    @property
    def needs_text(self) -> bool:
        """True if examples are made of `text`."""
        return True

    @property
    def least(self) -> int:
        """The smallest size of a haystack."""
        return 0

    @abc.abstractmethod
    def compose(self, size: int, cell: Cell, words: Sequence[str]) -> LongExample:
        """Returns the example of a cell with a haystack of so many units, always the same.

        Args:
          words: running words of the text, as many as the length has tokens; none if no text is needed.

        Raises:
          UserError: the text does not have what is needed.
        """

    def example(self, cell: Cell, words: Sequence[str], tokenizer: Tokenizer) -> LongExample:
        """Returns the example of a cell at its length.

        Raises:
          UserError: the length is too short for any example, or the output for its answer.
        """
        compose = partial(self.compose, cell=cell, words=words)

        def tokens(size: int) -> int:
            return len(tokenizer.encode(compose(size).prompt))

        room = cell.length - BOS - self.max_new_tokens
        size = largest_size(tokens, room, least=self.least, most=len(words) or cell.length)
        if size is None:
            shortest = tokens(self.least) + BOS + self.max_new_tokens
            raise UserError(
                f"length {cell.length}: the shortest example has {shortest} tokens with BOS and room for the answer "
                f"(max_new_tokens = {self.max_new_tokens}); give at least {shortest}, or lower max_new_tokens"
            )
        example = compose(size)
        answer = sum(len(tokenizer.encode(answer)) for answer in example.answers)
        if answer > self.max_new_tokens:
            raise UserError(
                f"max_new_tokens = {self.max_new_tokens}, and the answer of an example has {answer} tokens: no output "
                f"could be right; give more"
            )
        return example

    def cells(self) -> list[Cell]:
        """Returns the places of all examples."""
        depths = range(len(self.depths)) if self.has_depths else range(1)
        places = [(n, d, e) for n in self.lengths for d in depths for e in range(self.examples)]
        return [
            Cell(length, depth, number, derive_seed(self.seed, type(self).__name__, length, depth, number))
            for length, depth, number in places
        ]

    @override
    def prepare(self, context: EvalContext) -> MeasureFunction:
        tokenizer = context.model_reading.tokenizer
        cells = self.cells()
        try:
            examples = self._examples(cells, tokenizer)
        except UserError as error:
            raise UserError(f"evaluation task {self.name!r}: {error}") from None
        records = tuple({"prompt": example.prompt, "answers": list(example.answers)} for example in examples)
        generate = GenerateAndCompare(
            data=RecordList(records),
            name=self.name,
            template="{prompt}",
            reference="{answers}",
            metrics=(self.metric,),
            max_new_tokens=self.max_new_tokens,
        ).prepare(context)
        counts = [len(tokenizer.encode(example.prompt)) for example in examples]

        def measure(model: Any) -> TaskResult:
            result = generate(model)
            predictions = [
                {"task": self.name, "length": cell.length, "tokens": count}
                | ({"depth": list(example.depths)} if example.depths else {})
                | prediction
                for cell, count, example, prediction in zip(cells, counts, examples, result.predictions, strict=True)
            ]
            by_cell = self._by_cell(cells, examples, [str(prediction["output"]) for prediction in result.predictions])
            spans = dict(result.intervals)
            for name, values in by_cell.items():
                rows = np.array(values, np.float64)[:, None]
                spans |= intervals(NamedMeans((name,)), rows, seed=context.seed)
            scores = result.scores | {name: spans[name].value for name in by_cell}
            return TaskResult(scores, predictions, spans, result.signatures)

        return measure

    def _examples(self, cells: Sequence[Cell], tokenizer: Tokenizer) -> list[LongExample]:
        if not self.needs_text:
            return [self.example(cell, (), tokenizer) for cell in cells]
        if self.text is None:
            raise UserError('text is missing; give a source of text for the haystack, such as TextFiles("books/*.txt")')
        documents = self.text.open()
        if not len(documents):
            raise UserError(f"there is no text in {self.text}; give a source, or a split of it, that has some")
        return [self.example(cell, running_words(documents, cell.length, seed=cell.seed), tokenizer) for cell in cells]

    def _by_cell(
        self, cells: Sequence[Cell], examples: Sequence[LongExample], outputs: Sequence[str]
    ) -> dict[str, list[float]]:
        """Returns the values of which each length's, and each length and depth's, score is the mean."""
        lengths, places = defaultdict(list), defaultdict(list)
        for cell, example, output in zip(cells, examples, outputs, strict=True):
            values = self.metric.of_answers(output, example.answers)
            lengths[f"{self.name}/{cell.length}"].append(float(np.mean(values)))
            for depth, value in zip(example.depths, values):
                places[f"{self.name}/{cell.length}/{depth}"].append(value)
        return lengths | dict(sorted(places.items(), key=lambda item: [int(n) for n in item[0].split("/")[1:]]))
