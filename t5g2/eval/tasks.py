"""What a model can be measured on. A task is a frozen dataclass that is made ready once and then run on any weights.

B rows, T decoder length, D width.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t5g2.core.batch import Batch, HostBatch
from t5g2.core.errors import UserError
from t5g2.core.logs import log
from t5g2.core.objective import Objective
from t5g2.core.seeds import derive_seed
from t5g2.core.sharding import batch_sharding, constrain
from t5g2.data.chunking import describe, open_chunks
from t5g2.data.config import DataConfig, Source
from t5g2.data.corpus import open_source
from t5g2.data.pipeline import finite_batches, to_global
from t5g2.data.sources.image_text import ImageText
from t5g2.data.sources.text_source import TextSource
from t5g2.eval import metrics
from t5g2.eval.generation import GREEDY, Model, Sampler, generate_tokens
from t5g2.eval.metrics import TokenSums
from t5g2.models import image_embeddings as images
from t5g2.models.config import EncoderDecoderConfig
from t5g2.models.layers import Compute
from t5g2.models.loss import token_losses


@dataclass(frozen=True)
class Setting:
    """What a run tells its tasks.

    Attributes:
      data: the run's; a task takes tokenizer, lengths, rows and packing from it, and brings its own text.
      seed: of everything that is drawn.
      compute: of the forward pass.
      tile_tokens: tokens whose logits exist at a time.
      mesh: that the weights live on; None = one device.
      rows: the rows of a batch that this process holds; None = all.
    """

    data: DataConfig
    seed: int = 0
    compute: Compute = Compute()
    tile_tokens: int = 1024
    mesh: Mesh | None = None
    rows: range | None = None


class Outcome(NamedTuple):
    """What a task found: numbers by name, and what the model said, as plain data for JSON."""

    scores: dict[str, float]
    predictions: list[dict[str, Any]]


Measure = Callable[[Model], Outcome]


class Task(abc.ABC):
    """Something to measure; every subclass has a `name`, unique in a run, that its scores and predictions carry."""

    name: str

    @abc.abstractmethod
    def prepare(self, setting: Setting) -> Measure:
        """The function that measures a model; what does not depend on the weights is done here.

        Raises:
          UserError: the text cannot be read, or does not fit the setting.
        """


@dataclass(frozen=True)
class HeldoutLoss(Task):
    """The loss on text that was not trained on, in nats per token, for each denoiser of an objective and over all.

    Every denoiser is asked about the same chunks of text, whatever its share, so that its mean is as exact as any
    other's. `<name>/loss` is the mean of the denoisers' means, weighted with their shares of the mixture; sentinels
    among the targets never count (they can be read off the input's order), whether the objective trains on them or not.
    `<name>/loss/<denoiser>` is one denoiser's mean.

    Attributes:
      text: held-out text.
      objective: what is asked about it.
      examples: how many chunks, the first in an order that depends on the seed alone; None = all.
    """

    text: TextSource
    objective: Objective
    name: str = "heldout"
    examples: int | None = 64

    def __post_init__(self):
        if self.examples is not None and self.examples < 1:
            raise UserError(f"examples = {self.examples}; it must be at least 1, or None for the whole text")

    def prepare(self, setting: Setting) -> Measure:
        """Reads the batches, unless they are all of the text, which is read anew each time."""
        try:
            source = Source(self.text, self.objective, name=self.name)
            # a tower that reads no image takes as long as one that does
            images = setting.data.images if isinstance(self.text, ImageText) else None
            data = dataclasses.replace(setting.data, sources=(source,), images=images)
        except UserError as error:
            raise UserError(f"evaluation task {self.name!r} does not fit the run's data: {error}") from None
        chunks = open_source(data.sources[0], data)
        log.info("%s", describe(f"task {self.name}", chunks))
        # not by the task's name: tasks of one run and of its relatives are asked about the same chunks
        seed = derive_seed(setting.seed, "held-out loss")

        def read(denoiser: str) -> Iterable[HostBatch]:
            return finite_batches(data, seed=seed, rows=setting.rows, denoiser=denoiser, examples=self.examples)

        kept = {d: list(read(d)) for d in self.objective.denoisers} if self.examples is not None else None

        def measure(model: Model) -> Outcome:
            sums = {d: _sums(model, kept[d] if kept else read(d), setting) for d in self.objective.denoisers}
            return Outcome(self._scores(sums), [])

        return measure

    def _scores(self, sums: dict[str, TokenSums]) -> dict[str, float]:
        shares = dict(zip(self.objective.denoisers, self.objective.weights, strict=True))
        losses = {denoiser: of.mean_loss for denoiser, of in sums.items()}
        loss = metrics.mixture(losses, shares)
        return {
            f"{self.name}/loss": loss,
            f"{self.name}/perplexity": metrics.perplexity(loss),
            f"{self.name}/accuracy": metrics.mixture({d: of.accuracy for d, of in sums.items()}, shares),
            **{f"{self.name}/loss/{denoiser}": loss for denoiser, loss in losses.items()},
        }


@dataclass(frozen=True)
class Samples(Task):
    """What the model says: it completes held-out text, and an encoder-decoder that was trained to fills in spans of it.

    A prediction is {"task", "kind": "completion" or "filling", "prompt", "output", "reference"}, all text. There are no
    scores: these are for people.

    Attributes:
      text: held-out text.
      examples: chunks of it; each is completed, and has two spans filled in.
      prompt_tokens: how much of a chunk is given for completion.
      span_tokens: length of each span to fill in.
      max_new_tokens: how much is generated, and how much of the text is shown as reference.
      prompt_both_ways: a decoder-only model's prompt sees itself both ways, as PrefixLMDecoder trains it.
    """

    text: TextSource
    name: str = "samples"
    examples: int = 4
    prompt_tokens: int = 64
    span_tokens: int = 12
    max_new_tokens: int = 48
    sampler: Sampler = GREEDY
    prompt_both_ways: bool = False

    def __post_init__(self):
        for field in ("examples", "prompt_tokens", "span_tokens", "max_new_tokens"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} = {getattr(self, field)}; it must be at least 1")
        if 4 * self.span_tokens > self.prompt_tokens + self.max_new_tokens:
            raise UserError(
                f"span_tokens = {self.span_tokens}: two spans may be at most half of a chunk of prompt_tokens + "
                f"max_new_tokens = {self.prompt_tokens + self.max_new_tokens} tokens; lower it"
            )

    def prepare(self, setting: Setting) -> Measure:
        """Chooses the chunks."""
        if self.prompt_both_ways and setting.data.encoder_length:
            raise UserError(
                f"evaluation task {self.name!r} has prompt_both_ways, which is for a decoder-only model, and the model "
                f"is encoder-decoder: its encoder reads the prompt; leave prompt_both_ways out"
            )
        tokenizer, decode = setting.data.tokenizer, setting.data.tokenizer.decode
        chunks = self._choose(setting)
        completions = [("completion", chunk[: self.prompt_tokens], chunk[self.prompt_tokens :]) for chunk in chunks]
        fillings = [("filling", *asked) for chunk in chunks if (asked := self._without_spans(chunk, setting.data))]

        def measure(model: Model) -> Outcome:
            # all at once, because every shape is a program to compile
            asked = completions + fillings if isinstance(model.config, EncoderDecoderConfig) else completions
            made = generate_tokens(
                model,
                tokenizer,
                [prompt for _, prompt, _ in asked],
                max_new_tokens=self.max_new_tokens,
                sampler=self.sampler,
                compute=setting.compute,
                prompt_both_ways=self.prompt_both_ways,
                seed=derive_seed(setting.seed, "draws", self.name),
            )
            texts = [
                {"prompt": decode(prompt), "output": decode(output), "reference": decode(reference)}
                for (_, prompt, reference), output in zip(asked, made, strict=True)
            ]
            kinds = [{"task": self.name, "kind": kind} for kind, *_ in asked]
            return Outcome({}, [kind | text for kind, text in zip(kinds, texts, strict=True)])

        return measure

    def _without_spans(self, chunk: np.ndarray, data: DataConfig) -> tuple[np.ndarray, np.ndarray] | None:
        """A prompt without two spans, at 1/4 and 5/8 of the chunk, and what is asked for, as the first of the run's
        objectives has it that takes spans away; None if none does, or the chunk is too short.
        """
        if len(chunk) < 4 * self.span_tokens:
            return None
        starts = [len(chunk) // 4, 5 * len(chunk) // 8]
        made = (
            s.objective.filling(chunk, starts, self.span_tokens, special_tokens=data.tokenizer.special_tokens)
            for s in data.sources
        )
        return next(filter(None, made), None)

    def _choose(self, setting: Setting) -> list[np.ndarray]:
        """Whole chunks of prompt_tokens + max_new_tokens, drawn; shorter ones where there are no others."""
        length = self.prompt_tokens + self.max_new_tokens
        data = setting.data
        chunks = open_chunks(self.text, data.tokenizer, chunk_tokens=length, on_bad_record=data.on_bad_record)
        order = np.random.default_rng(derive_seed(setting.seed, "task", self.name)).permutation(len(chunks))
        drawn = [chunks[int(i)] for i in order[: 8 * self.examples]]
        return sorted(drawn, key=lambda chunk: len(chunk) < length)[: self.examples]


BY_NAME = {"heldout_loss": HeldoutLoss, "samples": Samples}


def _sums(model: Model, batches: Iterable[HostBatch], setting: Setting) -> TokenSums:
    special_tokens, total = setting.data.tokenizer.special_tokens, TokenSums()
    for batch, *_ in batches:
        batch = batch._replace(weights=np.where(special_tokens.is_sentinel(batch.targets), 0, batch.weights))
        if setting.mesh is not None:
            batch = to_global(batch, batch_sharding(setting.mesh), rows=setting.data.rows)
        sums = _batch_sums(model, batch, compute=setting.compute, tile_tokens=setting.tile_tokens)
        total += TokenSums(*np.asarray(sums, np.float64).tolist())
    return total


@partial(jax.jit, static_argnames=("compute", "tile_tokens"))
def _batch_sums(model: Model, batch: Batch, *, compute: Compute, tile_tokens: int) -> jax.Array:
    """float32[3]: the fields of TokenSums, over the global batch."""
    pictures = images.normalized(batch.images)
    hidden_BTD = model.hidden(batch.encoder, batch.decoder, pictures, compute=compute)  # pyright: ignore[reportArgumentType]
    tokens = token_losses(hidden_BTD, model.head(), batch.targets, tile_tokens=tile_tokens, dtype=compute.loss_dtype)
    # what stands at padding means nothing and need not be finite
    loss_BT = jnp.where(batch.weights > 0, batch.weights * tokens.loss_BT, 0.0)
    correct_BT = batch.weights * tokens.correct_BT.astype(jnp.float32)
    sums = jnp.stack([jnp.sum(loss_BT), jnp.sum(correct_BT), jnp.sum(batch.weights)])
    return constrain(sums, None)  # whole on every host, so that each can read it
