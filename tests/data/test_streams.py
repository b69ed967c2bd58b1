"""Streams: exact mixes, different draws, examples that depend on nothing but their number."""

import dataclasses

import grain
import numpy as np
import pytest

from t5g2.core.seeds import derive_seed
from t5g2.data import examples
from t5g2.data.corpus import open_corpus
from t5g2.data.examples import source_examples
from t5g2.data.streams import StreamReader
from t5g2.data.tokenizers.byte_level import Bytes
from tests.data import corpus


def test_example_k_is_a_pure_function_of_k(tmp_path):
    opened = open_corpus(corpus.mixed(tmp_path, rows=2, streams=4))
    one, other = source_examples(opened, 0, seed=5), source_examples(opened, 0, seed=5)
    chunks = len(opened.chunks[0])
    for k in (0, 7, chunks, 3 * chunks + 1):
        _ = other[k + 1]  # whatever was drawn before
        for name in one[k]:
            np.testing.assert_array_equal(one[k][name], other[k][name])
        assert one[k]["ids"][0, 0] == 2 * k


def test_epochs_are_shuffled_anew_and_denoised_anew(tmp_path):
    opened = open_corpus(corpus.mixed(tmp_path, rows=2, streams=4))
    source, chunks = source_examples(opened, 0, seed=5), len(opened.chunks[0])
    denoisers = np.array([source[k]["ids"][0, 1] for k in range(2 * chunks)]).reshape(2, chunks)
    assert not np.array_equal(denoisers[0], denoisers[1])
    shuffled = opened.chunks[0]
    assert len({tokens.tobytes() for tokens in (shuffled[i] for i in range(chunks))}) == chunks
    assert not np.array_equal(source[0]["encoder"], source[chunks]["encoder"])


@pytest.mark.parametrize("count", [10, examples.FEW + 1])
def test_the_order_of_an_epoch_is_that_of_grain(count, monkeypatch):
    """And that of few chunks, an entry of which takes milliseconds, is computed once for all who read it."""
    numbers = [np.array([n]) for n in range(count)]

    def order():
        source = examples.SourceExamples(numbers, lambda k, chunk: chunk.index, seed=2**32 - 1)
        return [[source[epoch * count + place] for place in range(min(count, 50))] for epoch in (0, 1)]

    expected = [
        list(grain.MapDataset.source(numbers).seed(0).shuffle(seed=seed).slice(slice(50))) for seed in (2**32 - 1, 0)
    ]
    assert order() == [[int(number[0]) for number in epoch] for epoch in expected]
    monkeypatch.setattr("grain.experimental.index_shuffle", lambda *args, **settings: 1 / 0)
    if count <= examples.FEW:
        assert order() == [[int(number[0]) for number in epoch] for epoch in expected]
    else:
        with pytest.raises(ZeroDivisionError):
            order()


def test_streams_see_different_draws(tmp_path):
    opened = open_corpus(corpus.mixed(tmp_path, rows=2, streams=4))
    ids = []
    for stream in range(4):
        reader = StreamReader(opened, stream, seed=5)
        ids.append([int(i) for _ in range(6) for i in reader.next()["ids"][:, 0] if i >= 0])
    flat = [i for part in ids for i in part]
    assert len(set(flat)) == len(flat)
    for stream, part in enumerate(ids):
        assert {i // 2 % 4 for i in part} == {stream}
        # both sources in every stream, in the mix's proportion
        share = np.mean([i % 2 == 0 for i in part])
        assert abs(share - 0.75) < 0.15


def test_the_fingerprint_changes_with_text_tokenizer_and_cut(tmp_path):
    config = corpus.mixed(tmp_path, rows=2, streams=4)
    same = {open_corpus(dataclasses.replace(config, **changes)).fingerprint for changes in ({}, {"rows": 4})}
    assert len(same) == 1
    for changes in ({"tokenizer": Bytes(101)}, {"chunk_tokens": 39}, {"sources": config.sources[:1]}):
        assert open_corpus(dataclasses.replace(config, **changes)).fingerprint not in same


def test_seeds_differ_by_name():
    names = [("shuffle", 0), ("shuffle", 1), ("mix",), ("rows", 0), ("example",)]
    assert len({derive_seed(seed, *name) for seed in (0, 1) for name in names}) == 10
    assert derive_seed(0, "mix") == derive_seed(0, "mix") < 2**32
