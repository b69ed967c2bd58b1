"""Tasks and mixtures of seqio, tokenised by seqio itself and read back by number.

seqio gives a stream by way of TensorFlow. It is run once when a run begins, into a file of tokens that workers read
without TensorFlow; `t5g2 tokenize` keeps the tokens for runs to come, which then need neither seqio nor TensorFlow.
"""

import hashlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from t5g2.core import files, optional, pairs
from t5g2.core.errors import UserError, unknown
from t5g2.data.sources.documents import Documents, OnBadRecord
from t5g2.data.tokenizers.base import Tokenizer

# A run's tokenizer must give the same ids as the task's for these.
PROBES = ("The quick brown fox, 12 times.", "naïve  twice\n", "x = {y: [1, 2]}")


@dataclass(frozen=True)
class Seqio:
    """A task or mixture of seqio (pip install 't5g2[seqio]', which brings TensorFlow; Python 3.11).

    A task with inputs and targets gives pairs, for the objective seq2seq. One with targets alone gives documents of
    tokens, for all the others. The order here is seqio's unshuffled one: a run shuffles by itself.

    Attributes:
      module: is imported, and registers the task: "my_tasks.glue".
      name: of the task or mixture.
      inputs_tokens, targets_tokens: seqio's sequence_length, which it cuts off at; inputs_tokens 0 = without inputs.
      split: as in seqio.
      examples: the first so many; 0 = one epoch of a task. A mixture has no end, and needs a number. To mix with exact
        shares and whole epochs, give each task as a source of its own, with a weight.
      seed: of preprocessors that draw, and of a mixture's draws.
      use_cached: read what seqio's own cache has.
    """

    module: str
    name: str
    targets_tokens: int
    inputs_tokens: int = 0
    split: str = "train"
    examples: int = 0
    seed: int = 0
    use_cached: bool = False

    def __post_init__(self):
        if self.targets_tokens < 1 or not 0 <= self.inputs_tokens <= pairs.MOST_INPUTS or self.examples < 0:
            raise UserError(
                f"targets_tokens = {self.targets_tokens}, inputs_tokens = {self.inputs_tokens}, examples = "
                f"{self.examples}; they must be at least 1, 0 to {pairs.MOST_INPUTS}, and at least 0"
            )

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """The examples, which are tokenised now.

        Raises:
          UserError: seqio is not installed, the module, task, split or a feature does not exist, or an example has no
            targets (unless such examples are skipped).
        """
        provider, dataset = _dataset(self)
        examples, skipped = _examples(self, dataset), []

        def sound() -> Iterator[np.ndarray]:
            for number, (inputs, targets) in enumerate(examples):
                if len(targets):
                    yield targets if inputs is None else pairs.join(inputs, targets)
                elif on_bad_record == "skip":
                    skipped.append(f"{self.name}, example {number}: no targets")
                else:
                    raise UserError(
                        f"{self.name}, example {number}: no targets; mend the task, or leave such examples out with "
                        f"on_bad_record=skip"
                    )

        file, ends, highest = _write(sound(), skip=int(self.inputs_tokens > 0))
        if not len(ends):
            raise UserError(f"{self.name} has no examples in split {self.split!r}")
        vocabulary = provider.output_features["targets"].vocabulary
        return _Examples(self, file, ends, _Vocabulary(_probe(vocabulary), highest), tuple(skipped))


@dataclass(frozen=True)
class _Vocabulary:
    """What a run's tokenizer is compared with: the ids of texts, and the highest id there is."""

    probes: tuple[tuple[str, tuple[int, ...]], ...]
    highest: int


