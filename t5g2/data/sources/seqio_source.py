"""Tasks and mixtures of seqio: seqio tokenises the examples, and a run reads them by number.

seqio has only a stream of examples and needs TensorFlow. The stream is written once, when a run begins, to a file of
tokens, which workers read without TensorFlow. `t5g2 tokenize` keeps the tokens for later runs, which then need neither
seqio nor TensorFlow.
"""

import hashlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from typing_extensions import override

from t5g2.core import pairs
from t5g2.core.bounds import Bounds, CountOrZero, Seed, Size, checked
from t5g2.core.errors import UserError, unknown
from t5g2.core.files import cache_folder, replacing
from t5g2.core.optional import require
from t5g2.data.sources.documents import Documents, OnBadRecord
from t5g2.data.sources.validation import MAX_PROBLEMS
from t5g2.data.tokenizers.base import Tokenizer

# the run's tokenizer and the task's vocabulary must have the same ids for these texts
PROBES = ("The quick brown fox, 12 times.", "naïve  twice\n", "x = {y: [1, 2]}")


@dataclass(frozen=True)
@checked
class Seqio:
    """A task or mixture of seqio (pip install 't5g2[seqio]', which brings TensorFlow; Python 3.11).

    The examples of a task with inputs and targets are pairs, for the objective seq2seq; those of a task with targets
    only are documents, for all other objectives. They are in seqio's unshuffled order: a run shuffles by itself.

    Attributes:
      module: the module that registers the task when it is imported: "my_tasks.glue".
      name: name of the task or mixture.
      inputs_tokens, targets_tokens: seqio's sequence_length, to which seqio cuts; inputs_tokens 0 = without inputs.
      split: as in seqio.
      examples: number of examples, from the first on; 0 = one epoch of a task. A mixture is endless and needs a number.
        To mix with exact shares and whole epochs, make each task a source of its own, with a weight.
      seed: seed of random preprocessors, and of a mixture's draws.
      use_cached: read seqio's own cache.
    """

    module: str
    name: str
    targets_tokens: Size
    inputs_tokens: Annotated[int, Bounds(least=0, most=pairs.MAX_INPUTS)] = 0
    split: str = "train"
    examples: CountOrZero = 0
    seed: Seed = 0
    use_cached: bool = False

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """Tokenises the examples and returns them.

        Raises:
          UserError: seqio is not installed, the module, task, split or a feature does not exist, or an example has no
            targets (unless such examples are skipped).
        """
        provider, dataset = _dataset(self)
        skipped: list[str] = []

        def valid_examples() -> Iterator[np.ndarray]:
            for number, (inputs, targets) in enumerate(_examples(self, dataset)):
                if len(targets):
                    yield targets if inputs is None else pairs.join(inputs, targets)
                elif on_bad_record == "skip":
                    skipped.append(f"{self.name}, example {number}: no targets")
                else:
                    raise UserError(
                        f"{self.name}, example {number}: no targets; mend the task, or leave such examples out with "
                        f"on_bad_record=skip"
                    )

        # the first entry of a pair is the number of inputs, which is not an id
        file, ends, highest = _write_tokens(valid_examples(), skip=int(self.inputs_tokens > 0))
        if not len(ends):
            raise UserError(f"{self.name} has no examples in split {self.split!r}")
        vocabulary = provider.output_features["targets"].vocabulary
        return _TokenizedExamples(
            self, file, ends, _VocabularyProbe(_encode_probes(vocabulary), highest), tuple(skipped)
        )


@dataclass(frozen=True)
class _VocabularyProbe:
    """Facts of a task's vocabulary that the run's tokenizer must agree with.

    Attributes:
      ids: (text, ids) of some texts.
      highest: the highest id of the examples.
    """

    ids: tuple[tuple[str, tuple[int, ...]], ...]
    highest: int


