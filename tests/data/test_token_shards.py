"""Shards of tokens are the text over again: the same batches, whoever made them, however often it was interrupted."""

import dataclasses
import errno
import json
import pathlib
import pickle
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from t5g2.core.errors import UserError
from t5g2.data.chunking import open_chunks
from t5g2.data.shards import array_record, token_shards
from t5g2.data.shards.token_shards import Job, TokenDocuments, Tokens
from t5g2.data.sources.text_files import Jsonl
from t5g2.data.tokenizers.byte_level import Bytes
from tests.data import corpus

TOKENIZER = Bytes()


def job(text, count=3, tokenizer=TOKENIZER):
    return Job(text.open(), tokenizer, {"kind": "text", "path": "made here"}, count)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def text(tmp_path):
    return corpus.write_texts(tmp_path / "text", "many", 23)


def test_batches_from_shards_are_those_from_the_text(tmp_path):
    """Bit for bit, resumed from the one to the other too: positions and fingerprints are the text's."""
    config = corpus.mixed(tmp_path, rows=4, streams=4)
    sources = []
    for source in config.sources:
        token_shards.write(job(source.text), tmp_path / source.name)
        sources.append(dataclasses.replace(source, text=Tokens(str(tmp_path / source.name))))
    ready = dataclasses.replace(config, sources=tuple(sources))
    whole, end = corpus.batches(config, count=8)
    from_shards, ready_end = corpus.batches(ready, count=8)
    corpus.assert_same(whole, from_shards)
    assert end == ready_end
    _, half = corpus.batches(config, count=3)
    corpus.assert_same(whole[3:], corpus.batches(ready, count=5, positions=half)[0])
    corpus.assert_same(whole, corpus.batches(dataclasses.replace(ready, workers=2), count=8)[0])
    for a, b in zip(config.sources, ready.sources, strict=True):
        chunks = [open_chunks(of.text, TOKENIZER, chunk_tokens=40, on_bad_record="stop") for of in (a, b)]
        assert chunks[0].documents.fingerprint == chunks[1].documents.fingerprint
        assert chunks[0].documents.characters == chunks[1].documents.characters


def test_every_document_is_there_once(tmp_path, text):
    """In order, whatever the number of shards; the tokens too many for two bytes in four."""
    for count, tokenizer in ((1, TOKENIZER), (4, TOKENIZER), (23, Bytes(sentinels=70_000))):
        folder = tmp_path / f"out{count}"
        said = token_shards.write(job(text, count, tokenizer), folder)
        made, given = Tokens(str(folder)).open(), text.open()
        assert len(made) == len(given) == 23
        assert said["dtype"] == ("<u2" if tokenizer is TOKENIZER else "<i4")
        for i in range(23):
            found = made.tokens(i, tokenizer)
            assert found.dtype == np.int32
            np.testing.assert_array_equal(found, tokenizer.encode(given[i]))
        np.testing.assert_array_equal(made.token_lengths(tokenizer), given.token_lengths(tokenizer))
        assert said["tokens"] == given.token_lengths(tokenizer).sum()
        again = pickle.loads(pickle.dumps(made))
        np.testing.assert_array_equal(again.tokens(7, tokenizer), made.tokens(7, tokenizer))


def test_one_process_or_two_write_the_same_bytes(tmp_path, text):
    token_shards.write(job(text, 5), tmp_path / "one")
    token_shards.write(job(text, 5), tmp_path / "two", workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_after_an_interruption_no_shard_is_written_twice(tmp_path, text, monkeypatch):
    whole, folder, made = tmp_path / "whole", tmp_path / "out", []
    token_shards.write(job(text), whole)
    make = token_shards._write_shard

    def interrupted(job, folder, shard):
        if shard == 1 and made == [0]:
            (folder / ".tokens-00001-of-00003.array_record.part").write_bytes(b"half")
            raise KeyboardInterrupt
        made.append(shard)
        make(job, folder, shard)

    monkeypatch.setattr(token_shards, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        token_shards.write(job(text), folder)
    with pytest.raises(UserError, match="out is not finished: run the same `t5g2 tokenize` again"):
        Tokens(str(folder)).open()
    made.append("again")
    token_shards.write(job(text), folder)
    assert made == [0, "again", 1, 2]
    assert files(folder) == files(whole)


def test_a_second_run_writes_only_the_missing_shards(tmp_path, text, monkeypatch):
    folder = tmp_path / "out"
    token_shards.write(job(text), folder)
    whole = files(folder)
    (folder / "tokens-00001-of-00003.array_record").unlink()
    made = []
    make = token_shards._write_shard
    monkeypatch.setattr(
        token_shards, "_write_shard", lambda job, folder, shard: (made.append(shard), make(job, folder, shard))
    )
    token_shards.write(job(text), folder)
    assert made == [1]
    assert files(folder) == whole
    token_shards.write(job(text), folder)
    assert made == [1]


def test_a_folder_that_holds_something_else(tmp_path, text):
    folder = tmp_path / "out"
    token_shards.write(job(text), folder)
    with pytest.raises(UserError, match=r"out holds other tokens \(there -> now: shards: 3 -> 4\); give another"):
        token_shards.write(job(text, 4), folder)
    changes = r"tokenizer: .*'sentinels': 100.* -> .*'sentinels': 3.*; tokenizer_fingerprint: "
    with pytest.raises(UserError, match=rf"other tokens \(there -> now: {changes}"):
        token_shards.write(job(text, tokenizer=Bytes(sentinels=3)), folder)
    other = corpus.write_texts(tmp_path / "other", "few", 5)
    with pytest.raises(UserError, match=r"other tokens \(there -> now: .*text_fingerprint: "):
        token_shards.write(job(other), folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"mine holds thesis\.txt; tokens are written to a folder of their own"):
        token_shards.write(job(text), tmp_path / "mine")
    for count, workers in ((0, 1), (24, 1), (3, 0)):
        with pytest.raises(UserError, match="and shards at most one a document"):
            token_shards.write(job(text, count), tmp_path / "none", workers=workers)
    assert not (tmp_path / "none").exists()


def test_another_tokenizer_is_refused(tmp_path, text):
    token_shards.write(job(text), tmp_path / "out")
    with pytest.raises(
        UserError, match=r"out was made with another tokenizer, .*'sentinels': 100.* has .*'sentinels': 3"
    ):
        open_chunks(Tokens(str(tmp_path / "out")), Bytes(sentinels=3), chunk_tokens=40, on_bad_record="stop")


def test_damage_is_told(tmp_path):
    """A shard cut off is found when it is opened; a flipped bit where it is read."""
    text = corpus.write_texts(tmp_path / "text", "long", 400)
    folder = tmp_path / "out"
    token_shards.write(job(text, 2), folder)
    shard = folder / "tokens-00001-of-00002.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"00001-of-00002.array_record has \d+ bytes and was written with \d+; run"):
        Tokens(str(folder)).open()
    middle = len(whole) // 2
    shard.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    documents = Tokens(str(folder)).open()
    with pytest.raises(UserError, match=r"00001-of-00002.array_record is damaged at record"):
        [documents.tokens(i, TOKENIZER) for i in range(200, 400)]
    lengths = folder / "lengths-00001-of-00002.npy"
    good = lengths.read_bytes()
    header, _, numbers = good.partition(b"\n")
    for damaged in (
        good[:-1],
        good[:60],
        good.replace(b"'descr'", b"'descr"),  # Python's parser, which NumPy reads it with, would raise its own errors
        good.replace(b"(200,)", b"(9" + b"0" * 11 + b",)"),
        header + b"\n" + b"\xff" * len(numbers),
        b"PK\x03\x04" + good[4:],
    ):
        lengths.write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"lengths-00001-of-00002.npy is damaged or cut off; run the same `t5g2 tok"
        ):
            Tokens(str(folder)).open()
    lengths.write_bytes(good)
    shard.unlink()
    with pytest.raises(UserError, match=r"00001-of-00002.array_record is missing; run the same `t5g2 tokenize` again"):
        Tokens(str(folder)).open()
    token_shards.write(job(text, 2), folder)
    assert shard.read_bytes() == whole


def test_what_is_damaged_otherwise(tmp_path, text):
    folder = tmp_path / "out"
    token_shards.write(job(text, 2), folder)
    lengths = folder / "lengths-00001-of-00002.npy"
    whole = lengths.read_bytes()
    lengths.write_bytes(whole[:-7])
    token_shards.write(job(text, 2), folder)
    assert lengths.read_bytes() == whole
    flipped = bytearray(whole)
    flipped[-1] ^= 64
    lengths.write_bytes(bytes(flipped))
    with pytest.raises(UserError, match=r"tokens and was written with .*; run the same `t5g2 tokenize` again"):
        Tokens(str(folder)).open()
    token_shards.write(job(text, 2), folder)
    assert lengths.read_bytes() == whole
    for content in ("", "{}", "[1]"):
        (folder / "tokens.json").write_text(content)
        with pytest.raises(UserError, match=r"tokens\.json is damaged.*remove the folder, and run the same `t5g2 tok"):
            token_shards.write(job(text, 2), folder)
        with pytest.raises(UserError, match=r"tokens\.json is damaged"):
            Tokens(str(folder)).open()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"is in the way, and is no folder; give another path"):
        token_shards.write(job(text, 2), tmp_path / "file")


