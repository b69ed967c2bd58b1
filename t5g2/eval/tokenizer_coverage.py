"""Coverage of texts by the model's tokenizer: bytes per token, and the shares of unknown and of single-byte tokens.

N texts, K numbers of a text, M scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from typing_extensions import override

from t5g2.core.bounds import checked
from t5g2.data.tokenizers.base import Tokenizer
from t5g2.eval.metrics.metric import Contributions, ExampleCounts, Metric
from t5g2.eval.record_task import RecordTask, Scored, groups_of, result
from t5g2.eval.task_interface import EvalContext, MeasureFunction, TaskResult


@dataclass(frozen=True)
class TokenCoverage(Metric):
    """Ratios of sums over texts. A row is the bytes, tokens, unknown tokens and single-byte tokens of a text."""

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return ("bytes_per_token", "unknown", "single_bytes")

    @override
    def rows(self, outputs: Sequence[Any], references: Sequence[Sequence[Any]]) -> Contributions:
        """Returns the outputs, which are rows already; there are no references."""
        return np.array(outputs, np.float64).reshape(-1, 4)

    @override
    def scores(self, rows_NK: Contributions, counts_N: ExampleCounts) -> Float[np.ndarray, " M"]:
        text_bytes, tokens, unknown, single_bytes = counts_N @ rows_NK
        return np.array([text_bytes, unknown, single_bytes]) / max(tokens, 1)


@dataclass(frozen=True, kw_only=True)
@checked
class TokenizerCoverage(RecordTask):
    """Counts the tokens of texts, such as of many languages by `group`; the weights do not matter.

    `<name>/bytes_per_token` is bytes of UTF-8 by tokens, `<name>/unknown` the share of unknown tokens (0 to 1), and
    `<name>/single_bytes` that of tokens which stand for one byte where the tokenizer has no piece (of a tokenizer of
    bytes, 1).
    """

    template: str = "{text}"

    @override
    def prepare(self, context: EvalContext) -> MeasureFunction:
        examples, tokenizer = self.read(context), context.model_reading.tokenizer
        metric = TokenCoverage()
        rows = metric.rows([counts(example.prompt, tokenizer) for example in examples], ())
        predictions = [{"input": example.prompt} for example in examples]

        def measure(model: Any) -> TaskResult:
            del model
            scored = [Scored(metric, rows, range(len(examples)))]
            groups = groups_of(examples)
            return result(self.name, scored, predictions, errors={}, seed=context.seed, groups=groups)

        return measure


def counts(text: str, tokenizer: Tokenizer) -> tuple[int, int, int, int]:
    """Returns the bytes of a text, its tokens, and of these the unknown ones and those of a single byte."""
    tokens, special_tokens = tokenizer.encode_plain(text), tokenizer.special_tokens
    single = 0
    if special_tokens.first_byte is not None:
        byte = tokens - special_tokens.first_byte
        single = int(np.count_nonzero((byte >= 0) & (byte < 256)))
    return len(text.encode()), len(tokens), int(np.count_nonzero(tokens == special_tokens.unk)), single
