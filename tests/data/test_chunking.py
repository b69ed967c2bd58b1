"""Chunks: every token of a document is in exactly one; documents that are too short are counted."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5g2.core.errors import UserError
from t5g2.data.chunking import Chunks, describe, open_chunks
from t5g2.data.corpus import open_corpus
from t5g2.data.sources.documents import SHORTEST_TOKENS, Documents
from t5g2.data.sources.text_files import Jsonl, TextFiles
from t5g2.data.tokenizers.byte_level import Bytes
from tests.data import corpus


class InMemory(Documents):
    """Texts in memory, as a source opens them."""

    fingerprint, skipped, characters = "", 0, 0

    def __init__(self, texts):
        self._texts = list(texts)

    def __len__(self):
        return len(self._texts)

    def __getitem__(self, index):
        return self._texts[index]


def chunks_of(*lengths: int, chunk: int) -> list[int]:
    chunks = Chunks(InMemory("x" * n for n in lengths), Bytes(), chunk)
    return [len(chunks[i]) for i in range(len(chunks))]


def test_the_chunks_of_the_docstring():
    assert chunks_of(40, chunk=16) == [16, 16, 8]
    assert chunks_of(34, chunk=16) == [16, 9, 9]
    assert chunks_of(7, chunk=16) == []
    assert chunks_of(40, 7, 34, 16, 17, chunk=16) == [16, 16, 8, 16, 9, 9, 16, 9, 8]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.text(max_size=120), max_size=8), st.integers(2 * SHORTEST_TOKENS, 64))
def test_every_token_is_in_one_chunk(texts, chunk):
    tokenizer = Bytes()
    chunks = Chunks(InMemory(texts), tokenizer, chunk)
    long_enough = [tokenizer.encode(t) for t in texts if tokenizer.count(t) >= SHORTEST_TOKENS]
    assert chunks.dropped == len(texts) - len(long_enough)
    assert chunks.tokens == sum(map(len, long_enough))
    cut = [chunks[i] for i in range(len(chunks))]
    assert all(SHORTEST_TOKENS <= len(p) <= chunk for p in cut)
    empty = [np.empty(0, np.int32)]
    np.testing.assert_array_equal(np.concatenate(cut + empty), np.concatenate(long_enough + empty))


@settings(derandomize=True, deadline=None)
@given(st.lists(st.text(max_size=120), max_size=8), st.integers(2 * SHORTEST_TOKENS, 64))
def test_truncated_documents_are_their_first_tokens(texts, chunk):
    tokenizer = Bytes()
    chunks = Chunks(InMemory(texts), tokenizer, chunk, long_documents="truncate")
    long_enough = [tokenizer.encode(t) for t in texts if tokenizer.count(t) >= SHORTEST_TOKENS]
    assert [chunks[i].tolist() for i in range(len(chunks))] == [tokens[:chunk].tolist() for tokens in long_enough]
    assert chunks.truncated == sum(len(tokens) > chunk for tokens in long_enough)
    assert chunks.tokens == sum(min(len(tokens), chunk) for tokens in long_enough)


def test_a_run_may_truncate(tmp_path):
    whole = open_corpus(corpus.mixed(tmp_path, rows=2, streams=2))
    cut = open_corpus(corpus.mixed(tmp_path, rows=2, streams=2, long_documents="truncate"))
    assert [len(chunks) for chunks in cut.chunks] == [23, 5]
    assert len(whole.chunks[0]) > 23
    assert cut.fingerprint != whole.fingerprint
    assert "documents cut off" in describe("many", cut.chunks[0])
    assert not whole.chunks[0].truncated


def test_text_that_changes_under_a_run_is_noticed(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "x" * 40}))
    chunks = open_chunks(Jsonl(str(file)), Bytes(), chunk_tokens=64, on_bad_record="stop")
    assert len(chunks[0]) == 40
    file.write_text(json.dumps({"text": "x" * 32, "a": 1}))  # as many bytes
    with pytest.raises(UserError, match=r"document 0 has 32 tokens, and had 40 when its source was opened"):
        chunks[0]
    file.write_text(json.dumps({"text": "x" * 20}))
    with pytest.raises(UserError, match=r"a\.jsonl has changed since it was opened: it had 52 bytes"):
        chunks[0]


def test_a_corpus_of_short_documents(tmp_path):
    corpus.write_files(tmp_path, a__txt="short", b__txt="tiny")
    with pytest.raises(UserError, match="2 documents, all of fewer than 8 tokens; give longer ones"):
        open_chunks(TextFiles(str(tmp_path)), Bytes(), chunk_tokens=16, on_bad_record="stop")


def test_the_description_of_a_source(tmp_path):
    corpus.write_files(tmp_path, a__txt="a first text\n" * 2, b__txt="short")
    chunks = open_chunks(TextFiles(str(tmp_path)), Bytes(), chunk_tokens=16, on_bad_record="stop")
    assert describe("mine", chunks) == "mine: 2 documents, 31 characters, 26 tokens, 2 chunks, 1 documents too short"
