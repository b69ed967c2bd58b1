"""Sources: documents in a fixed order, split by name, every token in one chunk; what is wrong is named."""

import json
import logging
import multiprocessing
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5g2.core.errors import UserError
from t5g2.data.chunking import Chunks, describe, open_chunks
from t5g2.data.corpus import open_corpus
from t5g2.data.sources.documents import SHORTEST_TOKENS, Documents
from t5g2.data.sources.python_text import PythonText
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


def test_the_drawn_pieces():
    assert chunks_of(40, chunk=16) == [16, 16, 8]
    assert chunks_of(34, chunk=16) == [16, 9, 9]
    assert chunks_of(7, chunk=16) == []
    assert chunks_of(40, 7, 34, 16, 17, chunk=16) == [16, 16, 8, 16, 9, 9, 16, 9, 8]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.text(max_size=120), max_size=8), st.integers(2 * SHORTEST_TOKENS, 64))
def test_every_token_is_in_one_piece(texts, chunk):
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


def test_a_line_that_ends_with_the_file_is_told(tmp_path):
    write(tmp_path, a__jsonl=b'{"text": "fine"}\n{"text": "cut o')
    whole = r"a\.jsonl, line 2, the last one and without a line end \(is the file whole\?\): not JSON"
    with pytest.raises(UserError, match=whole):
        Jsonl(str(tmp_path)).open()


def test_python_text_is_split_by_name():
    train, heldout, everything = (PythonText(split).open() for split in ("train", "heldout", "all"))
    texts = {split: {d[i] for i in range(len(d))} for split, d in [("train", train), ("heldout", heldout)]}
    assert not texts["train"] & texts["heldout"]
    assert texts["train"] | texts["heldout"] == {everything[i] for i in range(len(everything))}
    assert len(train) + len(heldout) == len(everything)
    assert 0.02 < len(heldout) / len(everything) < 0.2
    assert train.characters > 1_000_000
    # the language reference, and modules with their docstrings
    assert any(text.startswith('The "if" statement\n') for text in texts["train"] | texts["heldout"])
    assert any(text.startswith('"""') and "\nimport " in text for text in texts["train"])


def test_python_text_can_be_small():
    small = PythonText("train", max_bytes=300_000).open()
    assert 0 < sum(len(small[i].encode()) for i in range(len(small))) <= 300_000
    larger = PythonText("train", max_bytes=600_000).open()
    assert {small[i] for i in range(len(small))} < {larger[i] for i in range(len(larger))}
    with pytest.raises(UserError, match="no document of the standard library is in split 'train' with max_bytes = 1"):
        PythonText("train", max_bytes=1).open()
    with pytest.raises(UserError, match="heldout_percent = 0; it must be between 1 and 99"):
        PythonText(heldout_percent=0)


def write(folder, **texts):
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_bytes(text if isinstance(text, bytes) else text.encode())


def test_text_files_come_in_the_order_of_their_names(tmp_path):
    write(tmp_path, b__txt="second", a__txt="first", c__md="third")
    (tmp_path / "d").mkdir()
    write(tmp_path / "d", e__txt="fourth")

    def read(path):
        return list(TextFiles(str(path)).open())

    assert read(tmp_path) == ["first", "second", "third", "fourth"]
    assert read(tmp_path / "*.txt") == ["first", "second"]
    assert read(tmp_path / "**" / "*.txt") == ["first", "second", "fourth"]
    assert read(tmp_path / "a.txt") == ["first"]


def test_a_large_text_file_is_cut_at_ends_of_lines(tmp_path):
    text = "".join(f"line {i} é\n" for i in range(30_000))
    write(tmp_path, big__txt=text)
    documents = list(TextFiles(str(tmp_path)).open())
    assert len(documents) > 3
    assert "".join(documents) == text
    assert all(d.endswith("\n") for d in documents)


def test_jsonl(tmp_path):
    lines = [json.dumps({"text": "first é", "id": 1}), "", json.dumps({"text": "second"})]
    write(tmp_path, a__jsonl="\n".join(lines))
    documents = Jsonl(str(tmp_path / "a.jsonl")).open()
    assert list(documents) == ["first é", "second"]
    assert documents.characters == 13


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "no end', r"a\.jsonl, line 2: not JSON \(Unterminated string.* at column 10\)"),
        (b'{"txt": "x"}', r"a\.jsonl, line 2: no text under 'text': the record is an object with txt"),
        (b"[1]", r"a\.jsonl, line 2: no text under 'text': the record is not an object"),
        (b'{"text": 3}', r"a\.jsonl, line 2: no text under 'text'"),
        (b'{"text": "\xff"}', r"a\.jsonl, line 2: byte 10 is not UTF-8"),
    ],
)
def test_a_malformed_line_is_named_or_left_out(tmp_path, caplog, line, message):
    write(tmp_path, a__jsonl=b'{"text": "fine"}\n' + line + b'\n{"text": "fine too"}\n')
    source = Jsonl(str(tmp_path))
    with pytest.raises(UserError, match=message + ".*; mend it, or leave such records out with on_bad_record=skip"):
        source.open()
    with caplog.at_level(logging.WARNING, logger="t5g2"):
        documents = source.open(on_bad_record="skip")
    assert list(documents) == ["fine", "fine too"]
    assert documents.skipped == 1
    assert "line 2" in caplog.text
    assert "1 of 3 records are left out" in caplog.text


