"""Answers: a model reads a dialogue and is asked for its own turns: supervised fine-tuning.

A record is one text that says where turns begin and end, as chat templates do. Gemma's
(https://ai.google.dev/gemma/docs/formatting):

    <start_of_turn>user
    What is 2 + 2?<end_of_turn>
    <start_of_turn>model
    4<end_of_turn>

So an objective needs no other input than tokens: it finds the turns by the ids that begin and end them. Chunks must
hold whole records: chunk_tokens is at least the length of the longest.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from t5g2.core.batch import Example
from t5g2.core.errors import UserError, unknown
from t5g2.core.objective import Objective
from t5g2.core.special_tokens import SpecialTokens
from t5g2.objectives.teacher_forcing import teacher_forced


@dataclass(frozen=True)
class SupervisedFineTuning(Objective):
    """The encoder reads the prompt, the decoder is asked for the answer.

    With bos = 2, eos = 1, answers that begin after [50 51] and end with [60], other turns that begin with [50 52]:

        tokens  [50 52 11 60  50 51 12 13 60  50 52 14 60  50 51 15 60]

        turns = "last"   encoder_tokens  [50 52 11 60 50 51 12 13 60 50 52 14 60 50 51]
                         targets         [15 60  1]
                         weights         [ 1  1  1]

        turns = "all"    encoder_tokens  [50 52 11 60 50 51]
                         targets         [12 13 60 50 52 14 60 50 51 15 60  1]
                         weights         [ 1  1  1  0  0  0  0  0  0  1  1  1]

    What follows the last answer, such as the template's last line break, is left out.

    Attributes:
      starts: the ids that a turn of the model's begins with; they belong to the prompt. Gemma's are those of
        "<start_of_turn>model" and a line break: tuple(tokenizer.encode("<start_of_turn>model\\n").tolist()).
      ends: the ids that a turn ends with; they belong to the answer. Gemma's: those of "<end_of_turn>". An answer
        that does not end is the rest of the chunk.
      turns: "last" = the prompt is everything before the last answer, "all" = before the first; then every answer
        counts, and the turns between are read by the decoder and do not count.
      eos: the targets end in EOS.
    """

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    turns: Literal["last", "all"] = "last"
    eos: bool = True

    def __post_init__(self):
        for name in ("starts", "ends"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty; give the ids that an answer {name[:-1]}s with, at least one")

    @property
    def is_stochastic(self) -> bool:
        """No."""
        return False

    @property
    def denoisers(self) -> tuple[str, ...]:
        """One: "answers"."""
        return ("answers",)

    @property
    def weights(self) -> tuple[float, ...]:
        """All of the examples."""
        return (1.0,)

    def lengths(self, tokens: int) -> tuple[int, int]:
        """A prompt of all tokens but one; an answer of all but what it begins with, and EOS."""
        return tokens - 1, tokens - len(self.starts) + self.eos

    def sentinels_needed(self, tokens: int) -> int:
        """None."""
        return 0

    def check_tokenizer(self, special_tokens: SpecialTokens, vocab_size: int) -> None:
        """Raises UserError if starts or ends has an id that there is not."""
        for name in ("starts", "ends"):
            if not all(0 <= token < vocab_size for token in getattr(self, name)):
                raise UserError(f"{name} = {getattr(self, name)}; the tokenizer's ids are 0 to {vocab_size - 1}")

    def only(self, denoiser: str) -> "SupervisedFineTuning":
        """Itself."""
        if denoiser not in self.denoisers:
            raise unknown("denoiser", denoiser, self.denoisers)
        return self

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> Example:
        """The example of int32[L] tokens; nothing is drawn.

        Raises:
          UserError: the chunk has no answer.
        """
        answers = self.answers(tokens)
        begin, end = answers[0][0], answers[-1][1]
        example = teacher_forced(
            tokens[:begin], tokens[begin:end], np.arange(begin, end), special_tokens=special_tokens, eos=self.eos
        )
        example.weights[:] = _counted(answers, len(example.targets), begin)
        return example

    def answers(self, tokens: np.ndarray) -> list[tuple[int, int]]:
        """(begin, end) of each answer that counts, in their order; none is empty.

        Raises:
          UserError: there are none.
        """
        ends = _places(tokens, self.ends) + len(self.ends)
        found: list[tuple[int, int]] = []
        for begin in (_places(tokens, self.starts) + len(self.starts)).tolist():
            if begin >= len(tokens) or (found and begin - len(self.starts) < found[-1][1]):
                continue  # cut off before its first token; or inside an answer, where it is text
            later = ends[ends >= begin + len(self.ends)]
            found.append((begin, int(later[0]) if len(later) else len(tokens)))
        if not found:
            raise UserError(
                f"a chunk of {len(tokens)} tokens has no answer: none begins after {list(self.starts)}; records spell "
                f"out where answers begin, and chunk_tokens is at least the length of the longest record"
            )
        return found[-1:] if self.turns == "last" else found


@dataclass(frozen=True)
class SupervisedFineTuningDecoder(SupervisedFineTuning):
    """Answers for a decoder-only model: it reads the prompt as its own past.

    With the dialogue of Answers cut after its first answer, tokens [50 52 11 60 50 51 12 13 60]:

        encoder_tokens  []
        decoder_tokens  [ 2 50 52 11 60 50 51 12 13 60]
        targets         [50 52 11 60 50 51 12 13 60  1]
        weights         [ 0  0  0  0  0  0  1  1  1  1]
        blocks          [ 1  1  1  1  1  1  1  0  0  0]    with both_ways=True; else none

    Attributes:
      both_ways: the tokens before the first answer that counts see each other both ways.
    """

    both_ways: bool = False

    @property
    def uses_blocks(self) -> bool:
        """Whether the prompt sees itself both ways."""
        return self.both_ways

    def lengths(self, tokens: int) -> tuple[int, int]:
        """0 for the encoder, the tokens and EOS for the decoder."""
        return 0, tokens + self.eos

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> Example:
        """The example of int32[L] tokens; nothing is drawn.

        Raises:
          UserError: the chunk has no answer.
        """
        answers = self.answers(tokens)
        begin, end = answers[0][0], answers[-1][1]
        example = teacher_forced(
            np.empty(0, np.int32), tokens[:end], np.arange(end), special_tokens=special_tokens, eos=self.eos
        )
        example.weights[:] = _counted(answers, len(example.targets), 0)
        if not self.both_ways:
            return example
        blocks = np.zeros(len(example.targets), np.int32)
        blocks[: begin + 1] = 1  # BOS too
        return replace(example, blocks=blocks)


def _places(tokens: np.ndarray, pattern: tuple[int, ...]) -> np.ndarray:
    """int64[places]: where the pattern begins; in [5 6 5 6] the pattern (5, 6) at [0 2]."""
    if len(tokens) < len(pattern):
        return np.empty(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(pattern))
    return np.flatnonzero((windows == np.array(pattern)).all(axis=1))


def _counted(answers: list[tuple[int, int]], targets: int, first: int) -> np.ndarray:
    """float32[targets]: 1 for tokens of answers, of which target 0 is token `first`, and for EOS."""
    weights = np.zeros(targets, np.float32)
    for begin, end in answers:
        weights[begin - first : end - first] = 1.0
    weights[answers[-1][1] - first :] = 1.0
    return weights
