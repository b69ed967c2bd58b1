"""Options and outputs of the generation of text, by transformers' names."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from t5g2.api.model_inputs import check_texts, check_whole
from t5g2.core.bounds import INT32_MAX, CountOrZero, Seed, Size, checked
from t5g2.core.errors import UserError, unknown
from t5g2.eval.generation_options import BeamCount, EarlyStopping, GenerationOptions, LengthPenalty, RepetitionPenalty
from t5g2.eval.sampling import GREEDY, HeatOrZero, ProbabilityShare, Sampler, Temperature
from t5g2.models.config import LanguageModelConfig

OnLong = Literal["error", "truncate_left", "truncate_right", "skip"]
WHOLE = ("max_new_tokens", "min_new_tokens", "top_k", "seed", "num_return_sequences", "num_beams", "crops", "rows")
SAME = (
    *("min_new_tokens", "repetition_penalty", "num_return_sequences", "num_beams", "length_penalty", "early_stopping"),
    "log_probs",
)
SWITCHES = ("do_sample", "skip_special_tokens", "log_probs")
NUMBERS = ("temperature", "top_p", "length_penalty", "repetition_penalty")


@dataclass(frozen=True)
@checked
class TextOptions:
    """Options of `generate`, `outputs` and `stream`; more on those of GenerationOptions stands there.

    Attributes:
      max_new_tokens: largest number of generated tokens.
      min_new_tokens: smallest number of them before EOS.
      do_sample: True = draw tokens; None = only with a temperature above 0.
      temperature: divides the logits that are drawn from; 0 = always the likeliest token. None = with do_sample what
        generation_config.json recommends, or 1; otherwise 0.
      top_k, top_p: draw from so many tokens, and from this share of probability. None = what generation_config.json
        recommends (Gemma 3: 64 and 0.95), or all.
      sampler: a sampler instead of these.
      seed: seed of the draws; those of a prompt depend on it, on the prompt's index, and on nothing else.
      num_return_sequences: outputs of each prompt, one after the other.
      num_beams, length_penalty, early_stopping: beam search.
      repetition_penalty: of tokens that are there already; 1 = none.
      stop: strings before which an output ends, wherever the borders of tokens are.
      skip_special_tokens: leave out what the tokenizer calls special, as transformers does; False = show all, EOS too.
      crops: largest number of crops that follow a long image (pan-and-scan), announced in the prompt as in
        transformers' Gemma3Processor; 0 = none.
      rows: prompts of a batch; None = all in one. Batches are of prompts of similar lengths.
      on_long: for a prompt that is longer than the model's context: "error", or cut it on the left (after BOS) or on
        the right, or "skip" it.
      log_probs: also return the log-probability of each token (`outputs`).
    """

    max_new_tokens: Size = 64
    min_new_tokens: CountOrZero = 0
    do_sample: bool | None = None
    temperature: HeatOrZero | None = None
    top_k: CountOrZero | None = None
    top_p: ProbabilityShare | None = None
    sampler: Sampler | None = None
    seed: Seed = 0
    num_return_sequences: BeamCount = 1
    num_beams: BeamCount = 1
    length_penalty: LengthPenalty = 1.0
    early_stopping: EarlyStopping = False
    repetition_penalty: RepetitionPenalty = 1.0
    stop: Sequence[str] = ()
    skip_special_tokens: bool = True
    crops: CountOrZero = 0
    rows: Size | None = None
    on_long: OnLong = "error"
    log_probs: bool = False

    def __post_init__(self):
        if isinstance(self.stop, str):
            raise UserError(f"stop is one text, {self.stop[:40]!r}; give a list of them")
        strings = list(self.stop) if isinstance(self.stop, set | frozenset) else self.stop
        object.__setattr__(self, "stop", tuple(check_texts("stop", strings)))
        if not (self.sampler is None or isinstance(self.sampler, Sampler)):
            raise UserError(
                f"sampler is {self.sampler!r} of type {type(self.sampler).__name__}; it must be a sampler, such as "
                f"t5g2.TopK(40)"
            )
        chosen = [name for name in ("top_k", "top_p") if getattr(self, name) is not None]
        if self.sampler is not None and (chosen or self.temperature is not None or self.do_sample is not None):
            raise UserError("a sampler and temperature, top_k, top_p or do_sample are given; give one or the others")
        if self.do_sample is False and self.temperature:
            raise UserError(
                f"do_sample = False and temperature = {self.temperature}: without sampling no temperature is used; "
                f"leave one of them out"
            )
        if self.do_sample and self.temperature == 0:
            raise UserError("do_sample = True and temperature = 0, which draws nothing; give a temperature above 0")
        if chosen and not self.samples and self.sampler is None:
            raise UserError(f"{' and '.join(chosen)}: only sampling uses it; give a temperature above 0 too, such as 1")

        # checks what excludes each other, before a model is loaded
        self.generation((), 0, sampler=Temperature() if self.samples else self.sampler or GREEDY)

    def generation(
        self, stop_ids: tuple[int, ...], pad_id: int, *, sampler: Sampler, **others: Any
    ) -> GenerationOptions:
        """Returns the options of tokens alone; `others` are fields that a model knows."""
        same = {name: getattr(self, name) for name in SAME}
        return GenerationOptions(self.max_new_tokens, stop_ids, pad_id, sampler, **same, **others)

    @property
    def samples(self) -> bool:
        """True if tokens are drawn by temperature, top_k and top_p."""
        return bool(self.do_sample or self.temperature)

    @classmethod
    def of(cls, options: dict[str, Any]) -> "TextOptions":
        """Returns options given by name.

        Raises:
          UserError: there is no option of a name (nearest name), or a value is out of its range.
        """
        defaults = {field.name: field.default for field in fields(cls)}
        for name, value in options.items():
            if name not in defaults:
                raise unknown("option of generation", name, defaults)
            is_left_out = value is None and defaults[name] is None
            if name in WHOLE and not is_left_out:
                check_whole(**{name: value})
            is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if name in NUMBERS and not is_left_out and not is_number:
                raise UserError(f"{name} is {value!r} of type {type(value).__name__}; it must be a number")
            if name in SWITCHES and not is_left_out and not isinstance(value, bool | np.bool_):
                raise UserError(f"{name} is {value!r} of type {type(value).__name__}; it must be True or False")
        # numpy scalars as what they hold, because options are also compared and written
        return cls(**{name: x.item() if isinstance(x, np.generic) else x for name, x in options.items()})


def prompt_numbers(indices: Any, prompts: int) -> list[int]:
    """Returns the number of each prompt, on which its draws depend; None = 0, 1, 2, …

    Raises:
      UserError: not as many as prompts, or not all of them whole numbers of int32 from 0.
    """
    if indices is None:
        return list(range(prompts))
    array = np.asarray(indices)
    is_whole = np.issubdtype(array.dtype, np.integer) and array.shape == (prompts,)
    if prompts and not (is_whole and (array >= 0).all() and (array <= INT32_MAX).all()):
        raise UserError(
            f"indices is {str(indices)[:60]}; it must be {prompts:,} whole numbers from 0 to {INT32_MAX}, one of each "
            f"prompt"
        )
    return array.tolist()


def fit(
    token_rows: Sequence[np.ndarray],
    counts: Sequence[int],
    names: Sequence[str],
    config: LanguageModelConfig,
    options: TextOptions,
    *,
    first: int,
) -> tuple[list[np.ndarray], dict[int, str]]:
    """Returns (prompts, cut to the model's context where the options say so; by prompt, the reason to skip it).

    Args:
      token_rows: the tokens of each prompt.
      counts: the number of images of each.
      names: the names of the prompts in messages.
      first: number of tokens in front that stay when a prompt is cut (BOS).

    Raises:
      UserError: a prompt does not fit, and must not or cannot be cut; more new tokens than a decoder's context.
    """
    new_tokens, most = options.max_new_tokens, config.decoder_stack.context
    if new_tokens > most:
        raise UserError(f"max_new_tokens = {new_tokens:,} is more than the context of the decoder, {most:,}; lower it")
    if config.encoder_stack is not None:
        new_tokens, most = 0, config.encoder_stack.context
    rows, skipped = list(token_rows), {}
    for row, tokens in enumerate(rows):
        reason = excess(tokens, most, options.on_long, new_tokens, names[row])
        if reason is not None and options.on_long == "skip":
            skipped[row] = reason
        elif reason is not None and (counts[row] or new_tokens + first >= most):
            raise UserError(f"{reason}; it cannot be cut, because it has images or there is no room; shorten it")
        elif reason is not None:
            rows[row] = cut(tokens, most - new_tokens, options.on_long, first=first)
    return rows, skipped


def excess(tokens: np.ndarray, context: int, on_long: OnLong, new_tokens: int, name: str) -> str | None:
    """Returns the reason to skip a prompt; None if it fits the context, with the tokens that follow it.

    Args:
      new_tokens: tokens that share the context with the prompt.

    Raises:
      UserError: it does not fit, and on_long is "error".
    """
    if len(tokens) + new_tokens <= context:
        return None
    also = f" and max_new_tokens = {new_tokens:,} more" if new_tokens else ""
    reason = f"{name} has {len(tokens):,} tokens{also}, and the model's context is {context:,}"
    if on_long == "error":
        raise UserError(f"{reason}; shorten it, or set on_long to truncate_left, truncate_right or skip")
    return reason


def cut(tokens: np.ndarray, length: int, on_long: OnLong, *, first: int) -> np.ndarray:
    """Returns the first or the last tokens of a prompt, so many that its length is `length`.

    Args:
      first: number of tokens in front that stay in either case (BOS).
    """
    if on_long == "truncate_right":
        return tokens[:length]
    return np.concatenate([tokens[:first], tokens[len(tokens) - (length - first) :]])