def test_processes_end_with_the_one_that_started_them(tmp_path, text):
    """Killed while its processes wait for a shard that never ends."""
    (tmp_path / "slow.py").write_text(
        "import os, pathlib, time\n"
        "from t5g2.data.shards import token_shards\n"
        "def make(shard):\n"
        f"    pathlib.Path({str(tmp_path)!r}, f'{{os.getpid()}}.pid').touch()\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    token_shards._in_processes(make, [0, 1], 2)\n"
    )
    with subprocess.Popen([sys.executable, str(tmp_path / "slow.py")]) as parent:
        children = waited(lambda: pids if len(pids := [int(f.stem) for f in tmp_path.glob("*.pid")]) == 2 else None)
        parent.kill()
    assert waited(lambda: not any(pathlib.Path(f"/proc/{pid}").exists() for pid in children))


def test_one_call_at_a_time(tmp_path, text):
    """A second call into the same folder is refused; what a killed one left is taken away."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".tokens-00000-of-00002.array_record.77.part").write_text("half")
    meanwhile = []

    def run(make, missing):
        with pytest.raises(UserError, match=r"another `t5g2 tokenize` writes into .*out; wait for it"):
            token_shards.write(job(text, 2), folder)
        meanwhile.extend(missing)
        [make(shard) for shard in missing]

    token_shards.write(job(text, 2), folder, run=run)
    assert meanwhile == [0, 1]
    assert not list(folder.glob(".*"))
    token_shards.write(job(text, 2), folder)


def waited(ready):
    """Returns what `ready` returns, once that is true or after a minute."""
    for _ in range(600):
        if found := ready():
            break
        time.sleep(0.1)
    return found


def test_there_is_no_text_any_more(tmp_path, text):
    token_shards.write(job(text), tmp_path / "out")
    with pytest.raises(UserError, match="holds tokens, whose text is not kept"):
        Tokens(str(tmp_path / "out")).open()[0]
    with pytest.raises(UserError, match=r"nowhere has no tokens\.json; give a folder that `t5g2 tokenize` has written"):
        Tokens(str(tmp_path / "nowhere")).open()


def test_reading_shards_loads_neither_jax_nor_tensorflow(tmp_path, text):
    token_shards.write(job(text), tmp_path / "out")
    code = (
        "import sys; from t5g2.data.shards.token_shards import Tokens\n"
        "from t5g2.data.tokenizers.byte_level import Bytes\n"
        f"d = Tokens({str(tmp_path / 'out')!r}).open(); d.tokens(3, Bytes());"
        "assert not {'jax', 'flax', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert json.loads((tmp_path / "out" / "tokens.json").read_text())["documents"] == 23


def write_lines(folder, lengths):
    """A jsonl file of documents of these lengths in bytes; its source."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, length))) for length in lengths]
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Jsonl(str(folder))


def test_a_part_of_a_long_document_is_read_alone(tmp_path, monkeypatch):
    """Whatever the part and the length: at, before and after the end of a record, and of a document without tokens."""
    size = token_shards.RECORD_TOKENS
    lengths = [3 * size + 17, 0, size, 1, 2 * size, size - 1, size + 1]
    text = write_lines(tmp_path / "text", lengths)
    token_shards.write(job(text, 2), tmp_path / "out")
    documents, given = Tokens(str(tmp_path / "out")).open(), text.open()
    assert documents.token_lengths(TOKENIZER).tolist() == lengths
    read = []
    one = array_record.RecordReaders.read
    monkeypatch.setattr(
        array_record.RecordReaders, "read", lambda self, *place: read.append(place) or one(self, *place)
    )
    for i, length in enumerate(lengths):
        whole = TOKENIZER.encode(given[i])
        np.testing.assert_array_equal(documents.tokens(i, TOKENIZER), whole)
        for start in {0, 5, size - 3, size, 2 * size - 1, length - 7, length - 1} & set(range(length)):
            for end in {start + 1, start + 9, size, length} & set(range(start + 1, length + 1)):
                read.clear()
                part = documents.token_range(i, start, end, TOKENIZER)
                np.testing.assert_array_equal(part, whole[start:end])
                assert part.dtype == np.int32
                assert len(read) == (end - 1) // size - start // size + 1


def test_batches_of_long_documents_are_those_of_the_text_and_no_document_is_read_whole(tmp_path, monkeypatch):
    text = write_lines(tmp_path / "text", [3 * token_shards.RECORD_TOKENS, 100, 2 * token_shards.RECORD_TOKENS + 1])
    config = corpus.mixed(tmp_path, rows=4, streams=4)
    config = dataclasses.replace(config, sources=(dataclasses.replace(config.sources[0], text=text),))
    token_shards.write(job(text, 2), tmp_path / "out")
    source = dataclasses.replace(config.sources[0], text=Tokens(str(tmp_path / "out")))
    monkeypatch.setattr(TokenDocuments, "tokens", None)
    corpus.assert_same(
        corpus.batches(config, count=8)[0],
        corpus.batches(dataclasses.replace(config, sources=(source,)), count=8)[0],
    )


