"""Rows with images: whose they are, in which order, the same for any number of hosts and wherever a run goes on."""

import dataclasses

import image_corpus
import numpy as np
import pytest

from t5g2.core.errors import UserError
from t5g2.data import images, packed_rows
from t5g2.data.config import DataConfig, Source
from t5g2.data.corpus import open_corpus
from t5g2.data.pipeline import finite_batches
from t5g2.data.preview import format_row
from t5g2.data.sources.text_files import TextFiles
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.objectives import UL2, Causal, MultimodalPrefixLM, MultimodalPrefixLMDecoder
from tests.data import corpus

ROWS = image_corpus.ROWS


@pytest.fixture(autouse=True)
def what_is_kept_goes_here(tmp_path, monkeypatch):
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))


def mixed(folder, *, rows=4, streams=4, decoder_only=False, **changes) -> DataConfig:
    """Texts with images and texts without, 2:1, packed into rows of 96 and 96 tokens with 3 images."""
    objective = MultimodalPrefixLMDecoder() if decoder_only else MultimodalPrefixLM()
    text = corpus.write_texts(folder / "texts", "few", 5)
    sources = (
        Source(image_corpus.jsonl(folder / "images"), objective, weight=2, name="images"),
        Source(text, Causal() if decoder_only else UL2(), name="text"),
    )
    fields = {"tokenizer": Bytes(), "encoder_length": 0 if decoder_only else 96, "decoder_length": 96, "images": ROWS}
    fields |= {"chunk_tokens": 60, "packing_rows": 3}
    return DataConfig(**{"sources": sources, "rows": rows, "streams": streams} | fields | changes)


def shown(color):
    return images.resize(images.read(image_corpus.picture(color)), ROWS.size)


def expected_of(row, side, made):
    """The pictures that the text of a row speaks of, in the order of its image tokens: colors are in the texts."""
    found = []
    segments = side.segments[row]
    for segment in range(1, int(max(segments.max(), made.decoder.segments[row].max())) + 1):
        here, there = segments == segment, made.decoder.segments[row] == segment
        count = np.sum(side.tokens[row][here] == ROWS.token) // ROWS.tokens
        if count:
            text = Bytes().decode(made.targets[row][there], skip_special_tokens=True)
            colors = [color for color in image_corpus.NAMES if color in text]
            assert len(colors) == count
            found += sorted(colors, key=text.index)
    return found


@pytest.mark.parametrize("decoder_only", [False, True])
def test_a_rows_images_are_those_that_its_text_speaks_of(tmp_path, decoder_only):
    config = mixed(tmp_path, decoder_only=decoder_only)
    made, seen = corpus.batches(config, count=12)[0], set()
    for batch in (host.batch for host in made):
        assert batch.images.dtype == np.uint8
        assert batch.images.shape == (4, 3, 16, 16, 3)
        for row in range(4):
            colors = expected_of(row, batch.decoder if decoder_only else batch.encoder, batch)
            seen.add(len(colors))
            for i in range(ROWS.per_row):
                expected = shown(colors[i]) if i < len(colors) else np.zeros((16, 16, 3), np.uint8)
                np.testing.assert_array_equal(batch.images[row, i], expected)
    assert seen == {0, 1, 2, 3}
    sources = {int(s) for host in made for s in np.unique(host.batch.sources)}
    assert sources == {0, 1}


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_reads_the_same_images(tmp_path, hosts):
    config = mixed(tmp_path, streams=8)
    whole = corpus.batches(config, count=8)[0]
    each = config.rows // hosts
    parts = [corpus.batches(config, count=8, rows=range(h * each, (h + 1) * each))[0] for h in range(hosts)]
    corpus.assert_same(corpus.joined(parts), whole)


@pytest.mark.parametrize("begun", [1, 3, 7])
def test_a_run_goes_on_with_the_images_that_come_next(tmp_path, begun):
    """On another number of hosts."""
    config = mixed(tmp_path)
    whole = corpus.batches(config, count=begun + 4)[0]
    halves = [corpus.batches(config, count=begun, rows=rows) for rows in (range(2), range(2, 4))]
    positions = halves[0][1] | halves[1][1]
    corpus.assert_same(corpus.batches(config, count=4, positions=positions)[0], whole[begun:])


@pytest.mark.long
def test_workers_make_the_same_images(tmp_path):
    config = mixed(tmp_path)
    made = corpus.batches(dataclasses.replace(config, workers=2), count=4)[0]
    corpus.assert_same(made, corpus.batches(config, count=4)[0])


