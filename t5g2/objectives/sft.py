"""Supervised fine-tuning: a model reads a dialogue and is trained on its own turns.

A record is one text in which a chat template marks the turns. Gemma's
(https://ai.google.dev/gemma/docs/formatting):

    <start_of_turn>user
    What is 2 + 2?<end_of_turn>
    <start_of_turn>model
    4<end_of_turn>

An answer is a turn of the model. The objective finds answers by the ids that begin and end them, so tokens are its only
input. Chunks must hold whole records: chunk_tokens is at least the length of the longest.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from typing_extensions import override

from t5g2.core.batch import Example
from t5g2.core.bounds import TokenId, checked
from t5g2.core.errors import UserError
from t5g2.core.objective import OneDenoiser
from t5g2.core.special_tokens import SpecialTokens
from t5g2.objectives.teacher_forcing import teacher_forced


@dataclass(frozen=True)
@checked
class SupervisedFineTuning(OneDenoiser):
    """The encoder reads the prompt, the decoder predicts the answer.

    With bos = 2, eos = 1, answers that begin after [50 51] and end with [60], other turns that begin with [50 52]:

        tokens  [50 52 11 60  50 51 12 13 60  50 52 14 60  50 51 15 60]

        turns = "last"   encoder_tokens  [50 52 11 60 50 51 12 13 60 50 52 14 60 50 51]
                         targets         [15 60  1]
                         weights         [ 1  1  1]

        turns = "all"    encoder_tokens  [50 52 11 60 50 51]
                         targets         [12 13 60 50 52 14 60 50 51 15 60  1]
                         weights         [ 1  1  1  0  0  0  0  0  0  1  1  1]

    Tokens after the last answer, such as the template's last line break, are left out.

    Attributes:
      starts: the ids that begin a turn of the model; they belong to the prompt. Gemma's are those of
        "<start_of_turn>model" and a line break: tuple(tokenizer.encode("<start_of_turn>model\\n").tolist()).
      ends: the ids that end a turn; they belong to the answer. Gemma's: those of "<end_of_turn>". An answer without an
        end is the rest of the chunk.
      turns: "last" = the prompt is everything before the last answer. "all" = the prompt is everything before the first
        answer; all answers have a loss, and the turns between them are decoder inputs without a loss.
      eos: the targets end in EOS.
    """

    starts: tuple[TokenId, ...]
    ends: tuple[TokenId, ...]
    turns: Literal["last", "all"] = "last"
    eos: bool = True

    def __post_init__(self):
        for name in ("starts", "ends"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty; give the ids that an answer {name[:-1]}s with, at least one")

    @property
    @override
    def identity(self) -> str:
        # folders of teacher logits were written under the former name of these classes
        return repr(self).replace("SupervisedFineTuning", "Answers", 1)

    @property
    @override
    def is_stochastic(self) -> bool:
        return False

    @property
    @override
    def denoisers(self) -> tuple[str, ...]:
        # the name of its scores (heldout/loss/answers) since before the objective was called sft: kept, so that the
        # curves of a run that goes on, and of runs that are compared, have one name
        return ("answers",)

    @override
    def lengths(self, tokens: int) -> tuple[int, int]:
        return tokens - 1, tokens - len(self.starts) + self.eos

    @override
    def check_tokenizer(self, special_tokens: SpecialTokens, vocab_size: int) -> None:
        for name in ("starts", "ends"):
            if not all(0 <= token < vocab_size for token in getattr(self, name)):
                raise UserError(f"{name} = {getattr(self, name)}; the tokenizer's ids are 0 to {vocab_size - 1}")

    @override
    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> Example:
        """Returns the example of int32[L] tokens.

        Raises:
          UserError: the chunk has no answer.
        """
        answers = self.answers(tokens)
        # one example with all answers that have a loss: the prompt before them, nothing after them
        begin, end = answers[0][0], answers[-1][1]
        example = teacher_forced(
            tokens[:begin], tokens[begin:end], np.arange(begin, end), special_tokens=special_tokens, eos=self.eos
        )
        example.weights[:] = _answer_weights(answers, len(example.targets), begin)
        return example

    def answers(self, tokens: np.ndarray) -> list[tuple[int, int]]:
        """Returns (begin, end) of each answer that has a loss, in order; none is empty.

        Raises:
          UserError: there are none.
        """
        ends = _find(tokens, self.ends) + len(self.ends)
        spans: list[tuple[int, int]] = []
        for begin in (_find(tokens, self.starts) + len(self.starts)).tolist():
            # no answer begins here: the chunk ends, or these ids are inside an answer, where they are text
            if begin >= len(tokens) or (spans and begin - len(self.starts) < spans[-1][1]):
                continue
            later_ends = ends[ends >= begin + len(self.ends)]
            spans.append((begin, int(later_ends[0]) if len(later_ends) else len(tokens)))
        if not spans:
            raise UserError(
                f"a chunk of {len(tokens)} tokens has no answer: none begins after {list(self.starts)}; give records "
                f"in which these ids precede answers, and a chunk_tokens of at least the longest record's length"
            )
        return spans[-1:] if self.turns == "last" else spans


@dataclass(frozen=True)
class SupervisedFineTuningDecoder(SupervisedFineTuning):
    """SupervisedFineTuning for a decoder-only model: the prompt is the beginning of the decoder's input.

    With the dialogue of SupervisedFineTuning cut after its first answer, tokens [50 52 11 60 50 51 12 13 60]:

        encoder_tokens  []
        decoder_tokens  [ 2 50 52 11 60 50 51 12 13 60]
        targets         [50 52 11 60 50 51 12 13 60  1]
        weights         [ 0  0  0  0  0  0  1  1  1  1]
        blocks          [ 1  1  1  1  1  1  1  0  0  0]    with both_ways=True; else none

    Attributes:
      both_ways: attention within the prompt, up to the first answer that has a loss, is bidirectional.
    """

    both_ways: bool = False

    @property
    @override
    def uses_blocks(self) -> bool:
        return self.both_ways

    @override
    def lengths(self, tokens: int) -> tuple[int, int]:
        return 0, tokens + self.eos

    @override
    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, *, special_tokens: SpecialTokens) -> Example:
        """Returns the example of int32[L] tokens.

        Raises:
          UserError: the chunk has no answer.
        """
        answers = self.answers(tokens)
        begin, end = answers[0][0], answers[-1][1]
        example = teacher_forced(
            np.empty(0, np.int32), tokens[:end], np.arange(end), special_tokens=special_tokens, eos=self.eos
        )
        example.weights[:] = _answer_weights(answers, len(example.targets), 0)
        if not self.both_ways:
            return example
        blocks = np.zeros(len(example.targets), np.int32)
        blocks[: begin + 1] = 1  # BOS too
        return replace(example, blocks=blocks)


def _find(tokens: np.ndarray, pattern: tuple[int, ...]) -> np.ndarray:
    """Returns int64[N], the positions at which the pattern begins; of (5, 6) in [5 6 5 6]: [0 2]."""
    if len(tokens) < len(pattern):
        return np.empty(0, np.int64)
    # a view: one row for each position, no copy
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(pattern))
    return np.flatnonzero((windows == np.array(pattern)).all(axis=1))


def _answer_weights(answers: list[tuple[int, int]], targets: int, first: int) -> np.ndarray:
    """Returns float32[targets]: 1 for tokens of answers and for EOS; target 0 is token `first` of the chunk."""
    weights = np.zeros(targets, np.float32)
    for begin, end in answers:
        weights[begin - first : end - first] = 1.0
    weights[answers[-1][1] - first :] = 1.0
    return weights
