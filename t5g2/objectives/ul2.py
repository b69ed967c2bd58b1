"""UL2: a mixture of denoisers; some fill in corrupted spans, one continues a prefix."""

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
from typing_extensions import override

from t5g2.core.batch import Example
from t5g2.core.bounds import TokenId, checked
from t5g2.core.errors import UserError, unknown
from t5g2.core.objective import Objective
from t5g2.core.special_tokens import SpecialTokens
from t5g2.objectives.denoisers import T5, T5GEMMA2, UL2_ORIGINAL, Denoiser
from t5g2.objectives.spans import corrupt, random_parts, sentinel_positions
from t5g2.objectives.teacher_forcing import teacher_forced


@dataclass(frozen=True)
@checked
class UL2(Objective):
    """Corruption of the text by one denoiser of a mixture, which is sampled by weight for every example.

    Spans, with bos = 2, eos = 1, sentinels 90 91 …, tokens [11 … 20], noise spans [13 14] and [18 19 20]:

        encoder_tokens  [11 12 90 15 16 17 91]
        decoder_tokens  [ 2 90 13 14 91 18 19 20]
        targets         [90 13 14 91 18 19 20  1]
        weights         [ 1  1  1  1  1  1  1  1]      with loss_on_sentinels=False: [0 1 1 0 1 1 1 1]
        origins         [-1  2  3 -1  7  8  9 -1]

    The suffix, rate 0.75, tokens [11 … 18]:

        encoder_tokens  [11 12]
        decoder_tokens  [ 2 13 14 15 16 17 18]
        targets         [13 14 15 16 17 18  1]

    The same spans with sentinels="mask", mask = 4, encoder_eos=True, and two mode tokens, 50 and 51:

        encoder_tokens  [50 51 11 12  4 15 16 17  4  1]
        targets         [ 4 13 14  4 18 19 20  1]

    Spans are sampled as in T5 (google-research/text-to-text-transfer-transformer @ 0068fa7, t5/data/preprocessors.py,
    random_spans_noise_mask): the kept tokens and the noise tokens are each divided into the same number of spans, every
    division being equally likely, and the spans alternate, a kept one first. So a text begins with a kept token and
    ends with noise. Known deviations: the number of spans is at most that of kept tokens, a case in which T5's mask has
    fewer spans than intended; the number of noise tokens is rounded in double precision, whereas T5's float32 gives one
    more for some texts of 20 n + 10 tokens at rate 0.15. The papers of UL2 and T5Gemma 2 leave open the tokens that
    replace spans, mode tokens (here: none) and EOS.

    Attributes:
      tasks: the denoisers of the mixture.
      loss_on_sentinels: sentinels among the targets have a loss.
      eos: the targets end in EOS, which has a loss.
      encoder_eos: the encoder's input ends in EOS, as T5's does.
      sentinels: the tokens that replace spans. "distinct" = <sentinel_0>, <sentinel_1>, …, each at most once;
        "cyclic" = the same, starting again with <sentinel_0> after the tokenizer's last; "mask" = the mask token for
        every span.
      mode_tokens: pairs (mode, id): the encoder inputs of the denoisers of a mode begin with its id, or, if it has
        several pairs, with their ids in order. () = no mode tokens, whatever the modes of the denoisers are.
      mixing: the unit of the weights. "examples" = a denoiser's share of the examples; "tokens" = its share of the
        targets with a loss: for each chunk, the probability of a denoiser is proportional to weight / expected number
        of targets with a loss in this chunk, so the shares hold over any mixture of lengths.
    """

    tasks: tuple[Denoiser, ...] = T5GEMMA2
    loss_on_sentinels: bool = True
    eos: bool = True
    encoder_eos: bool = False
    sentinels: Literal["distinct", "cyclic", "mask"] = "distinct"
    mode_tokens: tuple[tuple[str, TokenId], ...] = ()
    mixing: Literal["examples", "tokens"] = "examples"

    def __post_init__(self):
        if not self.tasks:
            raise UserError("tasks is empty; give at least one denoiser")
        if len(set(self.denoisers)) < len(self.tasks):
            raise UserError(f"two denoisers have one name: {', '.join(self.denoisers)}; names are unique in a mixture")
        modes = {task.mode for task in self.tasks if task.mode}
        for mode, _ in self.mode_tokens:
            if mode not in modes:
                raise unknown("mode", mode, modes, where="in mode_tokens")
        missing = sorted(modes - {mode for mode, _ in self.mode_tokens})
        if self.mode_tokens and missing:
            raise UserError(
                f"mode_tokens has no id for {', '.join(missing)}; give every mode of the mixture's denoisers an id, or "
                f"none: mode_tokens = ()"
            )

    @property
    @override
    def denoisers(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @property
    @override
    def weights(self) -> tuple[float, ...]:
        total = sum(task.weight for task in self.tasks)
        return tuple(task.weight / total for task in self.tasks)

    def chances(self, tokens: int) -> tuple[float, ...]:
        """Returns the probability of each denoiser for a chunk of `tokens` tokens; the probabilities sum to 1."""
        if self.mixing == "examples":
            return self.weights
        # p proportional to weight / targets makes p * targets, the share of targets, proportional to the weight
        rates = [
            weight / self._mean_loss_targets(task, tokens)
            for weight, task in zip(self.weights, self.tasks, strict=True)
        ]
        total = sum(rates)
        return tuple(rate / total for rate in rates)

    def _mean_loss_targets(self, task: Denoiser, tokens: int) -> float:
        """Returns the expected number of a denoiser's targets that have a loss."""
        sentinels = task.sentinels(tokens) if self.loss_on_sentinels else 0
        return task.mean_noise_tokens(tokens) + sentinels + self.eos

    @override
    def lengths(self, tokens: int) -> tuple[int, int]:
        lengths = [task.lengths(tokens) for task in self.tasks]
        encoder = max(kept + len(self._mode_ids(task)) for (kept, _), task in zip(lengths, self.tasks, strict=True))
        return encoder + self.encoder_eos, max(targets for _, targets in lengths) + self.eos

    @override
    def sentinels_needed(self, tokens: int) -> int:
        # cyclic sentinels are used again, so one is enough
        most = max(task.sentinels(tokens) for task in self.tasks)
        return {"distinct": most, "cyclic": min(most, 1), "mask": 0}[self.sentinels]

    @override
    def check_tokenizer(self, special_tokens: SpecialTokens, vocab_size: int) -> None:
        if any(not task.is_prefix for task in self.tasks):
            self._sentinel_ids(0, special_tokens)  # raises if there is no mask token
        for mode, token in self.mode_tokens:
            if not 0 <= token < vocab_size or special_tokens.is_sentinel(np.array(token)):
                raise UserError(
                    f"mode_tokens has {token} for mode {mode!r}; take an id from 0 to {vocab_size - 1} that is neither "
                    f"a sentinel (from {special_tokens.first_sentinel} on) nor the mask token"
                )

    @override
    def only(self, denoiser: str) -> "UL2":
        if denoiser not in self.denoisers:
            raise unknown("denoiser", denoiser, self.denoisers)
        task = self.tasks[self.denoisers.index(denoiser)]
        # the constructor refuses ids of modes that no denoiser has
        mode_tokens = tuple((mode, token) for mode, token in self.mode_tokens if mode == task.mode)
        return dataclasses.replace(self, tasks=(task,), mode_tokens=mode_tokens)

    @override
    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> Example:
        length = len(tokens)
        # the last cumulative probability is left out, because rounding may leave it below 1
        index = bisect_right(list(accumulate(self.chances(length)))[:-1], rng.random())
        task = self.tasks[index]
        noise = task.draw_noise_tokens(length, rng)
        without_loss: np.ndarray | Sequence[int] = ()
        if task.is_prefix:
            encoder_tokens, targets = tokens[: length - noise], tokens[length - noise :]
            origins = np.arange(length - noise, length)
        else:
            spans = task.spans(length)
            kept_lengths = random_parts(length - noise, spans, rng)
            noise_lengths = random_parts(noise, spans, rng)
            sentinels = self._sentinel_ids(spans, special_tokens)
            encoder_tokens, targets, origins = corrupt(tokens, kept_lengths, noise_lengths, sentinels)
            without_loss = () if self.loss_on_sentinels else sentinel_positions(noise_lengths)
        encoder_tokens = self._add_mode_and_eos(encoder_tokens, task, special_tokens)
        example = teacher_forced(
            encoder_tokens, targets, origins, special_tokens=special_tokens, eos=self.eos, denoiser=index
        )
        if len(without_loss):
            example.weights[without_loss] = 0.0
        return example

    @override
    def infilling(
        self, tokens: np.ndarray, starts: Sequence[int], span: int, *, special_tokens: SpecialTokens
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns a prompt and its targets, in the mode of the first denoiser that has spans.

        With sentinels 90 91 …, tokens [10 … 17], starts [2 5], span 2:

            [10 11 90 14 91 17]     [90 12 13 91 15 16]
        """
        span_tasks = [task for task in self.tasks if not task.is_prefix]
        if not span_tasks:
            return None
        if self.sentinels == "distinct" and special_tokens.sentinels < len(starts):
            return None
        edges = np.concatenate([[0], np.asarray(starts) + span])
        kept, noise = np.append(starts, len(tokens)) - edges, np.full(len(starts), span)
        ids = self._sentinel_ids(len(starts), special_tokens)
        # `corrupt` takes a text that ends with a noise span; the tokens after it are appended
        end = edges[-1]
        encoder_tokens, targets, _ = corrupt(tokens[:end], kept[:-1], noise, ids)
        encoder_tokens = np.concatenate([encoder_tokens, tokens[end:]])
        return self._add_mode_and_eos(encoder_tokens, span_tasks[0], special_tokens), targets

    def _add_mode_and_eos(
        self, encoder_tokens: np.ndarray, task: Denoiser, special_tokens: SpecialTokens
    ) -> np.ndarray:
        """Returns the encoder's input with the denoiser's mode tokens before it and EOS after it, if they are set."""
        before, after = self._mode_ids(task), [special_tokens.eos] * self.encoder_eos
        if not (before or after):
            return encoder_tokens
        return np.concatenate([before, encoder_tokens, after], dtype=np.int32, casting="unsafe")

    def _mode_ids(self, task: Denoiser) -> list[int]:
        return [token for mode, token in self.mode_tokens if mode == task.mode]

    def _sentinel_ids(self, spans: int, special_tokens: SpecialTokens) -> np.ndarray:
        """Returns int32[spans], the tokens that replace the spans."""
        if self.sentinels == "distinct":
            return special_tokens.sentinel_ids(spans)
        if self.sentinels == "cyclic":
            return special_tokens.cyclic_sentinel_ids(spans)
        if special_tokens.mask < 0:
            raise UserError(
                'sentinels = "mask", and the tokenizer has no mask token; set its id: tokenizer.ids = [["mask", 4]], '
                'or take sentinels = "cyclic"'
            )
        return np.full(spans, special_tokens.mask, np.int32)


@dataclass(frozen=True)
class SpanCorruption(UL2):
    """T5's objective (arXiv 1910.10683, section 3.1.4): UL2 with one denoiser, by default of rate 0.15 and mean span 3.

    The arrays are UL2's. T5's encoder inputs end in EOS (encoder_eos=True), and so do its targets.
    """

    tasks: tuple[Denoiser, ...] = T5


@dataclass(frozen=True)
class UL2Original(UL2):
    """The original UL2 of Tay et al. (arXiv 2205.05131): seven denoisers in the modes NLU, S2S and NLG.

    The original's mode tokens are "[NLU]", "[S2S]" and "[NLG]" of its own vocabulary. Gemma's vocabulary has no such
    tokens, so the default is none. mode_tokens takes ids that nothing else uses, such as <unused0> to <unused2> of
    Gemma 3 and T5Gemma 2, (("NLU", 6), ("S2S", 7), ("NLG", 8)), or the ids of the tokens that spell a mode's name.
    """

    tasks: tuple[Denoiser, ...] = UL2_ORIGINAL