@dataclass(frozen=True, eq=False)
class _TokenizedExamples(Documents):
    """Tokens in a file, one example after the other.

    Attributes:
      ends: int64[examples], end of each in tokens.
      bad_examples: the examples that were left out, each with the reason.
      checked: tokenizers that are known to agree with the vocabulary.
    """

    source: Seqio
    file: str
    ends: np.ndarray
    vocabulary: _VocabularyProbe
    bad_examples: tuple[str, ...]
    checked: list[Tokenizer] = field(default_factory=list)

    @property
    @override
    def fingerprint(self) -> str:
        return Path(self.file).stem

    @property
    @override
    def characters(self) -> int:
        return 0

    @property
    @override
    def skipped(self) -> int:
        return len(self.bad_examples)

    @property
    @override
    def problems(self) -> tuple[str, ...]:
        return self.bad_examples[:MAX_PROBLEMS]

    @property
    @override
    def has_pairs(self) -> bool:
        return self.source.inputs_tokens > 0

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        raise UserError(f"seqio's {self.source.name} has tokens, and no text")

    @override
    def token_lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        self._check_tokenizer(tokenizer)
        return np.diff(self.ends, prepend=0)

    @property
    @override
    def has_token_ranges(self) -> bool:
        return True

    @override
    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        begin = int(self.ends[index - 1]) if index else 0
        return self.token_range(index, 0, int(self.ends[index]) - begin, tokenizer)

    @override
    def token_range(self, index: int, start: int, end: int, tokenizer: Tokenizer) -> np.ndarray:
        self._check_tokenizer(tokenizer)
        begin = int(self.ends[index - 1]) if index else 0
        return np.fromfile(self.file, np.int32, end - start, offset=4 * (begin + start))

    def _check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UserError if the tokenizer's ids differ from those of the task's vocabulary."""
        # checked once per tokenizer, because this is called for every document
        if tokenizer in self.checked:
            return
        wrong = [text for text, ids in self.vocabulary.ids if tokenizer.encode(text).tolist() != list(ids)]
        if wrong or self.vocabulary.highest >= tokenizer.vocab_size:
            problem = f"gives other ids for {wrong[0]!r}" if wrong else f"has only {tokenizer.vocab_size} ids"
            raise UserError(
                f"seqio's {self.source.name} has a vocabulary of its own (ids up to {self.vocabulary.highest}), and "
                f"the run's tokenizer, {tokenizer.to_dict()}, {problem}; give both the same"
            )
        self.checked.append(tokenizer)


def _dataset(source: Seqio) -> tuple[Any, Any]:
    """Returns the task or mixture, and its tf.data.Dataset."""
    seqio = require("seqio", "seqio")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # the GPUs are for jax
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
            f"for {', '.join(sorted(lengths))}; set inputs_tokens to 0 if the task has no inputs, and only then"
        )
    if source.split not in provider.splits:
        raise unknown(f"split of {source.name}", source.split, provider.splits)
    mixture = source.name in seqio.MixtureRegistry.names()
    if mixture and not source.examples:
        raise UserError(f"{source.name} is a mixture, which is endless; set `examples` to the number to take")
    try:
        dataset = provider.get_dataset(
            sequence_length=lengths,
            split=source.split,
            use_cached=source.use_cached,
            shuffle=False,  # a run shuffles by itself, the same in every process
            seed=source.seed,
            num_epochs=None if mixture else 1,
        )
    except ValueError as error:  # seqio checks the features that the preprocessors give
        raise UserError(
            f"seqio's {source.name} does not give the features that it promises ({str(error)[:300]}); its examples "
            f"must be ids: end its preprocessors with seqio.preprocessors.tokenize, or give its text by a source of "
            f"text"
        ) from None
    return provider, dataset.take(source.examples) if source.examples else dataset


def _examples(source: Seqio, dataset: Any) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
    """Yields (inputs, targets) of each example; inputs are None if the task has none."""
    import tensorflow as tf

    try:
        for example in dataset.as_numpy_iterator():
            yield example["inputs"] if source.inputs_tokens else None, example["targets"]
    except tf.errors.OpError as error:
        raise UserError(f"seqio's {source.name} cannot be read to its end ({str(error)[:300]})") from None


def _write_tokens(examples: Iterator[np.ndarray], skip: int) -> tuple[str, np.ndarray, int]:
    """Writes the tokens into the cache folder.

    Args:
      skip: number of entries at the start of each example that are not ids.

    Returns:
      path of the file; int64[examples], the end of each in tokens; the highest id.
    """
    digest, lengths, highest = hashlib.sha256(), [], 0
    target = cache_folder() / "tokens.seqio"

    def name() -> str:
        return f"{digest.hexdigest()[:16]}.seqio"

    # the file is named after its content, which is known only when all of it is written
    with replacing(target, named=name) as part, open(part, "wb") as out:
        for example in examples:
            data = example.astype("<i4")
            out.write(data.tobytes())
            digest.update(len(data).to_bytes(8, "little") + data.tobytes())
            lengths.append(len(data))
            highest = max(highest, int(data[skip:].max()))
    return str(target.with_name(name())), np.cumsum(np.array(lengths, np.int64)), highest


def _encode_probes(vocabulary: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Returns the ids of PROBES; none for a task whose examples are ids from the start."""
    import seqio

    if isinstance(vocabulary, seqio.PassThroughVocabulary):
        return ()
    return tuple((text, tuple(map(int, vocabulary.encode(text)))) for text in PROBES)
