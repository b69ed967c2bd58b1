"""Retrieval among texts: those that belong to a query, and the query of a text, by the embeddings of a language model.

N queries, M texts, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from typing_extensions import override

from t5g2.core.bounds import Count, checked
from t5g2.core.errors import UserError
from t5g2.data.sources.record_templates import Template
from t5g2.eval import text_embeddings, zero_shot
from t5g2.eval.generation import LanguageModule
from t5g2.eval.metrics.metric import NamedMeans
from t5g2.eval.reading import warn_beyond_context
from t5g2.eval.record_task import RecordTask, Scored, groups_of, result
from t5g2.eval.task_interface import EvalContext, MeasureFunction, TaskResult
from t5g2.eval.text_embeddings import Pooling


@dataclass(frozen=True, kw_only=True)
@checked
class TextRetrieval(RecordTask):
    """Retrieval of the texts of a query, and of the query of a text, among those of all records, by cosine.

    `<name>/query_to_text@k` and `<name>/text_to_query@k` are the shares with a right candidate among the first k
    (eval/zero_shot.py, retrieve); embeddings are those of `model.embed` (eval/text_embeddings.py).

    Attributes:
      template: the query.
      texts: template of the text of a query; a field that holds a list, "{answers}", has several.
      ks: the numbers k.
      pooling: of the states of a text: "mean", "first" or "last".
    """

    texts: str
    ks: tuple[Count, ...] = (1, 5, 10)
    pooling: Pooling = "mean"

    @override
    def prepare(self, context: EvalContext) -> MeasureFunction:
        examples, texts = self.read(context), []
        for example in examples:
            with self.naming(example.number):
                texts.append(Template(self.texts).texts(example.record))
        owners = [number for number, several in enumerate(texts) for _ in several]
        if not owners:
            raise UserError(f"evaluation task {self.name!r}: no reference: no record has a text at {self.texts!r}")

        def measure(model: LanguageModule) -> TaskResult:
            queries_ND = self._embeddings(model, [example.prompt for example in examples], context)
            texts_MD = self._embeddings(model, [text for several in texts for text in several], context)
            by_query, by_text = zero_shot.ranks(queries_ND, texts_MD, owners)
            scored = []
            for direction, ranks in (("query_to_text", by_query), ("text_to_query", by_text)):
                metric = NamedMeans(tuple(f"{direction}@{k}" for k in self.ks))
                # texts are no examples of their own, so only queries have scores of their own
                numbers = np.flatnonzero(by_query).tolist() if ranks is by_query else []
                scored.append(Scored(metric, zero_shot.found_within(ranks, self.ks), numbers))
            predictions = [
                {"input": example.prompt, "reference": several, "rank": rank}
                for example, several, rank in zip(examples, texts, by_query.tolist(), strict=True)
            ]
            return result(self.name, scored, predictions, errors={}, seed=context.seed, groups=groups_of(examples))

        return measure

    def _embeddings(
        self, model: LanguageModule, texts: Sequence[str], context: EvalContext
    ) -> Float[np.ndarray, "M D"]:
        context.raise_if_stopping()
        reading, is_encoder_decoder = context.model_reading, model.config.is_encoder_decoder
        rows = [reading.inputs(reading.tokenizer.encode(t), is_encoder_decoder=is_encoder_decoder) for t in texts]
        warn_beyond_context(self.name, [len(tokens) for tokens in rows], model.config)
        pad = reading.tokenizer.special_tokens.pad
        return text_embeddings.embed(
            model, rows, pooling=self.pooling, rows=context.data.rows, pad=pad, compute=context.compute
        )
