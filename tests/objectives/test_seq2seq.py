"""Pairs: what a source gives as inputs and targets is what encoder and decoder get."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5g2.core import pairs
from t5g2.core.errors import UserError
from t5g2.data.chunking import Chunks, open_chunks
from t5g2.data.sources.documents import Documents
from t5g2.data.sources.python_text import PythonText
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.objectives import Seq2Seq
from tests.objectives.arrays import RNG, SPECIALS, assert_example


class Pairs(Documents):
    """Pairs in memory, as a source opens them."""

    fingerprint, skipped, characters, has_pairs = "", 0, 0, True

    def __init__(self, *of):
        self._pairs = [pairs.join(np.arange(100, 100 + i), np.arange(200, 200 + t)) for i, t in of]

    def __len__(self):
        return len(self._pairs)

    def __getitem__(self, index):
        raise NotImplementedError

    def token_lengths(self, tokenizer):
        return np.array([len(pair) for pair in self._pairs])

    def tokens(self, index, tokenizer):
        return self._pairs[index]


def test_the_drawn_example():
    pair = pairs.join(np.array([11, 12, 13]), np.array([21, 22, 1]))
    assert pair.tolist() == [3, 11, 12, 13, 21, 22, 1]
    example = Seq2Seq(8, 8)(pair, RNG, special_tokens=SPECIALS)
    assert_example(
        example, encoder_tokens=[11, 12, 13], decoder_tokens=[2, 21, 22], targets=[21, 22, 1], weights=[1, 1, 1]
    )
    example = Seq2Seq(8, 8, eos=True)(pair[:-1], RNG, special_tokens=SPECIALS)
    assert example.targets.tolist() == [21, 22, 1]


@given(inputs=st.integers(0, 40), targets=st.integers(1, 40), eos=st.booleans())
def test_a_pair_comes_apart_as_it_was_and_fits_the_lengths(inputs, targets, eos):
    read, asked = np.arange(100, 100 + inputs, dtype=np.int32), np.arange(200, 200 + targets, dtype=np.int32)
    objective, pair = Seq2Seq(40, 40, eos=eos), pairs.join(read, asked)
    example = objective(pair, RNG, special_tokens=SPECIALS)
    np.testing.assert_array_equal(example.encoder_tokens, read)
    np.testing.assert_array_equal(example.targets[:targets], asked)
    encoder, decoder = objective.lengths(len(pair))
    assert len(example.encoder_tokens) <= encoder
    assert len(example.targets) <= decoder


def test_pairs_are_kept_whole_however_short():
    chunks = Chunks(Pairs((3, 1), (0, 1), (20, 11)), Bytes(), 32)
    assert [len(chunks[i]) for i in range(len(chunks))] == [5, 2, 32]
    assert chunks.dropped == 0
    message = r"has 33 tokens \(with the number of inputs\), and chunk_tokens is 32; raise it"
    with pytest.raises(UserError, match=message):
        Chunks(Pairs((21, 11)), Bytes(), 32)


def test_bounds_and_texts_are_errors():
    with pytest.raises(UserError, match="a pair has 3 inputs and 1 targets, and the objective's inputs_tokens = 2"):
        Seq2Seq(2, 8)(pairs.join(np.arange(3), np.arange(1)), RNG, special_tokens=SPECIALS)
    with pytest.raises(UserError, match="targets_tokens = 0; it must be at least 1"):
        Seq2Seq(2, 0)
    with pytest.raises(UserError, match="has text, and its objective takes pairs; the objective seq2seq takes pairs"):
        open_chunks(PythonText(max_bytes=300_000), Bytes(), chunk_tokens=32, on_bad_record="stop", pairs=True)
