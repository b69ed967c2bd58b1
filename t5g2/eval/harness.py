"""A model for lm-evaluation-harness (EleutherAI; extra `harness`): log-likelihoods and texts of a language model.

Requests are read as the harness's transformers backend reads them (lm_eval 0.4.13, lm_eval/models/huggingface.py), so
that scores are the same:

- A text begins with BOS if the model reads one, and `loglikelihood_rolling` predicts that BOS too, after another.
- What does not fit the context is cut on the left, BOS included, and the log tells how much.
- Stop strings end an output, and are cut off where special tokens are left out.

An encoder-decoder reads the context of a request with its encoder, and the continuation is its decoder's. There the
backend gives more tokens than `max_gen_toks`, because it counts those of the encoder; this does not.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from jax.sharding import Mesh

from t5g2.core.bounds import Seed, Size, checked
from t5g2.core.errors import UserError, unknown
from t5g2.core.logs import TaskProgress, log
from t5g2.core.optional import require
from t5g2.eval.generation import GenerationSetup, LanguageModule, batches_by_length, complete
from t5g2.eval.generation_options import GenerationOptions
from t5g2.eval.likelihood import Likelihood, Scoring, TokenPair, encode_pair, score_tokens, token_windows
from t5g2.eval.output_text import as_text
from t5g2.eval.reading import Reading
from t5g2.eval.sampling import GREEDY, Sampler, Sampling
from t5g2.eval.stop_strings import table_of
from t5g2.models.layers import Compute

_lm: Any = require("lm_eval.api.model", "harness")
_rules: Any = require("lm_eval.models.utils", "harness")

# options of a task's generation_kwargs beside the harness's own: transformers' names
SHARED = ("min_new_tokens", "repetition_penalty", "num_beams", "length_penalty", "early_stopping")
SAMPLING = ("temperature", "top_k", "top_p")
OWN = ("until", "do_sample", "max_gen_toks")


def sampling(temperature: float, top_k: int | None, top_p: float | None) -> Sampler:
    """Returns the sampler of a request; 0 and 1 are transformers' spelling of "off"."""
    return Sampling(temperature, top_k or None, None if top_p == 1 else top_p)


@dataclass(frozen=True)
@checked
class HarnessOptions:
    """Settings of a HarnessModel.

    Attributes:
      rows: rows of a batch.
      seed: seed of samples; those of a request depend on it and on the request's number.
      max_length: largest number of tokens that encoder and decoder read; None = the context of each.
      compute: dtype and attention backend of the forward pass.
      mesh: devices of the weights, set by the caller; None = one device.
      sampler: the sampler of (temperature, top_k, top_p), each None unless the request has it.
    """

    rows: Size = 8
    seed: Seed = 0
    max_length: Size | None = None
    compute: Compute = field(default_factory=Compute)
    mesh: Mesh | None = None
    sampler: Callable[[float, int | None, float | None], Sampler] = sampling


