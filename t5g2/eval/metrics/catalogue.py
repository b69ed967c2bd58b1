"""Every metric of outputs by its name."""

from collections.abc import Mapping, Sequence

from t5g2.core.errors import UserError, unknown
from t5g2.core.optional import require
from t5g2.core.own_classes import OpenTable
from t5g2.eval.metrics.labels import EXTRA, F1, Accuracy, Matthews, Pearson, RocAuc, Spearman
from t5g2.eval.metrics.metric import Metric
from t5g2.eval.metrics.similarity import Bleu, Chrf, ExactMatch, Rouge, TokenF1
from t5g2.eval.metrics.string_match import PrefixedSimilarity, StringMatch
from t5g2.eval.metrics.vqa import VqaAccuracy

BY_NAME: Mapping[str, Metric] = {
    "exact_match": ExactMatch(),
    "token_f1": TokenF1(),
    "rouge": Rouge(),
    "bleu": Bleu(),
    "chrf": Chrf(),
    "chrf++": Chrf(word_order=2),
    "accuracy": Accuracy(),
    "f1": F1(),
    "mcc": Matthews(),
    "pearson": Pearson(),
    "spearman": Spearman(),
    "auc": RocAuc(),
    "vqa_accuracy": VqaAccuracy(),
    "string_match": StringMatch(),
    "prefixed_similarity": PrefixedSimilarity(),
}
# with settings, in a config: {"kind": "bleu", "tokenize": "zh"}
KINDS = OpenTable(
    Metric,
    {
        "exact_match": ExactMatch,
        "token_f1": TokenF1,
        "rouge": Rouge,
        "bleu": Bleu,
        "chrf": Chrf,
        "accuracy": Accuracy,
        "f1": F1,
        "mcc": Matthews,
        "pearson": Pearson,
        "spearman": Spearman,
        "auc": RocAuc,
        "vqa_accuracy": VqaAccuracy,
        "string_match": StringMatch,
        "prefixed_similarity": PrefixedSimilarity,
    },
)
LIBRARIES: Mapping[type, str] = {
    Rouge: "rouge_score",
    Bleu: "sacrebleu",
    Chrf: "sacrebleu",
    F1: "sklearn",
    Matthews: "sklearn",
    RocAuc: "sklearn",
}


def find(metrics: Sequence[str | Metric]) -> tuple[Metric, ...]:
    """Returns the metrics of these names; a metric with other settings, or of the user's own, stands for itself.

    Raises:
      UserError: there is no metric of a name; the library that computes one is not installed; two have one score.
    """
    chosen = tuple(_find(metric) for metric in metrics)
    names = [name for metric in chosen for name in metric.names]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"metrics give {', '.join(twice)} twice; name each metric once")
    return chosen


def _find(metric: str | Metric) -> Metric:
    if isinstance(metric, str):
        if metric not in BY_NAME:
            raise unknown("metric", metric, BY_NAME)
        metric = BY_NAME[metric]
    # asked for before a model has been run on everything
    if type(metric) in LIBRARIES:
        require(LIBRARIES[type(metric)], EXTRA)
    if isinstance(metric, Bleu):
        metric.check()
    return metric
