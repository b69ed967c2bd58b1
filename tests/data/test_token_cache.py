"""Tokens made once: the batches of the text itself, found again, made anew where something is lost."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from t5g2.core.errors import UserError
from t5g2.data.chunking import open_chunks
from t5g2.data.pipeline import Pipeline
from t5g2.data.shards import token_cache, token_shards
from t5g2.data.sources.text_files import Jsonl, TextFiles
from t5g2.data.tokenizers.byte_level import Bytes
from tests.data import corpus


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def tokenisings(monkeypatch):
    """Counts the texts that are tokenised."""
    made = []
    encode = Bytes.encode
    monkeypatch.setattr(Bytes, "encode", lambda self, text: made.append(text) or encode(self, text))
    return made


def batches(config, count=4):
    with Pipeline(config, seed=3) as pipeline:
        found = [pipeline.next() for _ in range(count)]
        return pipeline.corpus.fingerprint, found


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_batches_are_those_of_the_text_and_nothing_is_tokenised_twice(tmp_path, cache, tokenisings):
    config = corpus.mixed(tmp_path, rows=4, streams=4)
    cached = dataclasses.replace(config, cache_tokens=True)
    plain, once = batches(config), batches(cached)
    before = len(tokenisings)
    again = batches(cached)
    assert len(tokenisings) == before
    assert plain[0] == once[0] == again[0]
    assert_same(plain[1], once[1])
    assert_same(plain[1], again[1])
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == len(config.sources)


def test_another_text_or_tokenizer_has_tokens_of_its_own(tmp_path, cache):
    (tmp_path / "text").mkdir()
    file = tmp_path / "text" / "a.txt"

    def found(tokenizer):
        documents = TextFiles(str(tmp_path / "text")).open(on_bad_record="stop")
        return token_cache.cached_tokens(documents, tokenizer).tokens(0, tokenizer).tolist()

    file.write_text("the cat sat on the mat")
    first = found(Bytes())
    assert first == Bytes().encode("the cat sat on the mat").tolist()
    file.write_text("the dog sat on the mat")
    assert found(Bytes()) == Bytes().encode("the dog sat on the mat").tolist()
    assert found(Bytes(sentinels=7)) == Bytes(sentinels=7).encode("the dog sat on the mat").tolist()
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 3


@pytest.mark.parametrize("lost", ["cut", "missing"])
def test_a_folder_that_has_lost_something_is_made_anew(tmp_path, cache, lost):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"text": "the text of record {i}"}}\n' for i in range(9)))
    opened = Jsonl(str(file)).open(on_bad_record="stop")
    want = [token_cache.cached_tokens(opened, Bytes()).tokens(i, Bytes()).tolist() for i in range(9)]
    [folder] = [folder for folder in cache.iterdir() if folder.is_dir()]
    [shard] = folder.glob("*.array_record")
    if lost == "cut":
        shard.write_bytes(shard.read_bytes()[:-40])
    else:
        shard.unlink()
    documents = token_cache.cached_tokens(opened, Bytes())
    assert [documents.tokens(i, Bytes()).tolist() for i in range(9)] == want


def test_an_interrupted_one_goes_on_after_its_last_whole_shard(tmp_path, cache, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"text": "the text of record {i}"}}\n' for i in range(9)))
    opened = Jsonl(str(file)).open(on_bad_record="stop")
    monkeypatch.setattr(token_cache, "SHARD_DOCUMENTS", 3)
    read, tokenised = type(opened).__getitem__, []

    def interrupted(self, index):
        if index == 5 and 5 not in tokenised:
            tokenised.append(index)
            raise KeyboardInterrupt
        tokenised.append(index)
        return read(self, index)

    monkeypatch.setattr(type(opened), "__getitem__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        token_cache.cached_tokens(opened, Bytes())
    del tokenised[:-1]
    documents = token_cache.cached_tokens(opened, Bytes())
    assert tokenised[1:] == [3, 4, 5, 6, 7, 8]
    assert documents.tokens(8, Bytes()).tolist() == Bytes().encode("the text of record 8").tolist()


def test_of_several_that_want_them_one_makes_them(tmp_path, cache, monkeypatch):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the cat sat on the mat " * 50)
    opened = TextFiles(str(tmp_path / "text")).open(on_bad_record="stop")
    writes, write = [], token_shards.write
    monkeypatch.setattr(token_shards, "write", lambda *a, **how: writes.append(1) or write(*a, **how))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(token_cache.cached_tokens(opened, Bytes()))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(writes) == 1
    assert len({tuple(documents.tokens(0, Bytes()).tolist()) for documents in found}) == 1
    assert len(found) == 4


def test_a_text_with_too_many_bad_records_is_not_tokenised(tmp_path, cache):
    """And says which they are, as it does without the cache."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "the text of a record"}\n{"txt": "no text"}\n')
    source = token_cache.CachedText(Jsonl(str(file)), Bytes(), 0.01)
    with pytest.raises(UserError, match=r"Jsonl.*a\.jsonl.*1 of 2 records cannot be read(.|\n)*line 2"):
        open_chunks(source, Bytes(), chunk_tokens=16, on_bad_record="skip")
    assert not cache.exists()
    kept = open_chunks(
        token_cache.CachedText(Jsonl(str(file)), Bytes(), 0.5),
        Bytes(),
        chunk_tokens=16,
        on_bad_record="skip",
        max_skipped=0.5,
    )
    assert kept.documents.skipped == 1


def test_tokens_made_ahead_are_not_kept_again(tmp_path, cache):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the cat sat on the mat " * 50)
    opened = TextFiles(str(tmp_path / "text")).open(on_bad_record="stop")
    made = token_cache.cached_tokens(opened, Bytes())
    assert token_cache.cached_tokens(made, Bytes()) is made


def test_a_cache_of_an_earlier_version_serves_unless_a_document_is_long(tmp_path, cache):
    """Its documents are read whole, so one with long documents is written anew, elsewhere: a run may be reading it."""
    for name, length, reused in (("short", 50, True), ("long", 2 * token_shards.RECORD_TOKENS, False)):
        file = tmp_path / f"{name}.txt"
        file.write_text("a b c " * (length // 6))
        documents, tokenizer = TextFiles(str(file)).open(), Bytes()
        former = token_cache._folder(f"{documents.fingerprint} {tokenizer.fingerprint()}")
        token_shards.write(token_shards.Job(documents, tokenizer, {}, 1, record_tokens=None), former)
        tokens = token_cache.cached_tokens(documents, tokenizer)
        assert (tokens._folder == former) == reused
        assert tokens.has_token_ranges != reused
        np.testing.assert_array_equal(tokens.tokens(0, tokenizer), documents.tokens(0, tokenizer))
        assert former.is_dir()
