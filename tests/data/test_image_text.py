"""Sources of texts with images: the same documents whatever holds them, images when asked for, what is wrong told."""

import dataclasses
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import image_corpus as corpus
import numpy as np
import pytest
from PIL import Image

from t5g2.core.errors import UserError
from t5g2.data import images
from t5g2.data.chunking import open_chunks
from t5g2.data.sources.image_documents import FilteredImageText
from t5g2.data.sources.image_text import ImageJsonl, ImageParquet, WebDataset
from t5g2.data.tokenizers.byte_level import Bytes

TOKENIZER = Bytes()
KINDS = ("jsonl", "parquet", "structs", "webdataset")


@pytest.fixture(autouse=True)
def copies_go_here(tmp_path, monkeypatch):
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))


def source(kind, folder, records=corpus.RECORDS):
    if kind in ("parquet", "structs"):
        pytest.importorskip("pyarrow")
        return corpus.parquet(folder, records, structs=kind == "structs")
    return {"jsonl": corpus.jsonl, "webdataset": corpus.webdataset}[kind](folder, records)


def in_rows(text, **changes):
    fields = {"rows": corpus.ROWS, "tokenizer": TOKENIZER, "chunk_tokens": 64} | changes
    return FilteredImageText(text, **fields)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_the_records_in_their_order(kind, tmp_path):
    documents = source(kind, tmp_path / "data").open()
    expected = [r for r in corpus.RECORDS if r[1] or kind != "webdataset"]
    assert [documents[i] for i in range(len(documents))] == [corpus.marked(t, len(c)) for t, c in expected]
    found = [[documents.image_bytes(i, n) for n in range(documents.count(i))] for i in range(len(documents))]
    assert found == [[corpus.picture(color) for color in colors] for _, colors in expected]
    assert (documents.skipped, documents.problems) == (0, ())
    assert documents.characters == sum(len(corpus.marked(t, len(c))) for t, c in expected)