def test_a_text_file_that_is_no_text(tmp_path):
    write(tmp_path, a__txt=b"good", b__txt=b"\x80bad")
    with pytest.raises(UserError, match=r"b\.txt, from byte 0: byte 0 is not UTF-8"):
        TextFiles(str(tmp_path)).open()


def test_a_path_that_says_nothing():
    """The empty path is the root of all files to glob."""
    with pytest.raises(UserError, match="path is empty; give a file, a folder"):
        TextFiles("").open()


def test_hidden_files_are_left_aside(tmp_path):
    write(tmp_path, a__txt="one two three", **{".b__txt": "hidden"})
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "c.txt").write_text("hidden")
    for path in (str(tmp_path), f"file://{tmp_path}"):
        assert list(TextFiles(path).open()) == ["one two three"]
    assert len(TextFiles(f"file://{tmp_path}/[a-z].txt").open()) == 1


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    """And not left out; the refusal is made up, because root may read everything."""
    write(tmp_path, a__txt="one two three")
    (tmp_path / "sub").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"sub cannot be listed \(Permission denied\)"):
        TextFiles(str(tmp_path)).open()


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


def test_json_that_is_nested_too_deep(tmp_path):
    write(tmp_path, a__jsonl="[" * 100_000 + "\n" + json.dumps({"text": "sound, and long enough"}))
    with pytest.raises(UserError, match=r"line 1: JSON that is nested too deep; mend it"):
        Jsonl(str(tmp_path)).open()
    assert len(Jsonl(str(tmp_path)).open(on_bad_record="skip")) == 1


@pytest.mark.parametrize("source", [TextFiles, Jsonl])
def test_a_corpus_that_is_missing_or_empty(tmp_path, source):
    with pytest.raises(UserError, match="no file at '/nowhere/at/all'; give a file, a folder with files, or a pattern"):
        source("/nowhere/at/all").open()
    with pytest.raises(UserError, match="no file at"):
        source(str(tmp_path)).open()
    write(tmp_path, empty__txt="")
    with pytest.raises(UserError, match="no text in 1 file; give files with texts of at least 8 tokens"):
        source(str(tmp_path)).open()


def test_a_corpus_of_short_documents(tmp_path):
    write(tmp_path, a__txt="short", b__txt="tiny")
    with pytest.raises(UserError, match="2 documents, all of fewer than 8 tokens; give longer ones"):
        open_chunks(TextFiles(str(tmp_path)), Bytes(), chunk_tokens=16, on_bad_record="stop")


def test_the_fingerprint_is_that_of_the_texts(tmp_path):
    write(tmp_path, a__txt="first", b__txt="second")
    before = TextFiles(str(tmp_path)).open().fingerprint
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    assert TextFiles(str(tmp_path)).open().fingerprint == before
    write(tmp_path, c__txt="sEcond")
    assert TextFiles(str(tmp_path)).open().fingerprint != before
    assert PythonText("train").open().fingerprint == PythonText("train").open().fingerprint
    assert PythonText("train").open().fingerprint != PythonText("heldout").open().fingerprint


def test_a_source_says_what_it_has(tmp_path):
    write(tmp_path, a__txt="a first text\n" * 2, b__txt="short")
    chunks = open_chunks(TextFiles(str(tmp_path)), Bytes(), chunk_tokens=16, on_bad_record="stop")
    assert describe("mine", chunks) == "mine: 2 documents, 31 characters, 26 tokens, 2 chunks, 1 documents too short"


def probe(pickled):
    """What a spawned worker sees of pickled documents, and which heavy modules it has with all that makes examples."""
    import sys

    import t5g2.data.pipeline
    import t5g2.objectives  # noqa: F401

    documents = pickle.loads(pickled)
    heavy = [name for name in ("jax", "flax", "grain", "tensorflow") if name in sys.modules]
    return documents.fingerprint, documents[0], heavy, os.getpid()


def test_documents_are_opened_again_in_a_spawned_worker_without_jax(tmp_path):
    write(tmp_path, a__txt="a first text\n" * 10_000)
    for source in (TextFiles(str(tmp_path)), PythonText("heldout")):
        documents = source.open()
        pickled = pickle.dumps(documents)
        assert len(pickled) < 10_000
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            fingerprint, first, heavy, pid = pool.apply(probe, (pickled,))
        assert (fingerprint, first, heavy) == (documents.fingerprint, documents[0], [])
        assert pid != os.getpid()
