"""Options of generation, by the names of transformers where it has the same."""

from dataclasses import dataclass
from typing import Annotated, Literal

from t5g2.core.bounds import Bounds, CountOrZero, Size, TokenId, checked
from t5g2.core.errors import UserError
from t5g2.eval.sampling import GREEDY, Greedy, Sampler
from t5g2.models.layers import Compute

FLOAT32 = Compute(dtype="float32")
EarlyStopping = Literal[True, False, "never"]
# more beams than this are a slip of the keyboard: each has a cache of its own
BeamCount = Annotated[int, Bounds(least=1, most=1024)]
LengthPenalty = Annotated[float, Bounds(least=-5, most=5)]
# beyond, logits would overflow float32
RepetitionPenalty = Annotated[float, Bounds(least=1e-6, most=1_000_000)]


@dataclass(frozen=True)
@checked
class GenerationOptions:
    """Options of generation; static under jit.

    Attributes:
      max_new_tokens: largest number of tokens of an output; one ends earlier at the first of `stop_ids`, or when its
        text has one of the strings that the caller gives.
      stop_ids: EOS, and other tokens that end an output (Gemma 3's instruction-tuned models: <end_of_turn> too).
      pad_id: the id that follows the end of an output.
      sampler: rule by which the next token is chosen.
      compute: dtype and attention backend of the forward pass.
      suppressed_ids: ids that are never generated (google-deepmind/gemma excludes the tokens around images).
      prompt_both_ways: attention within a decoder-only model's prompt is bidirectional, as PrefixLMDecoder trains it.
      min_new_tokens: no output ends with one of `stop_ids` before it has so many tokens.
      repetition_penalty: logits of tokens that the prompt of the decoder or the output has are divided by it where they
        are positive, and multiplied where they are negative; 1 = none (arXiv 1909.05858).
      num_return_sequences: outputs of each prompt: samples, or the best beams.
      num_beams: sequences of each prompt that beam search follows at a time; 1 = no beam search.
      length_penalty: beams are ranked by the sum of their log-probabilities / number of tokens ** length_penalty.
      early_stopping: end of the search of a prompt: True = once there are num_beams outputs; False = once a sequence
        that goes on, ranked as if it ended now, would be behind all of them; "never" = once it would be behind them at
        any length.
      log_probs: also return the log-probability of each token.
    """

    max_new_tokens: Size
    stop_ids: tuple[TokenId, ...]
    pad_id: TokenId
    sampler: Sampler = GREEDY
    compute: Compute = FLOAT32
    suppressed_ids: tuple[TokenId, ...] = ()
    prompt_both_ways: bool = False
    min_new_tokens: CountOrZero = 0
    repetition_penalty: RepetitionPenalty = 1.0
    num_return_sequences: BeamCount = 1
    num_beams: BeamCount = 1
    length_penalty: LengthPenalty = 1.0
    early_stopping: EarlyStopping = False
    log_probs: bool = False

    def __post_init__(self):
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens = {self.min_new_tokens} is more than max_new_tokens = {self.max_new_tokens}; lower "
                f"the first, or raise the second"
            )
        is_greedy = isinstance(self.sampler, Greedy)
        if self.num_beams > 1 and not is_greedy:
            raise UserError(
                f"num_beams = {self.num_beams} and a sampler: beam search draws nothing; set num_beams to 1 for "
                f"samples, or leave the sampler (the temperature) out for beams"
            )
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise UserError(
                f"num_return_sequences = {self.num_return_sequences} is more than num_beams = {self.num_beams}; raise "
                f"num_beams to as many"
            )
        if self.num_beams == 1 and self.num_return_sequences > 1 and is_greedy:
            raise UserError(
                f"num_return_sequences = {self.num_return_sequences} outputs would all be the likeliest tokens; give a "
                f"sampler (a temperature above 0), or num_beams of at least as many"
            )

    @property
    def copies(self) -> int:
        """Rows that are decoded for each prompt: its samples or its beams."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences
