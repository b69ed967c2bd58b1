"""Records by number: ArrayRecord files and data sets of TensorFlow Datasets; damage is told, never read past."""

import json
import logging
import multiprocessing
import pickle
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from t5g2.core.errors import UserError
from t5g2.data.chunking import open_chunks
from t5g2.data.sources.array_records import ArrayRecord, Tfds
from t5g2.data.sources.text_files import Jsonl
from t5g2.data.sources.text_pairs import TextPairs
from t5g2.data.tokenizers.byte_level import Bytes

TEXTS = ["first é text", "second \n text", "third text of three"]


def write(path, records, options="group_size:2"):
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record if isinstance(record, bytes) else record.encode())
    writer.close()


def write_json(path, texts):
    write(path, [json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)])


def test_array_records_are_texts_or_objects(tmp_path):
    write_json(tmp_path / "a-00000-of-00002.array_record", TEXTS[:2])
    write_json(tmp_path / "a-00001-of-00002.array_record", TEXTS[2:])
    write(tmp_path / "plain.array_record", TEXTS)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    objects = ArrayRecord(str(tmp_path / "a-*")).open()
    assert list(objects) == TEXTS
    assert [objects[i] for i in (2, 0, 1)] == [TEXTS[i] for i in (2, 0, 1)]
    plain = ArrayRecord(str(tmp_path / "plain.array_record"), field="").open()
    assert list(plain) == TEXTS
    lines = Jsonl(str(tmp_path / "a.jsonl")).open()
    assert objects.fingerprint == plain.fingerprint == lines.fingerprint
    assert objects.characters == lines.characters


def test_array_records_at_a_url(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec", reason="the extra `remote` is not installed")
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))
    write_json(tmp_path / "a.array_record", TEXTS)
    fsspec.filesystem("memory").pipe("/records/a.array_record", (tmp_path / "a.array_record").read_bytes())
    assert list(ArrayRecord("memory://records").open()) == TEXTS


def last(pickled):
    """Returns what a spawned worker reads of pickled documents, and the heavy modules that that took."""
    documents = pickle.loads(pickled)
    text = documents[len(documents) - 1]
    return text, documents.fingerprint, [name for name in ("jax", "grain", "tensorflow") if name in sys.modules]


def assert_opens_in_a_worker(documents):
    pickled = pickle.dumps(documents)
    assert len(pickled) < 5_000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        text, fingerprint, heavy = pool.apply(last, (pickled,))
    assert (text, fingerprint, heavy) == (documents[len(documents) - 1], documents.fingerprint, [])


def test_array_records_are_opened_again_in_a_worker(tmp_path):
    write_json(tmp_path / "a.array_record", TEXTS)
    assert_opens_in_a_worker(ArrayRecord(str(tmp_path)).open())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b'{"text": "no end', r"record 1: not JSON \(Unterminated string.* at column 10\)"),
        (b'{"txt": "x", "id": 1}', r"record 1: no text under 'text': the record is an object with txt, id"),
        (b"\xff\xfe", r"record 1: byte 0 is not UTF-8"),
    ],
)
def test_a_bad_record_is_named_or_left_out(tmp_path, caplog, record, message):
    write(tmp_path / "a.array_record", [b'{"text": "fine"}', record, b'{"text": "fine too"}'])
    source = ArrayRecord(str(tmp_path))
    with pytest.raises(UserError, match=rf"a\.array_record, {message}; mend it, or leave such records out"):
        source.open()
    with caplog.at_level(logging.WARNING, logger="t5g2"):
        documents = source.open(on_bad_record="skip")
    assert list(documents) == ["fine", "fine too"]
    assert documents.skipped == 1
    assert "record 1" in caplog.text
    assert "1 of 3 records are left out" in caplog.text


