"""Text files and JSON lines: documents in a fixed order; errors name the file and the line."""

import json
import logging
import multiprocessing
import os
import pickle

import pytest

from t5g2.core.errors import UserError
from t5g2.data.sources.python_text import PythonText
from t5g2.data.sources.text_files import Jsonl, TextFiles
from tests.data import corpus


def test_a_line_that_ends_with_the_file_is_told(tmp_path):
    corpus.write_files(tmp_path, a__jsonl=b'{"text": "fine"}\n{"text": "cut o')
    whole = r"a\.jsonl, line 2, the last one and without a line end \(is the file whole\?\): not JSON"
    with pytest.raises(UserError, match=whole):
        Jsonl(str(tmp_path)).open()


def test_text_files_come_in_the_order_of_their_names(tmp_path):
    corpus.write_files(tmp_path, b__txt="second", a__txt="first", c__md="third")
    (tmp_path / "d").mkdir()
    corpus.write_files(tmp_path / "d", e__txt="fourth")

    def read(path):
        return list(TextFiles(str(path)).open())

    assert read(tmp_path) == ["first", "second", "third", "fourth"]
    assert read(tmp_path / "*.txt") == ["first", "second"]
    assert read(tmp_path / "**" / "*.txt") == ["first", "second", "fourth"]
    assert read(tmp_path / "a.txt") == ["first"]


def test_a_large_text_file_is_cut_at_ends_of_lines(tmp_path):
    text = "".join(f"line {i} é\n" for i in range(30_000))
    corpus.write_files(tmp_path, big__txt=text)
    documents = list(TextFiles(str(tmp_path)).open())
    assert len(documents) > 3
    assert "".join(documents) == text
    assert all(d.endswith("\n") for d in documents)


def test_jsonl(tmp_path):
    lines = [json.dumps({"text": "first é", "id": 1}), "", json.dumps({"text": "second"})]
    corpus.write_files(tmp_path, a__jsonl="\n".join(lines))
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
    corpus.write_files(tmp_path, a__jsonl=b'{"text": "fine"}\n' + line + b'\n{"text": "fine too"}\n')
    source = Jsonl(str(tmp_path))
    with pytest.raises(UserError, match=message + ".*; mend it, or leave such records out with on_bad_record=skip"):
        source.open()
    with caplog.at_level(logging.WARNING, logger="t5g2"):
        documents = source.open(on_bad_record="skip")
    assert list(documents) == ["fine", "fine too"]
    assert documents.skipped == 1
    assert "line 2" in caplog.text
    assert "1 of 3 records are left out" in caplog.text


def test_a_text_file_that_is_not_utf8(tmp_path):
    corpus.write_files(tmp_path, a__txt=b"good", b__txt=b"\x80bad")
    with pytest.raises(UserError, match=r"b\.txt, from byte 0: byte 0 is not UTF-8"):
        TextFiles(str(tmp_path)).open()


def test_an_empty_path():
    """The empty path is the root of all files to glob."""
    with pytest.raises(UserError, match="path is empty; give a file, a folder"):
        TextFiles("").open()


def test_hidden_files_are_left_aside(tmp_path):
    corpus.write_files(tmp_path, a__txt="one two three", **{".b__txt": "hidden"})
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "c.txt").write_text("hidden")
    for path in (str(tmp_path), f"file://{tmp_path}"):
        assert list(TextFiles(path).open()) == ["one two three"]
    assert len(TextFiles(f"file://{tmp_path}/[a-z].txt").open()) == 1


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    """And not left out; the refusal is made up, because root may read everything."""
    corpus.write_files(tmp_path, a__txt="one two three")
    (tmp_path / "sub").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"sub cannot be listed \(Permission denied\)"):
        TextFiles(str(tmp_path)).open()


def test_json_that_is_nested_too_deep(tmp_path):
    corpus.write_files(tmp_path, a__jsonl="[" * 100_000 + "\n" + json.dumps({"text": "sound, and long enough"}))
    with pytest.raises(UserError, match=r"line 1: JSON that is nested too deep; mend it"):
        Jsonl(str(tmp_path)).open()
    assert len(Jsonl(str(tmp_path)).open(on_bad_record="skip")) == 1


@pytest.mark.parametrize("source", [TextFiles, Jsonl])
def test_a_corpus_that_is_missing_or_empty(tmp_path, source):
    with pytest.raises(UserError, match="no file at '/nowhere/at/all'; give a file, a folder with files, or a pattern"):
        source("/nowhere/at/all").open()
    with pytest.raises(UserError, match="no file at"):
        source(str(tmp_path)).open()
    corpus.write_files(tmp_path, empty__txt="")
    with pytest.raises(UserError, match="no text in 1 file; give files with texts of at least 8 tokens"):
        source(str(tmp_path)).open()


def test_the_fingerprint_is_that_of_the_texts(tmp_path):
    corpus.write_files(tmp_path, a__txt="first", b__txt="second")
    before = TextFiles(str(tmp_path)).open().fingerprint
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    assert TextFiles(str(tmp_path)).open().fingerprint == before
    corpus.write_files(tmp_path, c__txt="sEcond")
    assert TextFiles(str(tmp_path)).open().fingerprint != before
    assert PythonText("train").open().fingerprint == PythonText("train").open().fingerprint
    assert PythonText("train").open().fingerprint != PythonText("heldout").open().fingerprint


def probe(pickled):
    """Returns what a spawned worker sees of pickled documents, and the heavy modules that it has."""
    import sys

    import t5g2.data.pipeline
    import t5g2.objectives  # noqa: F401

    documents = pickle.loads(pickled)
    heavy = [name for name in ("jax", "flax", "grain", "tensorflow") if name in sys.modules]
    return documents.fingerprint, documents[0], heavy, os.getpid()


def test_documents_are_opened_again_in_a_spawned_worker_without_jax(tmp_path):
    corpus.write_files(tmp_path, a__txt="a first text\n" * 10_000)
    for source in (TextFiles(str(tmp_path)), PythonText("heldout")):
        documents = source.open()
        pickled = pickle.dumps(documents)
        assert len(pickled) < 10_000
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            fingerprint, first, heavy, pid = pool.apply(probe, (pickled,))
        assert (fingerprint, first, heavy) == (documents.fingerprint, documents[0], [])
        assert pid != os.getpid()
