"""The page of the data: what it shows of a row is what the row is."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from t5g2.core.errors import UserError
from t5g2.models import masks
from t5g2.models.backends.reference import visible
from t5g2.models.config import to_dict
from t5g2.report import data_page, data_preview
from t5g2.train import experiment as experiments
from tests import tiny
from tests.data import corpus


class Parts(HTMLParser):
    """Checks that tags are closed in order; collects images and words."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.words = [], [], ""

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "img"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def made(tmp_path, model, objective, encoder):
    corpus.write_texts(tmp_path / "text", "many", 23)
    (tmp_path / "text" / "many000.txt").write_text("<script>alert(1)</script> & more text than that")
    node = {
        "model": to_dict(model),
        "data": {
            "sources": [
                {"text": {"kind": "text", "path": str(tmp_path / "text")}, "objective": objective, "name": "n"}
            ],
            "tokenizer": {"kind": "bytes", "sentinels": 10},
            "chunk_tokens": 30,
            "rows": 8,
            "encoder_length": encoder,
            "decoder_length": 64,
            "streams": 4,
        },
        "optim": {"optimizer": {"kind": "adamw"}, "schedule": {"kind": "constant", "peak": 1e-3}},
        "train": {"steps": 10},
    }
    return experiments.build(node)


GEMMA3 = replace(tiny.GEMMA3, vocab_size=384)
T5GEMMA2 = replace(tiny.T5GEMMA2, encoder=GEMMA3, decoder=GEMMA3)


@pytest.mark.parametrize(
    ("model", "objective", "encoder", "masks_per_row"),
    [(T5GEMMA2, {"kind": "ul2"}, 64, 5), (GEMMA3, {"kind": "prefix_lm_decoder"}, 0, 2)],
)
def test_the_images_are_the_masks(tmp_path, capsys, model, objective, encoder, masks_per_row):
    experiment = made(tmp_path, model, objective, encoder)
    preview = data_preview.measure(experiment)
    data_page.write(experiment, preview, tmp_path / "page.html", rows=2)
    assert capsys.readouterr().out.strip() == f"page: {tmp_path / 'page.html'}"
    parts = Parts()
    parts.feed((tmp_path / "page.html").read_text())
    assert not parts.open
    assert len(parts.images) == 2 * masks_per_row
    captions = re.findall(r"((?:encoder|decoder)[^:]*layers): a row for each query", parts.words)
    assert len(captions) == 2 * masks_per_row
    decoder = preview.first.batch.decoder
    for row in range(2):
        at = row * masks_per_row + captions[:masks_per_row].index("decoder, local layers")
        data = parts.images[at]["src"].removeprefix("data:image/png;base64,")
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        scale = pixels.shape[0] // 64
        shown = np.any(pixels[::scale, ::scale, :3] < 245, axis=2)
        one = type(decoder)(*(None if part is None else part[row : row + 1] for part in decoder))
        np.testing.assert_array_equal(shown, np.asarray(visible(one, one, masks.decoder(GEMMA3, "local")))[0])


def test_the_words_are_the_rows(tmp_path):
    """Every example's text, escaped; how much is used; the shares, which sum to one."""
    experiment = made(tmp_path, T5GEMMA2, {"kind": "ul2"}, 64)
    preview = data_preview.measure(experiment)
    assert sum(preview.shares.values()) == pytest.approx(1.0)
    data_page.write(experiment, preview, tmp_path / "page.html", rows=8)
    text = (tmp_path / "page.html").read_text()
    assert "<script>" not in text
    parts = Parts()
    parts.feed(text)
    batch, tokenizer = preview.first.batch, experiment.data.tokenizer
    for row in range(8):
        used = int(np.count_nonzero(batch.decoder.segments[row]))
        assert f"targets: {used} of 64 tokens" in parts.words
        for segment in range(1, int(batch.encoder.segments[row].max()) + 1):
            tokens = batch.encoder.tokens[row][batch.encoder.segments[row] == segment]
            assert tokenizer.show(tokens).replace("\n", "⏎") in parts.words


def test_a_page_that_cannot_be_written(tmp_path):
    experiment = made(tmp_path, T5GEMMA2, {"kind": "ul2"}, 64)
    with pytest.raises(UserError, match=r"--page=.*nowhere/page.html cannot be written .*; give a file in a folder"):
        data_page.write(experiment, data_preview.measure(experiment), tmp_path / "nowhere" / "page.html", rows=1)