@dataclass(frozen=True, eq=False)
class _Examples(Documents):
    """Tokens in a file, one example after the other; `ends` int64[examples], in tokens."""

    source: Seqio
    file: str
    ends: np.ndarray
    vocabulary: _Vocabulary
    left_out: tuple[str, ...]
    agreed: list[Tokenizer] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        return Path(self.file).stem

    @property
    def characters(self) -> int:
        return 0

    @property
    def skipped(self) -> int:
        return len(self.left_out)

    @property
    def problems(self) -> tuple[str, ...]:
        return self.left_out[:10]

    @property
    def has_pairs(self) -> bool:
        return self.source.inputs_tokens > 0

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        raise UserError(f"seqio's {self.source.name} gives tokens, and no text")

    def token_lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        self._agree(tokenizer)
        return np.diff(self.ends, prepend=0)

    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        self._agree(tokenizer)
        begin = int(self.ends[index - 1]) if index else 0
        return np.fromfile(self.file, np.int32, int(self.ends[index]) - begin, offset=4 * begin)

    def _agree(self, tokenizer: Tokenizer) -> None:
        if tokenizer in self.agreed:
            return
        wrong = [text for text, ids in self.vocabulary.probes if tokenizer.encode(text).tolist() != list(ids)]
        if wrong or self.vocabulary.highest >= tokenizer.vocab_size:
            what = f"gives other ids for {wrong[0]!r}" if wrong else f"has only {tokenizer.vocab_size} ids"
            raise UserError(
                f"seqio's {self.source.name} has a vocabulary of its own (ids up to {self.vocabulary.highest}), and "
                f"the run's tokenizer, {tokenizer.to_dict()}, {what}; give both the same"
            )
        self.agreed.append(tokenizer)


def _dataset(source: Seqio) -> tuple[Any, Any]:
    """The task or mixture, and its tf.data.Dataset."""
    seqio = optional.require("seqio", "seqio")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # they are jax's
    try:
        importlib.import_module(source.module)
    except ImportError as error:
        raise UserError(f"module {source.module!r}, which has {source.name!r}, does not import ({error})") from None
    names = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if source.name not in names:
        raise unknown("seqio task or mixture", source.name, names)
    provider = seqio.get_mixture_or_task(source.name)
    lengths = {"targets": source.targets_tokens}
    if source.inputs_tokens:
        lengths["inputs"] = source.inputs_tokens
    features = set(provider.output_features)
    if not set(lengths) <= features or ("inputs" in features and not source.inputs_tokens):
        raise UserError(
            f"seqio's {source.name} has {', '.join(sorted(features))}, and inputs_tokens = {source.inputs_tokens} asks "
            f"for {', '.join(sorted(lengths))}; inputs_tokens is 0 just where there are no inputs"
        )
    if source.split not in provider.splits:
        raise unknown(f"split of {source.name}", source.split, provider.splits)
    mixture = source.name in seqio.MixtureRegistry.names()
    if mixture and not source.examples:
        raise UserError(f"{source.name} is a mixture, which has no end; say how many examples to take (examples)")
    dataset = provider.get_dataset(
        sequence_length=lengths,
        split=source.split,
        use_cached=source.use_cached,
        shuffle=False,
        seed=source.seed,
        num_epochs=None if mixture else 1,
    )
    return provider, dataset.take(source.examples) if source.examples else dataset


def _examples(source: Seqio, dataset: Any) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
    import tensorflow as tf

    try:
        for example in dataset.as_numpy_iterator():
            yield example["inputs"] if source.inputs_tokens else None, example["targets"]
    except tf.errors.OpError as error:
        raise UserError(f"seqio's {source.name} cannot be read to its end ({str(error)[:300]})") from None


def _write(examples: Iterator[np.ndarray], skip: int) -> tuple[str, np.ndarray, int]:
    """The file of the tokens, named after them; where each example ends; the highest id after the first `skip`."""
    folder = files.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".seqio.{os.getpid()}.part"
    digest, lengths, highest = hashlib.sha256(), [], 0
    try:
        with open(part, "wb") as out:
            for example in examples:
                data = example.astype("<i4")
                out.write(data.tobytes())
                digest.update(len(data).to_bytes(8, "little") + data.tobytes())
                lengths.append(len(data))
                highest = max(highest, int(data[skip:].max()))
        target = folder / f"{digest.hexdigest()[:16]}.seqio"
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return str(target), np.cumsum(np.array(lengths, np.int64)), highest


def _probe(vocabulary: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The ids of texts; none where a task has no text, but ids already."""
    import seqio

    if isinstance(vocabulary, seqio.PassThroughVocabulary):
        return ()
    return tuple((text, tuple(map(int, vocabulary.encode(text)))) for text in PROBES)