def test_what_holds_the_images_changes_nothing(tmp_path):
    fingerprints = {source(kind, tmp_path / kind).open().fingerprint for kind in KINDS[:3]}
    with_images = [r for r in corpus.RECORDS if r[1]]
    fewer = {source(kind, tmp_path / "fewer" / kind, with_images).open().fingerprint for kind in KINDS}
    assert (len(fingerprints), len(fewer), len(fingerprints | fewer)) == (1, 1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_is_of_the_images_bytes(kind, tmp_path, monkeypatch):
    """The same names, texts and sizes, and another picture."""
    before = source(kind, tmp_path / "a").open().fingerprint
    swapped = {"red": corpus.picture("blue"), "blue": corpus.picture("red")}
    picture = corpus.picture
    monkeypatch.setattr(corpus, "picture", lambda color: swapped.get(color) or picture(color))
    assert source(kind, tmp_path / "b").open().fingerprint != before


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_whole_documents_with_their_images(kind, tmp_path):
    records = [r for r in corpus.RECORDS if r[1]]
    chunks = open_chunks(in_rows(source(kind, tmp_path, records)), TOKENIZER, chunk_tokens=64, on_bad_record="stop")
    fitted = pickle.loads(pickle.dumps(chunks.documents))
    block = [5, 7, 7, 7, 7, 6]
    for i, (text, colors) in enumerate(records):
        parts = corpus.marked(text, len(colors)).split("<start_of_image>")
        expected = TOKENIZER.encode(parts[0] + "\n\n" * bool(colors)).tolist()
        for n, part in enumerate(parts[1:], start=1):
            expected += [*block, *TOKENIZER.encode("\n\n" + part + "\n\n" * (n < len(colors))).tolist()]
        assert chunks[i].tolist() == expected
        for n, color in enumerate(colors):
            shown = images.preprocess(images.read(corpus.picture(color)), corpus.SIZE)
            picture = fitted.image(i, n)
            assert picture.dtype == np.uint8
            np.testing.assert_array_equal(picture.astype(np.float32) / np.float32(127.5) - np.float32(1), shown)


def test_one_image_may_be_a_path_a_cell_or_bytes(tmp_path):
    """No list around it, in other columns, and of every format."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = [corpus.picture("red", format=f) for f in ("PNG", "JPEG", "WEBP")]
    for name, cells in (("bytes", data), ("structs", [{"bytes": d, "path": None} for d in data])):
        parquet.write_table(pyarrow.table({"caption": ["a", "b", "c"], "image": cells}), tmp_path / f"{name}.parquet")
        documents = ImageParquet(str(tmp_path / f"{name}.parquet"), "caption", "image").open()
        assert [documents.image_bytes(i, 0) for i in range(3)] == data
    (tmp_path / "red.webp").write_bytes(data[2])
    line = {"caption": "a", "image": "red.webp"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    assert ImageJsonl(str(tmp_path), "caption", "image").open().image_bytes(0, 0) == data[2]
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "a.jsonl", tmp_path / "elsewhere" / "a.jsonl")
    moved = ImageJsonl(str(tmp_path / "elsewhere"), "caption", "image", folder=str(tmp_path)).open()
    assert moved.image_bytes(0, 0) == data[2]


def test_a_sample_may_have_json_and_folders(tmp_path):
    """Only what shares a name and stands together is a sample; other members are not read."""
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        for folder in ("x", "y"):
            text = json.dumps({"caption": f"in {folder}", "text": 3}).encode()
            corpus.add(out, f"./{folder}/1", {"json": text, "JPG": corpus.picture("red"), "cls": b"7"})
        corpus.add(out, "__MACOSX/", {"_1.jpg": b"?"})
    documents = WebDataset(str(tmp_path), field="caption").open()
    assert [documents[i] for i in range(len(documents))] == ["<start_of_image>in x", "<start_of_image>in y"]


def test_compressed_files_are_read_from_copies(tmp_path):
    import gzip

    corpus.webdataset(tmp_path / "plain")
    (tmp_path / "packed").mkdir()
    for file in (tmp_path / "plain").iterdir():
        (tmp_path / "packed" / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    plain, packed = (WebDataset(str(tmp_path / name)).open() for name in ("plain", "packed"))
    assert plain.fingerprint == packed.fingerprint
    assert packed.image_bytes(1, 0) == corpus.picture("green")


BAD = {
    "no image": ({"text": "a", "images": ["gone.png"]}, r"'.*gone\.png' cannot be opened: No such file or directory"),
    "no key": ({"text": "a"}, r"no images under 'images': the record is an object with text"),
    "no paths": ({"text": "a", "images": [3]}, r"no list of paths under 'images', but \[3\]"),
    "no text": ({"text": 3, "images": []}, r"no text under 'text', but 3"),
    "count": (
        {"text": "<start_of_image> a <start_of_image>", "images": ["red.png"]},
        r"has <start_of_image> 2 times and 1 images; write it once for each image, or not at all",
    ),
    "says so and has none": ({"text": "<start_of_image> a", "images": []}, r"1 times and 0 images"),
    "nothing after": ({"text": "see: <start_of_image>\n", "images": ["red.png"]}, r"no text after the last image"),
    "damaged": ({"text": "a", "images": ["half.png"]}, r"half\.png cannot be read, it is damaged or cut off"),
    "deep": (
        {"text": "a", "images": []} | {"deep": json.loads("[" * 101 + "]" * 101)},
        r"not JSON \(nested too deeply",
    ),
    "no picture": ({"text": "a", "images": ["b.jsonl"]}, r"b\.jsonl is not an image; images are JPEG, PNG, WebP"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_told_or_counted(name, tmp_path):
    record, reason = BAD[name]
    (tmp_path / "red.png").write_bytes(corpus.picture("red"))
    (tmp_path / "half.png").write_bytes(corpus.picture("red")[:-30])
    good = json.dumps({"text": "fine", "images": ["red.png"]})
    (tmp_path / "b.jsonl").write_text(f"{good}\n\n{json.dumps(record)}\n{good}\n")
    with pytest.raises(UserError, match=rf"b\.jsonl, line 3: .*{reason}.*leave such records out with on_bad_record=sk"):
        ImageJsonl(str(tmp_path)).open()
    documents = ImageJsonl(str(tmp_path)).open(on_bad_record="skip")
    assert (len(documents), documents.skipped) == (2, 1)
    assert documents.location(1).endswith("b.jsonl, line 4")
    with pytest.raises(UserError, match=r"1 of 3 records cannot be read, and max_skipped = 0\.01 of them may be left"):
        open_chunks(in_rows(ImageJsonl(str(tmp_path))), TOKENIZER, chunk_tokens=64, on_bad_record="skip")


def test_a_bad_row_of_a_table_is_told(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    cells = [{"bytes": corpus.picture("red"), "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
    table = pyarrow.table({"text": ["a", "b", "c"], "images": cells})
    parquet.write_table(table, tmp_path / "a.parquet")
    documents = ImageParquet(str(tmp_path)).open(on_bad_record="skip")
    assert documents.problems == (
        f"{tmp_path}/a.parquet, row 2: a path, 'b.png', and no bytes (image_jsonl reads paths) under 'images'",
        f"{tmp_path}/a.parquet, row 3: not an image, but None under 'images'",
    )
    with pytest.raises(UserError, match="has no column 'image'; it has text, images: set `images_field` to one of th"):
        ImageParquet(str(tmp_path), images_field="image").open()


def test_a_shard_that_is_cut_off_is_told(tmp_path):
    """Anywhere: in a member, in a header, between samples, before the end that every tar file has."""
    corpus.webdataset(tmp_path / "data")
    file = tmp_path / "data" / "0.tar"
    whole = file.read_bytes()
    with tarfile.open(file) as archive:
        [text, image, other, _] = archive.getmembers()
        ends = archive.offset
    assert len(WebDataset(str(file)).open()) == 2
    for size in (image.offset_data + 5, other.offset + 100, other.offset, other.offset_data + 7, ends - 512):
        file.write_bytes(whole[:size])
        key = "0000" if size <= other.offset + 100 else "0001"
        with pytest.raises(UserError, match=rf"0\.tar, sample '{key}': the archive is damaged or cut off here, about"):
            WebDataset(str(file)).open()
        documents = WebDataset(str(tmp_path / "data")).open(on_bad_record="skip")
        assert (len(documents), documents.skipped) == (2 + (key == "0001"), 1), size
    file.write_bytes(whole[: text.offset] + b"x" * 2000)
    with pytest.raises(UserError, match=r"0\.tar is not a tar file"):
        WebDataset(str(file)).open()
    file.write_bytes(whole[: other.offset] + b"x" * 600 + whole[other.offset + 600 :])
    with pytest.raises(UserError, match=r"sample '0000': the archive is damaged or cut off here"):
        WebDataset(str(file)).open()


def test_a_sample_that_is_not_whole_is_told(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        corpus.add(out, "1", {"txt": b"no picture"})
        corpus.add(out, "2", {"png": corpus.picture("red"), "cls": b"4"})
        corpus.add(out, "3", {"txt": b"twice", "png": corpus.picture("red")})
        corpus.add(out, "3", {"png": corpus.picture("red")})
        corpus.add(out, "4", {"txt": b"\xff", "png": corpus.picture("red")})
        corpus.add(out, "5", {"txt": b"fine", "png": corpus.picture("red")})
    documents = WebDataset(str(tmp_path)).open(on_bad_record="skip")
    assert len(documents) == 1
    told = [problem.removeprefix(f"{tmp_path}/a.tar, sample ") for problem in documents.problems]
    assert told[0] == (
        "'1': the sample has txt; it needs one .txt for its text (see `field`), and images, each by another ending "
        "(jpg, jpeg, png, webp, 1.png and so on)"
    )
    assert told[1].startswith("'2': the sample has png, cls; it needs one .txt")
    assert told[2].startswith("'3': the sample has txt, png, png; it needs one .txt")
    assert told[3] == "'4': byte 0 is not UTF-8"


def test_an_image_is_decoded_once_and_again_when_it_has_changed(tmp_path, monkeypatch, caplog):
    text, decoded, read = corpus.jsonl(tmp_path / "data"), [], images.read
    monkeypatch.setattr(images, "read", lambda data, name: decoded.append(Path(name).name) or read(data, name=name))
    first = text.open()
    assert sorted(decoded) == sorted(f"{color}.png" for color in corpus.NAMES)
    decoded.clear()
    assert text.open().fingerprint == first.fingerprint
    assert not decoded
    changed = tmp_path / "data" / "pictures" / "blue.png"
    changed.write_bytes(corpus.picture("red", size=(9, 9)))
    assert text.open().fingerprint != first.fingerprint
    assert decoded == ["blue.png"]
    changed.write_bytes(changed.read_bytes()[:-30])
    for _ in range(2):  # a damaged image is never taken for valid
        with pytest.raises(UserError, match=r"blue\.png cannot be read, it is damaged or cut off"):
            text.open()
    monkeypatch.setenv("T5G2_CACHE", str(changed))  # not a folder
    changed.write_bytes(corpus.picture("blue"))
    assert text.open().fingerprint == first.fingerprint
    assert "the images will be decoded again when they are next opened" in caplog.text


def test_documents_that_do_not_fit_are_told_or_counted(tmp_path):
    """Nothing is cut: a document that is too long, or has too many images, is a bad record."""
    text = corpus.jsonl(tmp_path)
    few = dataclasses.replace(corpus.ROWS, per_row=1)
    with pytest.raises(
        UserError, match=r"corpus\.jsonl, line 3: 2 images, and a row holds 1; raise data\.images\.per_"
    ):
        in_rows(text, rows=few).open()
    with pytest.raises(
        UserError, match=r"line 3: 44 tokens, 12 of them for images, and chunk_tokens is 40; a text wit"
    ):
        in_rows(text, chunk_tokens=40).open()
    for left_out in (in_rows(text, rows=few), in_rows(text, chunk_tokens=40)):
        with pytest.raises(UserError, match=r"1 of 5 records cannot be read"):
            open_chunks(left_out, TOKENIZER, chunk_tokens=64, on_bad_record="skip")
        chunks = open_chunks(left_out, TOKENIZER, chunk_tokens=64, on_bad_record="skip", max_skipped=0.2)
        assert (len(chunks), chunks.documents.skipped) == (4, 1)


def test_an_image_token_that_a_text_spells_out_is_no_image(tmp_path):
    class Spelling(Bytes):
        def encode(self, text):
            tokens = super().encode(text)
            return np.where(tokens == super().encode("~")[0], np.int32(7), tokens)

    fitted = in_rows(corpus.jsonl(tmp_path, [("a ~ b", ("red",))]), tokenizer=Spelling()).open()
    tokens = fitted.tokens(0, Spelling())
    assert np.sum(tokens == 7) == corpus.ROWS.tokens
    assert tokens[-3] == Bytes().special_tokens.unk


def test_an_image_that_is_gone_later_is_told(tmp_path):
    fitted = in_rows(corpus.jsonl(tmp_path)).open()
    (tmp_path / "pictures" / "green.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"corpus\.jsonl, line 2, image 1 is empty"):
        fitted.image(1, 0)
    (tmp_path / "pictures" / "green.png").unlink()
    with pytest.raises(UserError, match=r"green\.png' cannot be opened"):
        fitted.image(1, 0)


def test_no_files_are_told(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"no file that ends in \.jsonl in '"):
        ImageJsonl(str(tmp_path)).open()
    pytest.importorskip("fsspec").filesystem("memory").pipe("/a", b"{}")
    with pytest.raises(UserError, match=r"memory://a is a URL, and images are local files; name their folder"):
        ImageJsonl("memory://a").open()
    with pytest.raises(UserError, match="the tokens of an image depend on the model"):
        corpus.jsonl(tmp_path).open().tokens(0, TOKENIZER)
