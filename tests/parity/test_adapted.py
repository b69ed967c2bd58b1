"""An adapted folder, exported, is what transformers loads without a word, and computes what we do.

The sources are Hugging Face folders and official Flax trees, taken as they are. Runs wherever torch and transformers
are installed. In CI on Python 3.11, where they are pinned, their absence fails.
"""

import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest

from t5g2.api import loading
from t5g2.checkpoint.export_folder import export_model
from t5g2.checkpoint.folder import open_model, save_model
from t5g2.models import sizes
from t5g2.models.config import to_dict
from t5g2.train.adaptation import adapt_folder
from t5g2.train.weight_origin import Adapt
from tests import tiny, weights
from tests.adapt.recipes import CASES

if not (os.environ.get("CI") and sys.version_info[:2] == (3, 11)):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")

import torch

from tests.checkpoint import test_flax_tree as trees
from tests.parity import test_exports as exports

# those that transformers has; the others are the papers' ablations and this project's own
EXPORTED = (
    "gemma 3",
    "gemma 3 with images",
    "gemma 3 with images, to text",
    "gemma 3 and the tower of siglip",
    "gemma 3 with images and another tower",
    "gemma 2",
    "gemma 2, fresh",
    "gemma 2, adding nothing",
    "gemma 2, multi-head",
    "gemma 2, two sources",
    "gemma 2, cut in depth",
)


def hugging_face(folder, name, config):
    """A Hugging Face folder with the weights of tests/weights.py."""
    save_model(folder / f"{name}-ours", weights.on_host(config))
    export_model(folder / f"{name}-ours", folder / name)
    return str(folder / name)


def adapted(folder, case):
    """The adapted model folder; the target is the case's, with T5Gemma's window as transformers has it."""
    sources = [case.source] if case.encoder is None else [case.encoder, case.source]
    given = ",".join(hugging_face(folder, f"source{i}", config) for i, config in enumerate(sources))
    vision = None if case.vision is None else hugging_face(folder, "tower", case.vision)
    target = case.target(case.sources())
    if target.cross == "separate":
        target = replace(target, encoder_window="each_side_inclusive")
    (folder / "target.json").write_text(json.dumps(to_dict(target)))
    adapt_folder(Adapt(given, vision, case.choices), str(folder / "target.json"), folder / "adapted")
    assert open_model(folder / "adapted").config == target
    return folder / "adapted"


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_loads_what_was_adapted_and_computes_the_same(tmp_path, name):
    ours = adapted(tmp_path, CASES[name])
    export_model(ours, tmp_path / "hf")
    theirs = exports.load(tmp_path / "hf")
    draw = np.random.default_rng(3)
    encoder, decoder = draw.integers(9, 90, (2, 9)), draw.integers(9, 90, (2, 11))
    model = loading.load(ours, compute=tiny.FLOAT32)
    images = {}
    if model.config.encoder.images is not None:
        encoder[:, 2:] = [6, 8, 8, 8, 8, 7, 30]  # begin, four image tokens, end
        if model.config.encoder.images.tokens == 16:
            encoder = np.concatenate([np.full((2, 1), 6), np.full((2, 16), 8), np.full((2, 1), 7)], 1)
        size = model.config.encoder.images.vision.image_size
        pixels = draw.uniform(-1, 1, (2, 1, size, size, 3)).astype(np.float32)
        images = {"pixel_values": torch.tensor(pixels[:, 0].transpose(0, 3, 1, 2).copy())}
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(encoder),
            attention_mask=torch.ones(encoder.shape, dtype=torch.long),
            decoder_input_ids=torch.tensor(decoder),
            decoder_attention_mask=torch.ones(decoder.shape, dtype=torch.long),
            use_cache=False,
            **images,
        ).logits.numpy()
    found = model.logits(decoder, encoder_tokens=encoder, images=pixels if images else None)
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gemma 2", "gemma 3 with images"])
def test_official_flax_trees_are_sources(tmp_path, name, monkeypatch):
    """No import first: the tree's shapes say which released size it is, and the result is the same bit for bit."""
    config = exports.FAMILIES[name]
    rows = min(config.vocab_size, 97 if config.images is None else config.images.token + 90)
    monkeypatch.setattr(sizes, "SIZES", {"tiny": replace(config, vocab_size=rows)})
    hf = exports.stored(exports.export(tmp_path, config))
    tree = exports.official_stack(hf, config, "model." if config.images is None else "language_model.model.", t5=False)
    if config.images is not None:
        tree |= exports.official_tower(hf, config.images.vision)
    trees.save(tmp_path / "flax", trees.VARIANTS["nested"](tree))
    family = "t5gemma" if name == "gemma 2" else "t5gemma2"
    changes = [] if config.images is None else [("encoder.images.token", "9")]
    for source in ("flax", "hf", "ours"):
        adapt_folder(Adapt(str(tmp_path / source)), family, tmp_path / f"from-{source}", changes=changes)
    found = [exports.bits(open_model(tmp_path / f"from-{source}")) for source in ("flax", "hf", "ours")]
    assert found[0] == found[1] == found[2]
