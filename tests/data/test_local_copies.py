"""Compressed, columnar and remote files read as the plain ones that they were made of."""

import bz2
import datetime
import errno
import gzip
import json
import lzma
import pathlib
import pickle

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from t5g2.core.errors import UserError
from t5g2.data.chunking import open_chunks
from t5g2.data.sources import local_copies
from t5g2.data.sources.text_files import Jsonl, Parquet, TextFiles
from t5g2.data.tokenizers.byte_level import Bytes
from tests.data import corpus

TEXTS = ["first é text", "second \n text", "third text of three"]
LINES = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", zst)])
def test_compressed_files(tmp_path, ending, pack):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / f"a.jsonl.{ending}").write_bytes(pack(LINES))
    (folder / f"b.jsonl.{ending}").write_bytes(pack(LINES[:20]) + pack(LINES[20:]))  # two members, two frames
    made = Jsonl(str(folder)).open()
    assert list(made) == TEXTS + TEXTS
    assert list(pickle.loads(pickle.dumps(made))) == TEXTS + TEXTS
    (tmp_path / f"c.txt.{ending}").write_bytes(pack("line é\n".encode() * 20_000))
    assert "".join(TextFiles(str(tmp_path / f"c.txt.{ending}")).open()) == "line é\n" * 20_000


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", zst)])
def test_a_file_that_unpacks_without_end(tmp_path, cache, monkeypatch, ending, pack):
    file = tmp_path / f"bomb.txt.{ending}"
    file.write_bytes(pack(b"a" * (8 << 20)))
    assert len("".join(TextFiles(str(file)).open())) == 8 << 20  # small ones may be anything
    monkeypatch.setattr(local_copies, "BOMB_BYTES", 4 << 20)
    file.write_bytes(pack(b"b" * (8 << 20)))
    kept = sorted(cache.iterdir())
    with pytest.raises(
        UserError, match=rf"bomb.txt.{ending} unpacks to more than 500 times its size, which would fill"
    ):
        TextFiles(str(file)).open()
    assert sorted(cache.iterdir()) == kept
    # as large, of text
    words = np.random.RandomState(0).randint(97, 123, 8 << 20).astype(np.uint8).tobytes()
    file.write_bytes(pack(words))
    assert len("".join(TextFiles(str(file)).open())) == 8 << 20


def test_what_a_column_holds_that_is_no_string(tmp_path):
    """Bytes are text where they are UTF-8, as Spark writes it; nothing else is taken for text by its looks."""
    parquet(tmp_path / "a.parquet", text=["déjà vu".encode()])
    assert list(Parquet(str(tmp_path / "a.parquet")).open()) == ["déjà vu"]
    for name, value in (("b", b"\xff\xfe"), ("c", datetime.datetime(2020, 1, 1))):
        parquet(tmp_path / f"{name}.parquet", text=[value])
        with pytest.raises(UserError, match=r"no text under 'text'"):
            Parquet(str(tmp_path / f"{name}.parquet")).open()


def test_a_full_disk_is_no_damaged_file(tmp_path, monkeypatch):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one two three"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local_copies, "CONVERTERS", {"gz": full})
    with pytest.raises(OSError, match="No space left"):
        TextFiles(str(tmp_path / "a.txt.gz")).open()


def test_parquet_is_the_texts_of_a_column(tmp_path):
    """The chunks and the fingerprint are those of the same texts as JSON lines."""
    parquet(tmp_path / "a.parquet", text=TEXTS, id=[1, 2, 3])
    (tmp_path / "a.jsonl").write_bytes(LINES)
    made, lines = Parquet(str(tmp_path / "a.parquet")).open(), Jsonl(str(tmp_path / "a.jsonl")).open()
    assert list(made) == TEXTS
    assert made.fingerprint == lines.fingerprint
    chunks = [
        open_chunks(s, Bytes(), chunk_tokens=16, on_bad_record="stop")
        for s in (Parquet(str(tmp_path / "a.parquet")), Jsonl(str(tmp_path / "a.jsonl")))
    ]
    for i in range(len(chunks[0])):
        np.testing.assert_array_equal(chunks[0][i], chunks[1][i])
    with pytest.raises(
        UserError, match=r"a\.parquet has no column 'body'; it has text, id: set `field` to one of them"
    ):
        Parquet(str(tmp_path / "a.parquet"), field="body").open()
    parquet(tmp_path / "b.parquet", text=["fine text", None, "more text"])
    with pytest.raises(UserError, match=r"b\.parquet, row 2: no text under 'text', but null"):
        Parquet(str(tmp_path / "b.parquet")).open()
    assert list(Parquet(str(tmp_path / "b.parquet")).open(on_bad_record="skip")) == ["fine text", "more text"]