@pytest.mark.parametrize("on_bad_record", ["stop", "skip"])
def test_a_damaged_shard_is_told_and_never_left_out(tmp_path, on_bad_record):
    """The library itself reads a file that was cut off as one without records."""
    write_json(tmp_path / "a.array_record", TEXTS)
    write(tmp_path / "b.array_record", [json.dumps({"text": f"text {i} " * 20}) for i in range(3000)], "group_size:1")
    source, file = ArrayRecord(str(tmp_path)), tmp_path / "b.array_record"
    whole = file.read_bytes()
    for cut in (whole[: len(whole) // 2], whole[:-10], b"garbage" * 100, b""):
        file.write_bytes(cut)
        with pytest.raises(UserError, match=rf"b\.array_record \({len(cut):,} bytes\) has no index of records"):
            source.open(on_bad_record=on_bad_record)
    middle = len(whole) // 4
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    with pytest.raises(
        UserError, match=r"b\.array_record, record \d+: the file is damaged \(Corrupted.*; get it again"
    ):
        source.open(on_bad_record=on_bad_record)


def test_records_without_text(tmp_path):
    write_json(tmp_path / "a.array_record", ["", ""])
    with pytest.raises(UserError, match="2 records without text; give records of at least 8 tokens"):
        ArrayRecord(str(tmp_path)).open()
    with pytest.raises(UserError, match="no file at '/nowhere/at/all'"):
        ArrayRecord("/nowhere/at/all").open()


def test_too_many_bad_records_are_named(tmp_path):
    write(tmp_path / "a.array_record", [json.dumps({"text": "a fine text"})] * 20 + [b"{", b"[]"])
    with pytest.raises(UserError, match=r"2 of 22 records cannot be read, and max_skipped = 0\.01") as error:
        open_chunks(ArrayRecord(str(tmp_path)), Bytes(), chunk_tokens=16, on_bad_record="skip")
    assert "a.array_record, record 20: not JSON" in str(error.value)
    assert "a.array_record, record 21: no text under 'text': the record is not an object" in str(error.value)


# a data set of three examples, written by TensorFlow Datasets itself
@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    pytest.importorskip("tensorflow_datasets", reason="the extra `tfds` is not installed")
    import tensorflow_datasets as tfds

    class Tales(tfds.core.GeneratorBasedBuilder):
        """Three tales."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            features = {"text": text, "id": tfds.features.Scalar(np.int64), "more": {"title": text}}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(["a text held out"])}

        def _generate_examples(self, texts):
            for i, text in enumerate(texts):
                yield i, {"text": text, "id": i, "more": {"title": f"title {i}"}}

    folder = tmp_path_factory.mktemp("tfds")
    Tales(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_tfds(tfds_folder):
    source = Tfds("tales", data_dir=str(tfds_folder))
    documents = source.open()
    assert sorted(documents) == sorted(TEXTS)
    assert documents.characters == sum(map(len, TEXTS))
    assert list(Tfds("tales", split="test", data_dir=str(tfds_folder)).open()) == ["a text held out"]
    assert len(Tfds("tales", split="train[:2]", data_dir=str(tfds_folder)).open()) == 2
    titles = Tfds("tales", field="more.title", data_dir=str(tfds_folder)).open()
    assert sorted(titles) == ["title 0", "title 1", "title 2"]
    assert_opens_in_a_worker(documents)


def test_two_features_of_tfds_are_a_pair(tfds_folder):
    data_set = Tfds("tales", data_dir=str(tfds_folder))
    documents = TextPairs(data_set, inputs="text", targets="more.title").open()
    assert sorted(documents.texts(i) for i in range(3)) == sorted(
        zip(TEXTS, (f"title {i}" for i in range(3)), strict=True)
    )
    assert_opens_in_a_worker(documents)
    with pytest.raises(
        UserError, match=r"tales has no feature 'title'; it has .*: set `inputs` and `targets` to two of"
    ):
        TextPairs(data_set, inputs="text", targets="title").open()


def test_what_is_wrong_with_a_data_set_is_told(tfds_folder, tmp_path):
    where = {"data_dir": str(tfds_folder)}
    with pytest.raises(UserError, match="tales has no feature 'body'; it has text, id, more: set `field` to one"):
        Tfds("tales", field="body", **where).open()
    both = Tfds("tales", split="train+test", **where).open()
    assert list(both) == [*Tfds("tales", **where).open(), "a text held out"]
    for split in ("train[90%:10%]", "train[:50%"):
        with pytest.raises(UserError, match=r"tales has no split 'train\[.*give one of .*such as train\[10%:90%\]"):
            Tfds("tales", split=split, **where).open()
    with pytest.raises(UserError, match="unknown split of tales 'tran'; did you mean 'train'"):
        Tfds("tales", split="tran", **where).open()
    with pytest.raises(UserError, match="no data set 'no_such_tales' of TensorFlow Datasets on this machine"):
        Tfds("no_such_tales", **where).open()
    with pytest.raises(UserError, match="record 0: no text under 'id', but"):
        Tfds("tales", field="id", **where).open()


def test_a_damaged_data_set_is_told_and_never_left_out(tfds_folder, tmp_path):
    import shutil

    shutil.copytree(tfds_folder, tmp_path / "copy")
    [file] = (tmp_path / "copy").rglob("*train*array_record*")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"are damaged or cut off .*prepare them again"):
        Tfds("tales", data_dir=str(tmp_path / "copy")).open(on_bad_record="skip")