class HarnessModel(_lm.LM):
    """A language model as lm-evaluation-harness asks it; `lm_eval.simple_evaluate(model=…)` takes it.

    Args:
      model: the weights, decoder-only or encoder-decoder.
      reading: how the model reads texts.
      options: batches, draws and dtype.
    """

    def __init__(self, model: LanguageModule, reading: Reading, options: HarnessOptions = HarnessOptions()):
        super().__init__()
        self._model, self._reading, self._options = model, reading, options

    @property
    def max_length(self) -> int:
        """Largest number of tokens that the decoder reads."""
        return self._options.max_length or self._model.config.decoder_stack.context

    @property
    def eot_token_id(self) -> int:
        """The id of EOS."""
        return self._reading.tokenizer.special_tokens.eos

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns (log-likelihood in nats, is greedy) of each request's (context, continuation)."""
        pairs = [self._pair(*request.args) for request in requests]
        cut = _Cut("contexts")
        scores = self._score([self._fitted(pair, cut) for pair in pairs], "loglikelihood", disable_tqdm)
        cut.tell(len(pairs))
        return [(score.sum, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood in nats of each request's (text,), long ones in windows of `max_length` tokens."""
        windows = [self._windows(text) for (text,) in (request.args for request in requests)]
        cut = _Cut("windows")
        pairs = [self._fitted(pair, cut) for several in windows for pair in several]
        scores = iter(self._score(pairs, "loglikelihood_rolling", disable_tqdm))
        cut.tell(len(pairs))
        return [sum(next(scores).sum for _ in several) for several in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the text that follows each request's (context, generation_kwargs), up to the first stop string."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            if len(request.args) > 2:
                raise UserError(
                    f"harness task {request.task_name!r} has images or sounds, and this model class reads text only; "
                    f"leave the task out"
                )
            # requests with the same settings are generated together
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        texts = [""] * len(requests)
        with TaskProgress("generate_until") as progress:
            advance = max if disable_tqdm else progress.advance
            for numbers in groups.values():
                first = requests[numbers[0]]
                settings = _Generation.of(first.args[1], where=f"of harness task {first.task_name!r}")
                prompts = {number: requests[number].args[0] for number in numbers}
                for number, text in self._generate(prompts, settings):
                    texts[number] = text
                    advance(1, len(requests))
        return texts

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns None, no chat template; raises UserError if one is asked for."""
        return self.apply_chat_template([]) if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Any], add_generation_prompt: bool = True) -> NoReturn:
        """Raises UserError: this class applies none."""
        raise UserError("chat templates are not applied by this model class; leave --apply_chat_template out")

    @property
    def _reads_bos(self) -> bool:
        return self._reading.encoder_bos or not self._model.config.is_encoder_decoder

    @property
    def _encoder_room(self) -> int | None:
        encoder = self._model.config.encoder_stack
        return None if encoder is None else self._options.max_length or encoder.context

    def _pair(self, context: str, continuation: str) -> TokenPair:
        pair = encode_pair(
            self._reading, context, continuation, is_encoder_decoder=self._model.config.is_encoder_decoder
        )
        # without a context, BOS at the beginning of the continuation is the context
        if not context and len(pair.continuation) and pair.continuation[0] == self._reading.bos:
            return TokenPair(pair.continuation[:1], pair.continuation[1:])
        return pair

    def _windows(self, text: str) -> list[TokenPair]:
        tokens = self._reading.tokenizer.encode(text)
        if self._reads_bos:
            tokens = self._reading.inputs(tokens, is_encoder_decoder=False)
        return token_windows(tokens, self._reading.bos, self.max_length)

    def _fitted(self, pair: TokenPair, cut: "_Cut") -> TokenPair:
        """Returns a pair whose context is cut on the left as far as the model's context demands."""
        context, continuation = pair
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation has {len(continuation):,} tokens, and the model's context is {self.max_length:,}; "
                f"leave the task out, or take a model with a longer context"
            )
        # of a decoder-only model, the last token of the continuation is predicted, not read
        room = self._encoder_room or self.max_length + 1 - len(continuation)
        return TokenPair(cut.left(context, room), continuation)

    def _score(self, pairs: Sequence[TokenPair], name: str, quiet: bool) -> list[Likelihood]:
        with TaskProgress(name) as progress:
            scoring = Scoring(
                self._reading,
                rows=self._options.rows,
                compute=self._options.compute,
                mesh=self._options.mesh,
                advance=max if quiet else progress.advance,
            )
            return score_tokens(self._model, pairs, scoring=scoring)

    def _generate(self, prompts: Mapping[int, str], settings: "_Generation") -> Any:
        """Yields (number, text) of each prompt, batches of one padded length after each other."""
        reading, options, config = self._reading, self._options, self._model.config
        setup = GenerationSetup(
            settings.options(reading, options),
            reading.decoder_start,
            seed=options.seed,
            rows=options.rows,
            stops=table_of(settings.until, reading.tokenizer, config.decoder_stack.vocab_size)
            if settings.until
            else None,
        )
        cut, room = _Cut("prompts"), self._prompt_room(settings.max_new_tokens)
        tokens = {number: cut.left(self._prompt(text), room) for number, text in prompts.items()}
        cut.tell(len(prompts))
        numbers = list(tokens)
        for places in batches_by_length([len(row) for row in tokens.values()], options.rows):
            batch = [numbers[place] for place in places]
            outputs = complete(self._model, [tokens[number] for number in batch], setup=setup, indices=batch)
            for number, output in zip(batch, outputs, strict=True):
                yield number, as_text(output, reading.tokenizer, settings.until, skip_special_tokens=True).text

    def _prompt(self, text: str) -> np.ndarray:
        tokens = self._reading.tokenizer.encode(text)
        return self._reading.inputs(tokens, is_encoder_decoder=self._model.config.is_encoder_decoder)

    def _prompt_room(self, new_tokens: int) -> int:
        """Returns the largest number of tokens of a prompt, after which there is room for so many new ones."""
        if self._encoder_room is not None:
            return self._encoder_room
        if new_tokens >= self.max_length:
            raise UserError(
                f"max_gen_toks = {new_tokens:,} leaves no room for a prompt: the model's context is "
                f"{self.max_length:,}; lower it in the task, or take a model with a longer context"
            )
        return self.max_length - new_tokens


@dataclass(frozen=True)
class _Generation:
    """Settings of requests that are generated together.

    Attributes:
      until: stop strings.
      max_new_tokens: largest number of tokens of an output.
      draws: (temperature, top_k, top_p); None = the likeliest tokens.
      shared: options of GenerationOptions by name.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    draws: tuple[float, int | None, float | None] | None
    shared: dict[str, Any]

    @classmethod
    def of(cls, settings: Mapping[str, Any], *, where: str) -> "_Generation":
        """Returns the settings of a task's generation_kwargs.

        Raises:
          UserError: there is no option of a name (nearest name).
        """
        values = dict(_rules.normalize_gen_kwargs(dict(settings), 256))
        for name in values:
            if name not in (*OWN, *SAMPLING, *SHARED):
                raise unknown("generation option", name, (*OWN, *SAMPLING, *SHARED), where=where)
        draws = None
        if values["do_sample"]:
            draws = (float(values.get("temperature", 1.0)), values.get("top_k"), values.get("top_p"))
        return cls(
            tuple(stop for stop in values["until"] if stop),
            values["max_gen_toks"],
            draws,
            {name: values[name] for name in SHARED if name in values},
        )

    def options(self, reading: Reading, options: HarnessOptions) -> GenerationOptions:
        """Returns the options of tokens."""
        return GenerationOptions(
            self.max_new_tokens,
            reading.stop_ids,
            reading.tokenizer.special_tokens.pad,
            sampler=options.sampler(*self.draws) if self.draws else GREEDY,
            compute=options.compute,
            suppressed_ids=reading.suppressed_ids,
            **self.shared,
        )


class _Cut:
    """Cuts tokens on the left, and counts."""

    def __init__(self, name: str):
        self._name, self._rows, self._tokens = name, 0, 0

    def left(self, tokens: np.ndarray, room: int) -> np.ndarray:
        """Returns the last `room` tokens."""
        if len(tokens) <= room:
            return tokens
        self._rows, self._tokens = self._rows + 1, self._tokens + len(tokens) - room
        return tokens[len(tokens) - room :]

    def tell(self, total: int) -> None:
        """Logs how much was cut, if anything was."""
        if self._rows:
            log.warning(
                "%d of %d %s are longer than the model's context; %d tokens on their left are cut off",
                self._rows,
                total,
                self._name,
                self._tokens,
            )
