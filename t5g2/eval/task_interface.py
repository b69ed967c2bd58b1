"""The interface of evaluation tasks: a task is prepared once and then run on any weights of the model."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from jax.sharding import Mesh

from t5g2.core.bounds import Seed, TokenId, checked
from t5g2.data.config import DataConfig
from t5g2.eval.likelihood import Scoring
from t5g2.eval.metrics.intervals import Interval
from t5g2.eval.reading import Reading
from t5g2.models.layers import Compute
from t5g2.models.loss_config import LossConfig


@dataclass(frozen=True)
@checked
class EvalContext:
    """Settings that the tasks of a run share.

    Attributes:
      data: the run's data; a task takes tokenizer, lengths, rows and packing from it, and has its own text.
      seed: seed of everything that is drawn.
      compute: dtype and attention backend of the forward pass.
      loss: settings of the loss; a teacher is not used.
      mesh: devices of the weights; None = one device.
      rows: the rows of a batch that this process holds, in order; None = all.
      stopping: asked before every batch; true = raise EvaluationStopped. On several processes all get one answer.
      stop_ids: tokens that end a generated text beside the tokenizer's EOS: those of the weights that a run began with
        (instruction-tuned models end a turn otherwise).
      reading: how the model reads texts; None = as the objectives train it.
      cost: tasks that generate also measure FLOPs and latency of their queries (generation_cost.py).
      advance: called after each batch of a task with the number of its examples, and with that of all.
    """

    data: DataConfig
    seed: Seed = 0
    compute: Compute = Compute()
    loss: LossConfig = LossConfig()
    mesh: Mesh | None = None
    rows: Sequence[int] | None = None
    stopping: Callable[[], object] = bool
    stop_ids: tuple[TokenId, ...] = ()
    reading: Reading | None = None
    cost: bool = False
    advance: Callable[[int, int], object] = max

    @property
    def model_reading(self) -> Reading:
        """Settings with which the model reads texts."""
        return self.reading or Reading.trained(self.data.tokenizer, self.stop_ids)

    def scoring(self) -> Scoring:
        """Returns the settings of log-likelihoods."""

        def advance(examples: int, total: int) -> None:
            self.raise_if_stopping()
            self.advance(examples, total)

        return Scoring(
            self.model_reading,
            rows=self.data.rows,
            compute=self.compute,
            loss=dataclasses.replace(self.loss, distillation=None),
            mesh=self.mesh,
            advance=advance,
        )

    def raise_if_stopping(self) -> None:
        """Raises EvaluationStopped if the run is asked to stop."""
        if self.stopping():
            raise EvaluationStopped


class EvaluationStopped(Exception):
    """Raised between two batches of an evaluation that is asked to stop; there is no result."""


class TaskResult(NamedTuple):
    """Result of a task.

    Attributes:
      scores: by name.
      predictions: outputs of the model as plain data for JSON.
      intervals: of the scores that have one, by the name of the score.
      signatures: settings and versions of the libraries that computed scores, by the name of the score.
    """

    scores: dict[str, float]
    predictions: list[dict[str, Any]]
    intervals: Mapping[str, Interval] = MappingProxyType({})
    signatures: Mapping[str, str] = MappingProxyType({})


# of a language model or a dual encoder
MeasureFunction = Callable[[Any], TaskResult]


class Task(abc.ABC):
    """Evaluation task; its `name`, unique in a run, is the prefix of its scores and stands in its predictions."""

    name: str

    @abc.abstractmethod
    def prepare(self, context: EvalContext) -> MeasureFunction:
        """Returns the function that measures a model, after the work that does not depend on the weights.

        Raises:
          UserError: the text cannot be read, or does not fit the context.
        """