def test_every_document_is_read_once_with_its_images(tmp_path):
    config = mixed(tmp_path, rows=3, streams=3)
    made = [host.batch for host in finite_batches(config, seed=0)]
    assert sum(int(np.sum(b.encoder.tokens == ROWS.token)) for b in made) == 5 * ROWS.tokens
    rows = [(b, row) for b in made for row in range(3)]
    colors = [color for b, row in rows for color in expected_of(row, b.encoder, b)]
    assert sorted(colors) == sorted(image_corpus.NAMES)
    assert sum(int(b.images[row, i].any()) for b, row in rows for i in range(ROWS.per_row)) == 5


def test_one_example_a_row(tmp_path):
    config = mixed(tmp_path, packing="none")
    for host in corpus.batches(config, count=6)[0]:
        for row in range(4):
            colors = expected_of(row, host.batch.encoder, host.batch)
            assert [bool(image.any()) for image in host.batch.images[row]] == [i < len(colors) for i in range(3)]


def test_a_run_without_texts_with_images_has_the_same_shapes(tmp_path):
    """So text and image-text batches go through one program; what is padding is what empty_batch has."""
    both = mixed(tmp_path)
    text = dataclasses.replace(both, sources=both.sources[1:])
    batches = [corpus.batches(config, count=1)[0][0] for config in (both, text)]
    batches.append(packed_rows.empty_batch(both, rows=4))
    shapes = [[(a.shape, a.dtype) for a in corpus.arrays(host.batch)] for host in batches]
    assert shapes[0] == shapes[1] == shapes[2]
    assert not batches[1].batch.images.any()


def test_an_image_token_in_a_text_is_none(tmp_path):
    """A text may spell one out; it becomes unk where rows have images, and nothing moves."""

    class Spelling(Bytes):
        def encode(self, text):
            tokens = super().encode(text)
            return np.where(tokens == super().encode("~")[0], np.int32(7), tokens)

    (tmp_path / "a.txt").write_text("a text with ~ and ~ in it")
    sources = (Source(TextFiles(str(tmp_path / "a.txt")), MultimodalPrefixLM()),)
    config = mixed(tmp_path, tokenizer=Spelling(), sources=sources)
    batch = corpus.batches(config, count=1)[0][0].batch
    tokens = np.concatenate([batch.encoder.tokens.ravel(), batch.targets.ravel()])
    assert not np.any(tokens == 7)
    assert np.any(tokens == Bytes().special_tokens.unk)
    assert not batch.images.any()


def test_a_person_sees_images_not_their_tokens(tmp_path):
    for decoder_only, first in ((False, "encoder  "), (True, "prefix   <bos>")):
        config = mixed(tmp_path, packing="none", decoder_only=decoder_only)
        batches = corpus.batches(config, count=6)[0]
        shown = "\n".join(format_row(batch, row, config) for batch in batches for row in range(4))
        image = "<start_of_image>[image 16x16]<end_of_image>"
        assert f"{first}here ⏎⏎{image}\n" in shown
        assert f"{first}⏎⏎{image}⏎⏎ and ⏎⏎{image}\n" in shown
        assert "<image>" not in shown


def test_the_fingerprint_is_of_what_an_image_is(tmp_path):
    config = mixed(tmp_path)
    changed = [dataclasses.replace(ROWS, **{name: value}) for name, value in (("size", 32), ("resampling", "bicubic"))]
    made = {open_corpus(dataclasses.replace(config, images=images)).fingerprint for images in (ROWS, *changed)}
    assert len(made) == 3


def test_what_does_not_go_together_is_told(tmp_path):
    with pytest.raises(
        UserError, match=r"source 'images': its texts have images, and data\.images is not set; set the number"
    ):
        mixed(tmp_path, images=None)
    config = mixed(tmp_path)
    asks = dataclasses.replace(config.sources[0], objective=UL2())
    with pytest.raises(
        UserError, match="source 'images': its texts have images, and its objective, UL2, would predict"
    ):
        dataclasses.replace(config, sources=(asks,))
    with pytest.raises(
        UserError, match=r"source 'images': .*corpus\.jsonl, line 3: 2 images, and a row holds 1; raise "
    ):
        open_corpus(dataclasses.replace(config, images=dataclasses.replace(ROWS, per_row=1)))
    with pytest.raises(UserError, match="per_row = 0; it must be at least 1"):
        dataclasses.replace(ROWS, per_row=0)
