"""Text files and JSON lines: documents in a fixed order; errors name the file and the line."""

import json
import logging
import multiprocessing
import os
import pickle

import pytest

from t5g2.core.errors import UserError
from t5g2.data.sources import data_files
from t5g2.data.sources.dialogues import Chat
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
    with pytest.raises(UserError, match=r"line 1: not JSON \(nested too deeply, over 100 levels\); mend it"):
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


FILES = {
    "part-00000.jsonl": '{"text": "first"}',
    "part-00001.jsonl": "",
    "_SUCCESS": "",
    "_committed_123": "{}",
    "README.md": "# Data",
    "LICENSE": "free",
    ".gitattributes": "*.jsonl",
    "part-00000.jsonl.crc": "x",
    "_temporary/0/part.jsonl": "{",
    "_delta_log/0.json": "{",
    "day=1/part-00000.jsonl": '{"text": "second"}',
    "day=1/_SUCCESS": "",
}


@pytest.mark.parametrize("start", ["", "file://"])
def test_folders_as_they_come(tmp_path, caplog, start):
    """Marks, tables, descriptions and checksums that tools leave beside data are no data."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with caplog.at_level(logging.INFO, logger="t5g2"):
        assert list(Jsonl(f"{start}{tmp_path}").open()) == ["second", "first"]
    assert "files that are empty or no data are left aside: LICENSE, README.md, _SUCCESS, _committed" in caplog.text
    assert list(Jsonl(f"{start}{tmp_path}/*").open()) == ["first"]
    assert list(Jsonl(f"{start}{tmp_path}/part-*.jsonl").open()) == ["first"]


def test_an_empty_file_of_a_format_that_has_none_is_damaged(tmp_path):
    """A table of no rows has a header; a part of no lines is an empty file."""
    corpus.write_files(tmp_path, a__jsonl='{"text": "first"}', b__jsonl="", c__parquet="")
    assert data_files.find_files(str(tmp_path)) == [f"{tmp_path}/a.jsonl", f"{tmp_path}/c.parquet"]


def test_a_folder_that_holds_a_link_to_itself_is_read_once(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    corpus.write_files(tmp_path / "a" / "b", c__txt="one two three")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "here").symlink_to(".")
    for path in ("a", "a/b", "a/**/*.txt", "**/c.txt"):
        assert list(TextFiles(f"{tmp_path}/{path}").open()) == ["one two three"], path
    # a link to another folder is one more place of its files
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "again").symlink_to(tmp_path / "a")
    assert list(TextFiles(f"{tmp_path}/other").open()) == ["one two three"]


def test_a_link_to_nothing_is_no_missing_text(tmp_path):
    corpus.write_files(tmp_path, a__txt="one two three")
    (tmp_path / "b.txt").symlink_to(tmp_path / "blobs" / "gone")
    for path in ("", "*.txt", "b.txt"):
        with pytest.raises(UserError, match=r"b\.txt is a link to .*gone, which does not exist; get the file, or"):
            TextFiles(f"{tmp_path}/{path}").open()
    assert list(TextFiles(f"{tmp_path}/a*.txt").open()) == ["one two three"]
    (tmp_path / "b.txt").rename(tmp_path / "_SUCCESS")
    assert list(TextFiles(str(tmp_path)).open()) == ["one two three"]


def test_what_a_path_names_is_read(tmp_path):
    (tmp_path / "a").mkdir()
    corpus.write_files(tmp_path, README__md="the first text", _SUCCESS="marked", **{"_init.py": "code"})
    corpus.write_files(tmp_path / "a", README__md="the second text")
    assert list(TextFiles(f"{tmp_path}/README.md").open()) == ["the first text"]
    assert list(TextFiles(f"{tmp_path}/**/*.md").open()) == ["the first text", "the second text"]
    assert list(TextFiles(f"{tmp_path}/_SUCC*").open()) == ["marked"]
    # names with an underscore are no marks, and a README below the top is a document
    assert list(TextFiles(str(tmp_path)).open()) == ["code", "the second text"]


def test_a_pattern_that_matches_nothing_hints_at_what_it_takes_for_a_pattern(tmp_path):
    folder = tmp_path / "data[v1]"
    folder.mkdir()
    corpus.write_files(folder, a__txt="one two three")
    assert list(TextFiles(str(folder)).open()) == ["one two three"]
    with pytest.raises(
        UserError, match=r"data\[v1\] exists, and its name is read as a pattern: write '.*data\[\[\]v1\]'"
    ):
        TextFiles(f"{folder}/*.txt").open()
    assert list(TextFiles(f"{tmp_path}/data[[]v1]/*.txt").open()) == ["one two three"]
    with pytest.raises(UserError, match=r"In a pattern, \[ begins a set of characters: write \[\[\]"):
        TextFiles(f"{tmp_path}/b[1].txt").open()
    with pytest.raises(UserError, match=r"or a pattern such as 'corpus/\*\*/part-\*'$"):
        TextFiles(f"{tmp_path}/b*.txt").open()


BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_text(tmp_path):
    """At the start of a text and of a file of lines, and of a line where files were joined."""
    corpus.write_files(tmp_path, a__txt=BOM + b"one two three")
    documents = TextFiles(f"{tmp_path}/a.txt").open()
    assert list(documents) == ["one two three"]
    assert documents.characters == 13
    (tmp_path / "plain").mkdir()
    corpus.write_files(tmp_path / "plain", a__txt="one two three")
    assert documents.fingerprint == TextFiles(str(tmp_path / "plain")).open().fingerprint
    line = json.dumps({"text": "one two three"}).encode() + b"\n"
    corpus.write_files(tmp_path, b__jsonl=BOM + line + line + BOM + line)
    assert list(Jsonl(f"{tmp_path}/b.jsonl").open()) == ["one two three"] * 3
    dialogue = json.dumps({"prompt": "question", "answer": "reply"}).encode() + b"\n"
    corpus.write_files(tmp_path, c__jsonl=BOM + dialogue)
    assert Chat(f"{tmp_path}/c.jsonl").open().turns(0) == [("user", "question"), ("model", "reply")]
    # amid a text it is a character like others
    corpus.write_files(tmp_path, d__txt="one \ufeff two")
    assert list(TextFiles(f"{tmp_path}/d.txt").open()) == ["one \ufeff two"]


def test_utf16_is_named(tmp_path):
    corpus.write_files(tmp_path, a__txt="one two three".encode("utf-16"))
    with pytest.raises(UserError, match=r"byte 0 is not UTF-8 \(but begins as UTF-16 does: iconv -f UTF-16"):
        TextFiles(str(tmp_path)).open()