def test_urls(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.jsonl", LINES)
    memory.pipe("/corpus/deep/b.jsonl.gz", gzip.compress(LINES))
    parquet(tmp_path / "c.parquet", text=TEXTS)
    memory.pipe("/tables/c.parquet", (tmp_path / "c.parquet").read_bytes())
    assert list(Jsonl("memory://corpus/a.jsonl").open()) == TEXTS
    assert list(Jsonl("memory://corpus").open()) == TEXTS + TEXTS
    assert list(Jsonl("memory://corpus/*/*.gz").open()) == TEXTS
    assert list(Parquet("memory://tables").open()) == TEXTS
    with pytest.raises(UserError, match="no file at 'memory://nowhere'"):
        Jsonl("memory://nowhere").open()
    with pytest.raises(UserError, match="nosuch://a cannot be read: "):
        Jsonl("nosuch://a").open()


def test_a_copy_is_made_once_and_again_when_the_file_changes(tmp_path, cache):
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(LINES))
    assert local_copies.plain_copy(str(tmp_path / "a.jsonl")) == str(tmp_path / "a.jsonl"), (
        "plain ones are read where they are"
    )
    first = local_copies.plain_copy(str(file))
    before = (cache / first).stat().st_mtime_ns
    assert local_copies.plain_copy(str(file)) == first
    assert (cache / first).stat().st_mtime_ns == before
    file.write_bytes(gzip.compress(LINES + LINES))
    assert local_copies.plain_copy(str(file)) != first
    assert len(list(Jsonl(str(file)).open())) == 6


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("how", ["cut off", "garbage"])
def test_damaged_files_are_told_and_leave_nothing(tmp_path, cache, name, how):
    parquet(tmp_path / "a.parquet", text=TEXTS * 100)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES * 100))
    (tmp_path / "a.jsonl.zst").write_bytes(zst(LINES * 100))
    file = tmp_path / name
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if how == "cut off" else b"garbage" * 30)
    source = Parquet(str(file)) if name.endswith("parquet") else Jsonl(str(file))
    with pytest.raises(UserError, match=f"{name} is damaged or cut off .*; get it again"):
        source.open()
    assert not list(cache.iterdir())


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    import importlib

    def missing(name):
        raise ImportError(name)

    parquet(tmp_path / "a.parquet", text=TEXTS)
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"pyarrow\.parquet is not installed; run `pip install 't5g2\[parquet\]'`"):
        Parquet(str(tmp_path / "a.parquet")).open()


def test_too_large_a_share_of_bad_records(tmp_path):
    lines = b'{"text": "a fine line of text"}\n' * 9 + b"bad\n"
    (tmp_path / "a.jsonl").write_bytes(lines)
    source, how = Jsonl(str(tmp_path / "a.jsonl")), {"chunk_tokens": 16, "on_bad_record": "skip"}
    with pytest.raises(UserError, match=r"1 of 10 records cannot be read, and max_skipped = 0\.01 of them may be left"):
        open_chunks(source, Bytes(), **how)
    assert open_chunks(source, Bytes(), max_skipped=0.1, **how).documents.skipped == 1
    with pytest.raises(UserError, match=r"max_skipped = 1\.5; it must be at least 0 and at most 1"):
        corpus.mixed(tmp_path, rows=2, streams=2, max_skipped=1.5)


def test_a_window_as_long_as_the_format_allows(tmp_path):
    """`zstd --long=31`; streamed, because of a size that is known beforehand the window would be no larger than it."""
    options = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=options).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(LINES) + packer.flush())
    assert zstandard.get_frame_parameters((tmp_path / "a.jsonl.zst").read_bytes()).window_size > 1 << 27
    assert list(Jsonl(str(tmp_path / "a.jsonl.zst")).open()) == TEXTS


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.bz2", bz2.compress(LINES), "is not plain, but bzip2; unpack it, or pack it with gzip or zstd"),
        ("a.jsonl.XZ", lzma.compress(LINES), "is not plain, but xz; unpack it"),
        ("a.jsonl.lz4", b"\x04\x22\x4d\x18", "is not plain, but LZ4; unpack it"),
        ("a.jsonl", lzma.compress(LINES), "is not plain, but xz; unpack it"),
        ("a.jsonl", gzip.compress(LINES), r"is not plain, but gzip; let its name end in \.gz"),
        ("a.jsonl", zst(LINES), r"is not plain, but Zstandard; let its name end in \.zst"),
        ("a.zip", b"PK\x03\x04", "is not plain, but zip; unpack it"),
        ("a.jsonl", b"PAR1...", "is not plain, but parquet; read it with the kind parquet"),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1",
            "a pointer of Git LFS; .*git lfs pull",
        ),
    ],
)
def test_what_is_packed_otherwise_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/packed/{name}", data)
    for path in (str(tmp_path / name), f"memory://packed/{name}"):
        with pytest.raises(UserError, match=message):
            Jsonl(path).open()


def test_the_loser_of_a_race_uses_the_copy_of_the_winner(tmp_path, cache):
    """Also if its own copy could not be finished: all copies of a file are equal."""
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(LINES))
    winner = []

    def slow(source, out):
        out.write(source.read())
        if not winner:
            winner.append(local_copies.plain_copy(str(file)))
            for part in cache.glob(".*.part"):  # another machine took it for abandoned
                part.unlink()
            raise OSError("stale file handle")

    assert local_copies.converted_copy(str(file), slow, None) == winner[0]
    assert list(Jsonl(str(file)).open()) == TEXTS
    assert [path.name for path in cache.iterdir()] == [pathlib.Path(winner[0]).name]
