"""UL2: a mixture of denoisers, some that fill in corrupted spans, one that continues a prefix."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from t5g2.core.batch import Example
from t5g2.core.errors import UserError, unknown
from t5g2.core.objective import Objective
from t5g2.core.specials import Specials
from t5g2.objectives.shift import teacher_forced


@dataclass(frozen=True)
class Denoiser:
    """One way to corrupt a text.

    Of L tokens, round(L * rate) are taken away (at least 1, never all): in round(taken / mean_span) spans at random
    places, or, without a mean span, as the one span at the end (UL2's S-denoiser, a prefix language model).

    Attributes:
      name: unique in its mixture; losses are reported by it.
      rate: share of the tokens that are taken away, between 0 and 1.
      mean_span: mean length of a span in tokens, at least 1; None = one span, the end of the text, and no sentinel.
      weight: how often this denoiser is drawn, relative to the others.
    """

    name: str
    rate: float
    mean_span: float | None = None
    weight: float = 1.0

    def __post_init__(self):
        if not 0.0 < self.rate < 1.0:
            raise UserError(
                f"denoiser {self.name!r} has rate {self.rate}; it is a share of the tokens, between 0 and 1"
            )
        if self.mean_span is not None and self.mean_span < 1.0:
            raise UserError(f"denoiser {self.name!r} has mean_span {self.mean_span}; a span has at least 1 token")
        if self.weight <= 0.0:
            raise UserError(f"denoiser {self.name!r} has weight {self.weight}; leave it out, or give it more than 0")

    def noise_tokens(self, tokens: int) -> int:
        """How many of the tokens are taken away."""
        return min(max(round(tokens * self.rate), 1), tokens - 1)

    def spans(self, tokens: int) -> int:
        """How many spans they are taken in; spans are kept apart by at least one token."""
        if self.mean_span is None:
            return 1
        noise = self.noise_tokens(tokens)
        return min(max(round(noise / self.mean_span), 1), tokens - noise)

    def sentinels(self, tokens: int) -> int:
        """How many sentinels stand for them."""
        return 0 if self.mean_span is None else self.spans(tokens)

    def lengths(self, tokens: int) -> tuple[int, int]:
        """Length of what is kept and of what is asked for, sentinels included, EOS not."""
        noise, sentinels = self.noise_tokens(tokens), self.sentinels(tokens)
        return tokens - noise + sentinels, noise + sentinels


# T5Gemma 2, arXiv 2512.14856, section 3.1: five tasks (mean span, rate), drawn 1:1:1:1:4. That the fifth, one span of
# 3/4 of the text, is the end of the text follows UL2's S-denoiser (arXiv 2205.05131); the paper does not say it, nor
# whether the ratio counts examples (here) or tokens.
T5GEMMA2 = (
    Denoiser("mu3_r15", rate=0.15, mean_span=3.0),
    Denoiser("mu12_r50", rate=0.5, mean_span=12.0),
    Denoiser("mu32_r15", rate=0.15, mean_span=32.0),
    Denoiser("mu32_r50", rate=0.5, mean_span=32.0),
    Denoiser("suffix_r75", rate=0.75, weight=4.0),
)


@dataclass(frozen=True)
class UL2(Objective):
    """One denoiser of the mixture, drawn by weight, is applied to the text.

    Spans, with bos = 2, eos = 1, sentinels 90 91 …, tokens [11 … 20], of which [13 14] and [18 19 20] are taken away:

        encoder_tokens  [11 12 90 15 16 17 91]
        decoder_tokens  [ 2 90 13 14 91 18 19 20]
        targets         [90 13 14 91 18 19 20  1]
        weights         [ 1  1  1  1  1  1  1  1]      with loss_on_sentinels=False: [0 1 1 0 1 1 1 1]

    The suffix, rate 0.75, tokens [11 … 18]:

        encoder_tokens  [11 12]
        decoder_tokens  [ 2 13 14 15 16 17 18]
        targets         [13 14 15 16 17 18  1]

    Spans are drawn as in T5 (google-research/text-to-text-transfer-transformer, t5/data/preprocessors.py,
    random_spans_noise_mask): both the kept and the removed tokens are cut into as many parts, every cut being equally
    likely, and the parts alternate, a kept one first. So a text begins with a kept token and ends with a removed one.
    Neither paper says which tokens stand for spans, whether there are mode tokens (here: none) or an EOS.

    Attributes:
      tasks: the mixture.
      loss_on_sentinels: whether a sentinel among the targets counts.
      eos: the targets end in EOS; it counts.
    """

    tasks: tuple[Denoiser, ...] = T5GEMMA2
    loss_on_sentinels: bool = True
    eos: bool = True

    def __post_init__(self):
        if not self.tasks:
            raise UserError("tasks is empty; a mixture has at least one denoiser")
        if len(set(self.denoisers)) < len(self.tasks):
            raise UserError(f"two denoisers have one name: {', '.join(self.denoisers)}; names are unique in a mixture")

    @property
    def denoisers(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(task.name for task in self.tasks)

    @property
    def weights(self) -> tuple[float, ...]:
        """The share of each task."""
        total = sum(task.weight for task in self.tasks)
        return tuple(task.weight / total for task in self.tasks)

    def lengths(self, tokens: int) -> tuple[int, int]:
        """The longest encoder and decoder sequences over the tasks."""
        encoder, decoder = zip(*(task.lengths(tokens) for task in self.tasks), strict=True)
        return max(encoder), max(decoder) + self.eos

    def sentinels_needed(self, tokens: int) -> int:
        """The most sentinels that a task takes."""
        return max(task.sentinels(tokens) for task in self.tasks)

    def only(self, denoiser: str) -> "UL2":
        """The mixture of this one task."""
        if denoiser not in self.denoisers:
            raise unknown("denoiser", denoiser, self.denoisers)
        return dataclasses.replace(self, tasks=(self.tasks[self.denoisers.index(denoiser)],))

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, specials: Specials) -> Example:
        """The example of int32[L] tokens, L >= 2."""
        index = int(np.searchsorted(np.cumsum(self.weights)[:-1], rng.random(), side="right"))
        task, length = self.tasks[index], len(tokens)
        noise = task.noise_tokens(length)
        if task.mean_span is None:
            kept, taken = tokens[: length - noise], tokens[length - noise :]
            return teacher_forced(kept, taken, specials=specials, eos=self.eos, denoiser=index)
        spans = task.spans(length)
        kept_lengths = random_parts(length - noise, spans, rng)
        noise_lengths = random_parts(noise, spans, rng)
        encoder_tokens, targets = corrupt(tokens, kept_lengths, noise_lengths, specials.sentinel_ids(spans))
        example = teacher_forced(encoder_tokens, targets, specials=specials, eos=self.eos, denoiser=index)
        if not self.loss_on_sentinels:
            example.weights[np.cumsum(noise_lengths + 1) - (noise_lengths + 1)] = 0.0
        return example


def random_parts(items: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """int64[parts]: lengths >= 1 that sum to `items`, every such composition equally likely.

    With items = 7, parts = 3 and cuts after items 2 and 3: [2 1 4].
    """
    cuts = np.sort(rng.choice(items - 1, parts - 1, replace=False, shuffle=False)) + 1
    edges = np.concatenate(([0], cuts, [items]))
    return edges[1:] - edges[:-1]


def corrupt(
    tokens: np.ndarray, kept_lengths: np.ndarray, noise_lengths: np.ndarray, sentinels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the encoder reads and what the decoder is asked for, without EOS.

    With tokens [11 … 20], kept_lengths [2 3], noise_lengths [2 3], sentinels [90 91]:

        [11 12 90 15 16 17 91]   [90 13 14 91 18 19 20]
    """
    part_lengths = np.stack([kept_lengths, noise_lengths], axis=1).ravel()
    noise = np.repeat(np.arange(len(part_lengths)) % 2 == 1, part_lengths)
    return _with_sentinels(tokens[~noise], kept_lengths, sentinels, after=True), _with_sentinels(
        tokens[noise], noise_lengths, sentinels, after=False
    )


def _with_sentinels(tokens: np.ndarray, lengths: np.ndarray, sentinels: np.ndarray, *, after: bool) -> np.ndarray:
    """The parts of `tokens`, each with its sentinel after or before it."""
    ends = np.cumsum(lengths + 1)
    places = ends - 1 if after else ends - (lengths + 1)
    out = np.empty(len(tokens) + len(sentinels), np.int32)
    is_token = np.ones(len(out), bool)
    is_token[places] = False
    out[places] = sentinels
    out[is_token] = tokens
    return out
