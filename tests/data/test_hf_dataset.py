"""Data sets of the library datasets, written by itself: their batches are those of the same texts in any other file."""

import dataclasses
import json
import multiprocessing
import pickle
import sys

import pytest
from PIL import Image

from t5g2.core import settings
from t5g2.core.errors import UserError
from t5g2.data.sources import text_source
from t5g2.data.sources.hf_dataset import HfDataset
from t5g2.data.sources.labelled_text import LabelledText
from t5g2.data.sources.text_files import Jsonl
from t5g2.data.sources.text_pairs import TextPairs
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.eval.task_records import open_records
from tests.data import corpus

datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
TEXTS = [f"text {i} with é and \n a line, {'long ' * (i % 7)}" for i in range(60)]
RECORDS = [{"text": text, "id": i, "more": {"title": f"title {i}"}} for i, text in enumerate(TEXTS)]


def write(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def folder(tmp_path):
    """A folder of files, in which the order of names is neither that of writing nor that of numbers."""
    for name, part in (("b", RECORDS[30:]), ("a10", RECORDS[:10]), ("a9", RECORDS[10:30])):
        write(tmp_path / "files" / f"{name}.jsonl", part)
    return tmp_path / "files"


def of(folder, tmp_path, **fields):
    return HfDataset(str(folder), cache_dir=str(tmp_path / "cache"), **fields)


def last(pickled):
    """Returns what a spawned worker reads of pickled documents, and the heavy modules that that took."""
    documents = pickle.loads(pickled)
    text = documents[len(documents) - 1]
    return text, documents.fingerprint, [name for name in ("jax", "torch", "tensorflow") if name in sys.modules]


def test_a_folder_is_read_in_the_order_of_its_names(folder, tmp_path):
    documents = of(folder, tmp_path).open()
    assert list(documents) == TEXTS
    assert documents.fingerprint == Jsonl(str(folder)).open().fingerprint
    assert documents.characters == sum(map(len, TEXTS))
    assert list(of(folder, tmp_path, field="more.title").open()) == [f"title {i}" for i in range(60)]


@pytest.mark.parametrize("made", [corpus.mixed, corpus.decoder_only])
def test_batches_hosts_and_continuation_are_those_of_other_sources(folder, tmp_path, made):
    """One host, several, and from a saved position: the same bits as from lines of JSON."""
    config = made(tmp_path, rows=4, streams=4)

    def reading(text):
        return dataclasses.replace(
            config, sources=tuple(dataclasses.replace(source, text=text) for source in config.sources)
        )

    ours, lines = reading(of(folder, tmp_path)), reading(Jsonl(str(folder)))
    expected, end = corpus.batches(lines, count=6)
    alone, our_end = corpus.batches(ours, count=6)
    corpus.assert_same(expected, alone)
    assert our_end == end
    saved = {}
    for rows in (range(2), range(2, 4)):
        saved |= corpus.batches(ours, count=3, rows=rows)[1]
    rest = [corpus.batches(ours, count=3, rows=rows, positions=saved)[0] for rows in (range(2), range(2, 4))]
    corpus.assert_same(expected[3:], corpus.joined(rest))


def test_documents_are_read_in_a_worker_without_jax(folder, tmp_path):
    documents = of(folder, tmp_path).open()
    pickled = pickle.dumps(documents)
    assert len(pickled) < 10_000, "a pickle holds the names of files, and no text"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(last, (pickled,)) == (TEXTS[-1], documents.fingerprint, [])


def test_splits_of_files_and_of_saved_data_sets(tmp_path):
    whole, held_out = datasets.Dataset.from_list(RECORDS), datasets.Dataset.from_list([{"text": "a text held out"}])
    whole = whole.select_columns(["text"])
    for name, part in (("train", whole), ("test", held_out)):
        part.to_parquet(tmp_path / "files" / f"{name}.parquet")
    datasets.DatasetDict(train=whole, test=held_out).save_to_disk(tmp_path / "splits")
    for folder in ("files", "splits"):
        assert list(of(tmp_path / folder, tmp_path).open()) == TEXTS
        assert list(of(tmp_path / folder, tmp_path, split="test").open()) == ["a text held out"]
        both = of(tmp_path / folder, tmp_path, split="train[10:20]+test").open()
        assert list(both) == [*TEXTS[10:20], "a text held out"]
    whole.save_to_disk(tmp_path / "one")
    assert list(of(tmp_path / "one", tmp_path).open()) == TEXTS
    assert list(of(tmp_path / "one", tmp_path, split="train[:5%]").open()) == TEXTS[:3]


def test_what_the_library_has_shuffled_stays_so(tmp_path):
    """A saved data set may be read through a table of indices, and may give tensors."""
    data_set = datasets.Dataset.from_list(RECORDS).shuffle(seed=1).with_format("numpy")
    data_set.save_to_disk(tmp_path / "saved")
    texts = list(of(tmp_path / "saved", tmp_path).open())
    assert texts == [str(text) for text in data_set["text"]]
    assert texts != TEXTS
    assert sorted(texts) == sorted(TEXTS)


def test_the_kind_of_a_config(folder, tmp_path):
    plain = {"kind": "hf_dataset", "path": str(folder), "cache_dir": str(tmp_path / "cache")}
    source = settings.build(text_source.TextSource, plain, where="text", tables=(text_source.BY_NAME,))
    assert source == of(folder, tmp_path)


def test_columns_are_pairs_labels_and_records_of_tasks(folder, tmp_path):
    source = of(folder, tmp_path)
    pairs = TextPairs(source, inputs="text", targets="more.title").open()
    assert [pairs.texts(i) for i in (0, 59)] == [(TEXTS[0], "title 0"), (TEXTS[59], "title 59")]
    assert len(LabelledText(source, label="{id}").open()) == 60
    records = open_records(source, Bytes())
    assert [records[i] for i in (0, 59)] == [RECORDS[0], RECORDS[59]]


def test_images_of_records_stay_as_they_are_stored(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    Image.new("RGB", (2, 3), (1, 2, 3)).save(tmp_path / "a.png")
    rows = [{"image": str(tmp_path / "a.png"), "text": "a picture"}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    [record] = open_records(of(tmp_path / "saved", tmp_path), Bytes())
    assert record["image"]["bytes"] == (tmp_path / "a.png").read_bytes()


def test_a_bad_example_is_named_or_left_out(tmp_path):
    write(tmp_path / "files" / "a.jsonl", [{"text": "a fine text"}, {"text": None}, {"text": "another"}])
    source = of(tmp_path / "files", tmp_path)
    with pytest.raises(UserError, match=r"files, split train, example 1: no text under 'text', but null; mend it, or"):
        source.open()
    documents = source.open(on_bad_record="skip")
    assert (list(documents), documents.skipped) == (["a fine text", "another"], 1)


def test_a_nested_column_that_is_null(tmp_path):
    write(tmp_path / "files" / "a.jsonl", [{"more": {"title": "a title"}}, {"more": None}])
    with pytest.raises(UserError, match=r"example 1: no text under 'more\.title'"):
        of(tmp_path / "files", tmp_path, field="more.title").open()


def test_what_is_wrong_with_a_data_set_is_told(folder, tmp_path, monkeypatch):
    def refused(message, **fields):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(of(folder, tmp_path), **fields).open()

    refused("has no column 'body'; it has text, id, more: set `field` to one of them", field="body")
    refused(r"has no column 'more\.body'", field="more.body")
    refused("example 0: no text under 'id', but 0", field="id")
    refused(r"split 'tran' cannot be opened \(Unknown split .*Should be one of \['train'\]", split="tran")
    refused(r"cannot be opened \(Unrecognized instruction format: train\[:5\)", split="train[:5")
    refused(r"BuilderConfig 'english' not found. Available: \['default'\]\); correct path, name", name="english")
    refused(
        r"nowhere, split 'train' cannot be read .*; give OWNER/NAME .*, or a folder", path=str(tmp_path / "nowhere")
    )
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
    refused("Unknown split", path=str(tmp_path / "saved"), split="test")
    with (folder / "b.jsonl").open("a") as file:
        file.write("{")
    refused(r"a file is damaged or not of its format \(.*JSON", path=str(folder))
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"datasets is not installed; run `pip install 't5g2\[datasets\]'`")


def test_a_data_set_of_the_hub_without_a_network(tmp_path, monkeypatch):
    """One that was prepared before is read from the library's cache, in which its name has three underscores."""
    write(tmp_path / "tales" / "train.jsonl", RECORDS)
    of(tmp_path / "tales", tmp_path).open()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    source = HfDataset("owner/tales", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"owner/tales, split 'train': the hub cannot be reached, and the cache"):
        source.open()
    (tmp_path / "cache" / "tales").rename(tmp_path / "cache" / "owner___tales")
    assert list(source.open()) == TEXTS
