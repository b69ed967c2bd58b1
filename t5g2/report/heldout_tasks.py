"""Held-out tasks as experiment.json has them: which texts a loss is of, and which of their tokens.

Runs may give one name to different tasks. A loss of a whole text is no loss of its second half, so the report
subtracts only losses of equal tasks.
"""

from collections.abc import Mapping
from typing import Any

ANOTHER_TASK = "another task"


def asked(experiment: Mapping[str, Any] | None, metric: str) -> dict[str, Any] | None:
    """Returns what a metric, eval/TASK/…, was asked of; None = experiment.json has no such task.

    Scores of `t5g2 evaluate` are of a file of tasks, and not of a run's own.
    """
    kind, _, rest = metric.partition("/")
    name, sections = rest.partition("/")[0], experiment or {}
    evaluations, data = _object(sections.get("eval")), _object(sections.get("data"))
    tasks = evaluations.get("tasks")
    for task in map(_object, tasks if kind == "eval" and isinstance(tasks, list) else ()):
        if task.get("name") == name:
            rest_of_task = {key: value for key, value in task.items() if key not in ("name", "objective")}
            chunk = {"chunk_tokens": data["chunk_tokens"]} if "chunk_tokens" in data else {}
            # a task of an earlier version has no `encoder`, which it saw
            return {"encoder": "visible"} | rest_of_task | chunk | scored_tokens(_object(task.get("objective")))
    return None


def equal(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """True if two tasks agree in all settings that both have, or one is not recorded; versions add settings."""
    if one is None or other is None:
        return True
    return all(one[key] == other[key] for key in one.keys() & other.keys())


def scored_tokens(objective: Mapping[str, Any]) -> dict[str, Any]:
    """Returns which tokens of a chunk an objective scores: the share of those at its end, or else the objective.

    {"kind": "causal", "context": 0.25}, {"kind": "prefix_lm", "prefix": 0.25} and {"kind": "ul2"} with a suffix of rate
    0.75 alone score the same ones, but for one of a chunk that does not divide evenly:

        {"scores": "the end", "share": 0.75}
    """
    by_token = objective.get("split_at", "token") == "token"  # earlier versions had no other
    match objective:
        case {"kind": "causal", "context": int() | float() as before}:
            share = 1.0 - before
        case {"kind": "prefix_lm" | "prefix_lm_decoder", "prefix": int() | float() as before} if by_token:
            share = 1.0 - before
        case {"kind": "ul2", "tasks": [{"rate": int() | float() as rate, "mean_span": None}]}:
            share = float(rate)
        case _:
            return {"scores": objective.get("kind"), **{f"objective.{key}": objective[key] for key in objective}}
    eos = {"objective.eos": objective["eos"]} if "eos" in objective else {}
    return {"scores": "the end", "share": round(share, 9), **eos}  # 1 - 0.7 is not 0.3


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
