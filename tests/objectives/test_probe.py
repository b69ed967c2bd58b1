"""Probes: the arrays of the docstrings, and labels as the bits of a float32."""

import numpy as np
import pytest

from t5g2.core import pairs
from t5g2.core.errors import UserError
from t5g2.core.special_tokens import SpecialTokens
from t5g2.data.preview import format_example
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.objectives import Probe, ProbeDecoder

SPECIAL_TOKENS = SpecialTokens(pad=0, eos=1, bos=2, unk=3, mask=4, first_sentinel=90, sentinels=2)
RNG = np.random.default_rng(0)


def labelled(tokens, label):
    return pairs.join(np.array(tokens), np.array([label], np.float32).view(np.int32))


def test_the_decoder_reads_bos_alone():
    example = Probe()(labelled([11, 12, 13], 1), RNG, special_tokens=SPECIAL_TOKENS)
    assert example.encoder_tokens.tolist() == [11, 12, 13]
    assert (example.decoder_tokens.tolist(), example.targets.tolist(), example.weights.tolist()) == ([2], [0], [1])
    assert example.label == 1.0
    assert labelled([11, 12, 13], 0).tolist() == [3, 11, 12, 13, 0]
    assert labelled([11], 1).tolist() == [1, 11, 1065353216]


def test_a_decoder_only_model_reads_bos_and_the_text():
    example = ProbeDecoder()(labelled([11, 12, 13], -2.5), RNG, special_tokens=SPECIAL_TOKENS)
    assert example.encoder_tokens.tolist() == []
    assert example.decoder_tokens.tolist() == [2, 11, 12, 13]
    assert (example.targets.tolist(), example.weights.tolist()) == ([0] * 4, [0, 0, 0, 1])
    assert example.label == -2.5


@pytest.mark.parametrize("objective", [Probe(), ProbeDecoder()])
def test_lengths_are_those_of_the_longest_pair(objective):
    example = objective(labelled([11] * 14, 0), RNG, special_tokens=SPECIAL_TOKENS)
    assert objective.lengths(16) == (len(example.encoder_tokens), len(example.decoder_tokens))
    assert objective.text(labelled([11, 12], 3)).tolist() == [11, 12]
    assert objective.only("probe") is objective
    with pytest.raises(UserError, match="unknown denoiser 'causal'"):
        objective.only("causal")


@pytest.mark.parametrize("objective", [Probe(), ProbeDecoder()])
def test_a_preview_shows_text_and_label(objective):
    tokenizer = Bytes()
    pair = labelled(tokenizer.encode("two\nlines"), 2)
    example = objective(pair, RNG, special_tokens=tokenizer.special_tokens)
    assert format_example(example, tokenizer) == "text     two⏎lines\nlabel    2"
