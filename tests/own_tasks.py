"""Evaluation tasks of a user's own, as a config names them by their dotted path."""

from dataclasses import dataclass

from t5g2.eval.tasks import EvalContext, MeasureFunction, Task, TaskResult


@dataclass(frozen=True)
class Constant(Task):
    """A task with one score."""

    value: float
    name: str = "constant"

    def prepare(self, context: EvalContext) -> MeasureFunction:
        return lambda model: TaskResult({"value": self.value}, [])


@dataclass(frozen=True)
class Unfinished(Task):
    """Lacks `prepare`."""

    name: str = "unfinished"
