"""The scores and predictions of an evaluation as one page that loads no other file."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from t5g2.report import plots
from t5g2.report.markup import Html, document, figure, html_table, tag
from t5g2.report.text_table import NONE, TextTable

# predictions of a task that the page shows; predictions.jsonl has all
MOST = 50
# of a longer text the page shows both ends
LONGEST_CHARACTERS = 2000


def table(scores: Mapping[str, Mapping[str, Any]]) -> TextTable:
    """Returns the scores with their intervals and numbers of examples."""
    rows = [
        [name, _number(score["value"]), _interval(score.get("interval")), str(score.get("examples", NONE))]
        for name, score in scores.items()
    ]
    return TextTable(["score", "value", "95% interval", "examples"], rows)


def render(model: str, scores: Mapping[str, Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]) -> str:
    """Returns the page.

    Args:
      model: the folder of the model, for the heading.
      scores: {"value", "examples", "interval", "signature"} by name, of which the first alone is always there.
      predictions: of all tasks, each with the name of its task.
    """
    signatures = sorted({score["signature"] for score in scores.values() if score.get("signature")})
    parts = [
        tag("h1", "Evaluation"),
        tag("p", f"Of {model}.", kind="quiet"),
        html_table(table(scores)),
        tag(
            "p",
            "Intervals are of 1000 resamples of the examples: with other examples of the same kind the score would be "
            "within, 95 times of 100. Where all were wrong, or all right, they are Clopper and Pearson's.",
            kind="quiet",
        ),
        *(tag("p", signature, kind="quiet") for signature in signatures),
    ]
    for task, several in groupby(predictions, key=lambda prediction: prediction["task"]):
        parts += _predictions(task, list(several), scores)
    return document("Evaluation", tag("main", *parts))


def _predictions(
    task: str, predictions: Sequence[Mapping[str, Any]], scores: Mapping[str, Mapping[str, Any]]
) -> list[Html]:
    number = f"The first {MOST} of {len(predictions)}" if len(predictions) > MOST else f"All {len(predictions)}"
    return [
        tag("h2", task),
        *heat_map(task, predictions, scores),
        tag("p", f"{number} predictions.", kind="quiet"),
        *(_prediction(prediction) for prediction in predictions[:MOST]),
    ]


def heat_map(
    task: str, predictions: Sequence[Mapping[str, Any]], scores: Mapping[str, Mapping[str, Any]]
) -> list[Html]:
    """Returns the scores of a long-context task by length and depth as a picture; nothing for other tasks."""
    # a task of one's own may call something else a length
    lengths = sorted({p["length"] for p in predictions if f"{task}/{p.get('length')}" in scores})
    if not lengths:
        return []
    depths = sorted({depth for prediction in predictions for depth in prediction.get("depth", ())})
    names = [[f"{task}/{length}/{depth}" for length in lengths] for depth in depths]
    rows = [f"{depth}%" for depth in depths]
    whole = [f"{task}/{length}" for length in lengths]
    values = [[_value(scores, name) for name in row] for row in [*names, whole]]
    svg = plots.heat_map(values, columns=[f"{length:,}" for length in lengths], rows=[*rows, "all"])
    caption = "Score, 0 to 1, by length in tokens (BOS, prompt and room for the answer)"
    return [figure(svg, f"{caption} and by depth of what is asked for." if depths else f"{caption}.")]


def _value(scores: Mapping[str, Mapping[str, Any]], name: str) -> float:
    value = scores.get(name, {}).get("value")
    return math.nan if value is None else value


def _prediction(prediction: Mapping[str, Any]) -> Html:
    cells = []
    for name, value in prediction.items():
        if name != "task" and value not in ("", None):
            cells += [tag("div", name.replace("_", " "), kind="who"), tag("div", _text(value), kind="text")]
    return tag("div", *cells, kind="sample")


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "  ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "\n".join(map(_text, value))
    if isinstance(value, str) and len(value) > LONGEST_CHARACTERS:
        half = LONGEST_CHARACTERS // 2
        return f"{value[:half]} […{len(value) - 2 * half:,} characters…] {value[-half:]}"
    return _number(value) if isinstance(value, float) else NONE if value is None else str(value)


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _interval(interval: Sequence[float | None] | None) -> str:
    return NONE if interval is None else f"{_number(interval[0])} to {_number(interval[1])}"