def test_folders_of_earlier_versions_are_read_and_continued(tmp_path, monkeypatch, caplog):
    """One record per document, and no record_tokens: finished ones are complete, unfinished ones are completed so."""
    text = write_lines(tmp_path / "text", [2 * token_shards.RECORD_TOKENS, 30, 0, 50])
    former = dataclasses.replace(job(text, 2), record_tokens=None)
    token_shards.write(former, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert "record_tokens" not in manifest
    before = files(tmp_path / "out")
    token_shards.write(job(text, 2), tmp_path / "out")
    assert files(tmp_path / "out") == before
    documents = Tokens(str(tmp_path / "out")).open()
    assert not documents.has_token_ranges
    for i in range(4):
        np.testing.assert_array_equal(documents.tokens(i, TOKENIZER), TOKENIZER.encode(text.open()[i]))
    (tmp_path / "out" / "tokens.json").unlink()
    (tmp_path / "out" / "tokens-00001-of-00002.array_record").unlink()
    (tmp_path / "out" / "plan.json").write_text(json.dumps(former.plan))
    token_shards.write(job(text, 2), tmp_path / "out")
    assert files(tmp_path / "out") == before
    # what is slow is said, with the remedy
    monkeypatch.setattr("t5g2.data.chunking.RECENT_TOKENS", 1000)
    for source in (text, Tokens(str(tmp_path / "out"))):
        caplog.clear()
        open_chunks(source, TOKENIZER, chunk_tokens=40, on_bad_record="stop")
        assert "documents of up to 8192 tokens are read and tokenised for each of their chunks" in caplog.text


def test_a_record_of_another_length_is_damage(tmp_path):
    text = write_lines(tmp_path / "text", [2 * token_shards.RECORD_TOKENS + 5, 30])
    token_shards.write(job(text, 1), tmp_path / "out")
    file = tmp_path / "out" / "tokens-00000-of-00001.array_record"
    documents = Tokens(str(tmp_path / "out")).open()
    array_record.write_records(file, [b"x" * 8192, b"x" * 8192, b"x" * 12, b"x" * 60], compressed=False)
    assert documents.token_range(0, 0, 9, TOKENIZER).tolist() == [0x7878] * 9
    with pytest.raises(UserError, match=r"is damaged at record 2 \(it has 12 bytes and should have 10\)"):
        documents.token_range(0, 8191, 8194, TOKENIZER)


def test_two_machines_that_see_no_locks_of_each_other_write_one_folder(tmp_path, monkeypatch):
    """All of their shards are equal, so it does not matter whose are kept; neither removes what the other writes."""

    def no_locks(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    text = corpus.write_texts(tmp_path / "text", "many", 23)
    token_shards.write(job(text, 6), tmp_path / "alone")
    monkeypatch.setattr("t5g2.core.files.fcntl.flock", no_locks)
    machine = threading.local()
    monkeypatch.setattr("t5g2.core.files._boot", lambda: machine.boot)
    barrier, manifests = threading.Barrier(3), []

    def write(boot):
        machine.boot = boot
        barrier.wait()
        for _ in range(5):
            manifests.append(token_shards.write(job(text, 6), tmp_path / "shared"))

    threads = [threading.Thread(target=write, args=(boot,)) for boot in ("a" * 8, "b" * 8, "c" * 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(manifests) == 15
    assert all(manifest == manifests[0] for manifest in manifests)
    assert files(tmp_path / "shared") == files(tmp_path / "alone")


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "text"},
        {"dtype": None},
        {"record_tokens": 0},
        {"record_tokens": "4096"},
        {"shards": []},
        {"shards": ["tokens-00000-of-00001.array_record"]},
        {"shards": [{"file": "tokens-00000-of-00001.array_record", "bytes": 1}]},
        {"characters": -1},
        {"skipped": True},
        {"tokenizer": []},
    ],
)
def test_a_manifest_with_an_entry_of_another_type(tmp_path, change):
    """Not only text that is no JSON: entries are checked before anything is read by them."""
    documents = corpus.write_texts(tmp_path / "texts", "a", 3).open()
    token_shards.write(token_shards.Job(documents, Bytes(), {"kind": "text"}, 1), tmp_path / "tokens")
    manifest = tmp_path / "tokens" / token_shards.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(
        UserError, match=r"tokens\.json is damaged: it is not the description of a folder of tokens; rem"
    ):
        Tokens(str(tmp_path / "tokens")).open()
