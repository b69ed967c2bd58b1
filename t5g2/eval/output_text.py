"""The text of a generated output: up to a stop string, with or without special tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from t5g2.data.tokenizers.base import Tokenizer
from t5g2.eval.generation import Output
from t5g2.eval.stop_strings import first_stop, without_begun_stop


class TextOutput(NamedTuple):
    """An output.

    Attributes:
      text: the text before a stop string, if any.
      tokens: int32, its tokens, without EOS.
      log_probs: float32, natural log-probability of each token in the model's own distribution, and of EOS if it ends
        the output; None unless asked for.
      score: what beams are ranked by: the sum of the log-probabilities / number of tokens ** length_penalty; None
        without beam search.
      skipped: the reason for which nothing was generated; None = the output is there.
    """

    text: str
    tokens: np.ndarray
    log_probs: np.ndarray | None = None
    score: float | None = None
    skipped: str | None = None


def as_text(output: Output, tokenizer: Tokenizer, stop: Sequence[str], *, skip_special_tokens: bool) -> TextOutput:
    """Returns an output as text, up to the first of the stop strings.

    Args:
      stop: strings; they are looked for where special tokens are spelled, and in the text that is returned.
    """
    tokens, rest, log_probs = output.tokens, "", output.log_probs
    is_end_shown = output.stop_token is not None and not skip_special_tokens
    text = tokenizer.decode([*tokens, output.stop_token] if is_end_shown else tokens)
    end = first_stop(text, stop)
    if end is not None:
        whole = len(tokens)
        while len(before := tokenizer.decode(tokens[:whole])) > end:
            whole -= 1
        # the part before the stop string of a token that has its beginning, unless that token is left out
        if tokenizer.decode(tokens[whole : whole + 1], skip_special_tokens=skip_special_tokens):
            rest = text[len(before) : end]
        kept = whole + bool(rest)
        tokens, log_probs = tokens[:kept], None if log_probs is None else log_probs[:kept]
        text = tokenizer.decode(tokens[:whole], skip_special_tokens=skip_special_tokens) + rest
    elif skip_special_tokens:
        text = tokenizer.decode(tokens, skip_special_tokens=True)
    # where a special token was left out, the parts beside it may be a stop string together
    return TextOutput(text[: first_stop(text, stop)], tokens, log_probs, output.score)


def text_so_far(output: Output, tokenizer: Tokenizer, stop: Sequence[str], *, skip_special_tokens: bool) -> str:
    """Returns the text of an unfinished output that stays as it is, whatever follows."""
    settled = output._replace(tokens=output.tokens[: tokenizer.settled(output.tokens.tolist())])
    text = as_text(settled, tokenizer, stop, skip_special_tokens=skip_special_tokens).text
    # a character may be made of several tokens, and a stop string may have begun
    return without_begun_stop(text.rstrip("\ufffd"), stop)
