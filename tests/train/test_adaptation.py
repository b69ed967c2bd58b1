"""Folders in, folders out: adapt and average as the commands call them."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.checkpoint.folder import load_model, open_model, save_model
from t5g2.checkpoint.train_states import Checkpoints
from t5g2.core import sharding as meshes
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.data import image_processor
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.data.tokenizers.registry import from_dict
from t5g2.jobs.run_average import average_run
from t5g2.models import build, sizes
from t5g2.models.config import text_only, to_dict
from t5g2.train import config_file
from t5g2.train import experiment as experiments
from t5g2.train.adaptation import adapt_folder, adapt_into
from t5g2.train.state import TrainState
from t5g2.train.weight_origin import Adapt
from t5g2.train.workdir import finish
from tests import tiny, weights
from tests.data import tokenizer_files

TOKENIZER = Bytes(sentinels=5)
SOURCE = dataclasses.replace(tiny.GEMMA3, vocab_size=TOKENIZER.vocab_size)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "source"
    save_model(folder, weights.model(SOURCE), tokenizer=TOKENIZER.to_dict())
    return folder


def test_a_folder_becomes_a_folder(source, tmp_path, capsys):
    provenance = adapt_folder(Adapt(str(source)), "t5gemma2", tmp_path / "adapted")
    made = open_model(tmp_path / "adapted")
    assert made.config.decoder == made.config.encoder == SOURCE
    assert made.config.eoi_id == TOKENIZER.id("end_of_image")
    assert made.tokenizer == TOKENIZER.to_dict()
    assert made.provenance == provenance.to_dict()
    assert made.provenance["source"] == str(source)
    assert capsys.readouterr().out == f"{provenance.table()}\nwrote {tmp_path / 'adapted'}\n"
    given, model = tree.leaves(weights.model(SOURCE)), tree.leaves(load_model(made))
    for layer in range(SOURCE.layers):
        for side in ("encoder", "decoder"):
            leaf = model[f"{side}.layers.attention.k", layer].read()
            np.testing.assert_array_equal(leaf, given["layers.attention.k", layer].read())


def test_a_tokenizer_in_a_file_goes_along(tmp_path):
    """From the source to what it is adapted to, and from a run's config to its model folder."""
    tokenizer_files.sentencepiece(tmp_path)
    file = tmp_path / "tokenizer.model"
    tokenizer = from_dict({"kind": "sentencepiece", "file": str(file)})
    config = dataclasses.replace(tiny.GEMMA3, vocab_size=tokenizer.vocab_size)
    notes = tokenizer.to_dict()
    save_model(tmp_path / "source", weights.model(config), tokenizer=notes, extra_files=tokenizer.files)
    adapt_folder(Adapt(str(tmp_path / "source")), "t5gemma2", tmp_path / "adapted")
    made = open_model(tmp_path / "adapted")
    assert made.config.eoi_id == tokenizer.id("end_of_image")
    assert from_dict(made.tokenizer, made.path).encode("a text").tolist() == tokenizer.encode("a text").tolist()

    settings = [("data.tokenizer", "{'kind': 'sentencepiece', 'file': '" + str(file) + "'}")]
    settings.append(("model.vocab_size", str(tokenizer.vocab_size)))
    experiment = config_file.load(f"{Path(__file__).parents[1] / 'e2e' / 'config.py'}:source@{tmp_path}", settings)
    (tmp_path / "run").mkdir()
    state = TrainState(3, build.make(experiment.model, key=jax.random.key(0)), None)
    finish(tmp_path / "run", experiment, 3, state, None)
    made = open_model(tmp_path / "run" / "model")
    assert from_dict(made.tokenizer, made.path) == tokenizer


def test_straight_onto_a_mesh(source, tmp_path, devices):
    config = dataclasses.replace(tiny.T5GEMMA2, encoder=SOURCE, decoder=dataclasses.replace(SOURCE, window=5))
    mesh = meshes.make(meshes.MeshShape(data=2, fsdp=2, tensor=2))
    model, provenance = adapt_into(Adapt(str(source)), config, mesh=mesh, param_dtype="bfloat16")
    assert [x.sharding for x in jax.tree.leaves(model)] == jax.tree.leaves(meshes.shardings(model, mesh))
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype("bfloat16")}
    assert provenance.settings == ("decoder.window: 4 in the source, 5 in the target",)
    assert provenance.table().endswith("\nchanged  decoder.window: 4 in the source, 5 in the target")


def test_a_target_from_a_file(source, tmp_path):
    config = dataclasses.replace(tiny.T5GEMMA2, encoder=SOURCE, decoder=SOURCE, eoi_id=None)
    (tmp_path / "model.json").write_text(json.dumps(to_dict(config)))
    adapt_folder(Adapt(str(source)), str(tmp_path / "model.json"), tmp_path / "out")
    assert open_model(tmp_path / "out").config == config


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("t5gemma2:270m", r"t5gemma2:270m-270m"),
        ("t5gemma2:270m-270m", r"encoder.width: 32 in the source, 640 in the target"),
        ("gemma3:270m", r"the target is decoder-only; give an encoder-decoder one, such as t5gemma2"),
        (
            "nowhere/model.json",
            r"nowhere/model.json does not exist; give a model.json, the name of a size, or t5gemma or t5gemma2",
        ),
        ("{broken}", r"broken.json is not JSON"),
    ],
)
def test_wrong_targets(source, tmp_path, target, message):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=message):
        adapt_folder(Adapt(str(source)), target.format(broken=tmp_path / "broken.json"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_folders(source, tmp_path):
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        adapt_folder(Adapt(str(source)), "t5gemma2", source)
    with pytest.raises(
        UserError, match="nowhere does not exist; give a Hugging Face folder, an official Flax one or a model folder"
    ):
        adapt_folder(Adapt(str(tmp_path / "nowhere")), "t5gemma2", tmp_path / "out")
    adapt_folder(Adapt(str(source)), "t5gemma2", tmp_path / "adapted")
    with pytest.raises(UserError, match="adapted is an encoder-decoder model already"):
        adapt_folder(Adapt(str(tmp_path / "adapted")), "t5gemma2", tmp_path / "out")


def test_two_sources(tmp_path):
    """The encoder's first; each once, though one is given twice; of one tokenizer."""
    small = dataclasses.replace(SOURCE, layers=2)
    for name, config in (("large", SOURCE), ("small", small)):
        save_model(tmp_path / name, weights.model(config), tokenizer=TOKENIZER.to_dict())
    provenance = adapt_folder(Adapt(f"{tmp_path / 'large'},{tmp_path / 'small'}"), "t5gemma2", tmp_path / "out")
    made = open_model(tmp_path / "out")
    assert (made.config.encoder.layers, made.config.decoder.layers) == (3, 2)
    assert made.tokenizer == TOKENIZER.to_dict()
    assert provenance.source == f"encoder {tmp_path / 'large'}, decoder {tmp_path / 'small'}"
    alone = adapt_folder(Adapt(f"{tmp_path / 'large'},{tmp_path / 'large'}"), "t5gemma2", tmp_path / "alone")
    assert alone.source == str(tmp_path / "large")
    with pytest.raises(UserError, match=r"source = 'a,b,c'; give one folder, or two separated by a comma"):
        Adapt("a,b,c")
    save_model(tmp_path / "other", weights.model(small), tokenizer=Bytes(sentinels=4).to_dict())
    with pytest.raises(UserError, match=r"large and .*other have different tokenizers"):
        adapt_folder(Adapt(f"{tmp_path / 'large'},{tmp_path / 'other'}"), "t5gemma2", tmp_path / "none")
    save_model(
        tmp_path / "half",
        tree.build(build.abstract(small, jnp.bfloat16), lambda key: weights.weights(small)[key].astype(jnp.bfloat16)),
    )
    mixed = Adapt(f"{tmp_path / 'large'},{tmp_path / 'half'}")
    with pytest.raises(
        UserError, match=r"weights of several dtypes \(.*large: float32, .*half: bfloat16\); choose one"
    ):
        adapt_folder(mixed, "t5gemma2", tmp_path / "none")
    adapt_folder(mixed, "t5gemma2", tmp_path / "cast", dtype="bfloat16")
    assert {leaf.dtype for leaf in open_model(tmp_path / "cast").leaves.values()} == {jnp.dtype("bfloat16")}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "alone",
        "cast",
        "half",
        "large",
        "other",
        "out",
        "small",
    ]


def test_a_size_with_images_is_adapted_without_where_there_is_no_tower(tmp_path, capsys, monkeypatch):
    """And with one where --vision gives it; a target that says images itself wants them."""
    target = dataclasses.replace(
        tiny.T5GEMMA2,
        encoder=dataclasses.replace(SOURCE, images=dataclasses.replace(tiny.IMAGES, token=7, begin=5, end=6)),
        decoder=SOURCE,
        eoi_id=6,
    )
    monkeypatch.setitem(sizes.SIZES, "t5gemma2:tiny", target)
    save_model(tmp_path / "source", weights.model(SOURCE), tokenizer=TOKENIZER.to_dict())
    save_model(tmp_path / "tower", weights.model(tiny.SIGLIP))
    adapt_folder(Adapt(str(tmp_path / "source")), "t5gemma2:tiny", tmp_path / "text")
    assert open_model(tmp_path / "text").config == text_only(target)
    assert "t5gemma2:tiny without its image tower: " in capsys.readouterr().out
    seeing = Adapt(str(tmp_path / "source"), str(tmp_path / "tower"))
    adapt_folder(seeing, "t5gemma2:tiny", tmp_path / "seeing")
    assert open_model(tmp_path / "seeing").config == target
    adapt_folder(seeing, "t5gemma2", tmp_path / "derived")
    images = open_model(tmp_path / "derived").config.encoder.images
    assert (images.begin, images.end, images.token, images.vision) == (5, 6, 7, tiny.VISION)
    with pytest.raises(UserError, match=r"the target reads images, and .*source has no image tower; give the folder"):
        adapt_into(Adapt(str(tmp_path / "source")), target)
    with pytest.raises(UserError, match="source is a language model without an image tower; give the folder of one"):
        adapt_into(Adapt(str(tmp_path / "source"), str(tmp_path / "source")), target)
    with pytest.raises(UserError, match=r"unknown key 'crosss' in target \(EncoderDecoderConfig\); did"):
        adapt_folder(seeing, "t5gemma2", tmp_path / "no", changes=[("crosss", "merged")])


def test_another_tower_brings_its_image_processor(tmp_path):
    """Its own numbers for the pixels, and not those of the source's tower that it replaces."""
    images = dataclasses.replace(tiny.IMAGES, token=7, begin=5, end=6)
    source, tower = tmp_path / "source", tmp_path / "tower"
    save_model(source, weights.model(dataclasses.replace(SOURCE, images=images)), tokenizer=TOKENIZER.to_dict())
    (source / "processor_config.json").write_text('{"image_processor": {"resample": 0}}')
    save_model(tower, weights.model(tiny.SIGLIP))
    fields = {"image_processor_type": "SiglipImageProcessor", "resample": 3, "image_mean": [0.4, 0.5, 0.6]}
    adapt_folder(Adapt(str(source), str(tower)), "t5gemma2", tmp_path / "silent")
    assert image_processor.read(tmp_path / "silent", default="bilinear").resampling == "nearest"
    (tower / "preprocessor_config.json").write_text(json.dumps(fields))
    adapt_folder(Adapt(str(source), str(tower)), "t5gemma2", tmp_path / "seeing")
    theirs, ours = (image_processor.read(path, default="bilinear") for path in (tower, tmp_path / "seeing"))
    assert theirs == ours
    assert (ours.resampling, ours.mean) == ("bicubic", (0.4, 0.5, 0.6))
    written = json.loads((tmp_path / "seeing" / "preprocessor_config.json").read_text())
    assert written["size"] == {"height": 16, "width": 16}
    assert written["image_processor_type"] == "Gemma3ImageProcessor"
    adapt_folder(Adapt(str(source)), "t5gemma2", tmp_path / "own")
    assert image_processor.read(tmp_path / "own", default="bilinear").resampling == "nearest"


def test_the_image_token_of_a_tokenizer_in_a_file(tmp_path):
    """Gemma 3's image token lies past the vocabulary, T5Gemma 2's is the one after the end of an image."""
    tokenizer_files.sentencepiece(tmp_path)
    tokenizer = from_dict({"kind": "sentencepiece", "file": str(tmp_path / "tokenizer.model")})
    end = tokenizer.id("end_of_image")
    rows = tokenizer.vocab_size
    images = dataclasses.replace(tiny.IMAGES, token=rows, begin=end - 1, end=end)
    config = dataclasses.replace(tiny.GEMMA3, vocab_size=rows + 3, images=images)
    save_model(tmp_path / "source", weights.model(config), tokenizer=tokenizer.to_dict(), extra_files=tokenizer.files)
    adapt_folder(Adapt(str(tmp_path / "source")), "t5gemma2", tmp_path / "adapted")
    made = open_model(tmp_path / "adapted")
    assert made.config.decoder.vocab_size == rows
    assert made.config.encoder.images.token == end + 1
    assert from_dict(made.tokenizer, made.path).id("image") == end + 1


def test_the_average_of_a_run(tmp_path):
    """The commands' view of it: a run's folder in, a model folder out; the arithmetic is tested with checkpoint/."""
    text = tmp_path / "data"
    for split in ("train", "heldout"):
        (text / split).mkdir(parents=True)
        (text / split / "a.txt").write_text("word " * 200)
    experiment = config_file.load(f"{Path(__file__).parents[1] / 'e2e' / 'config.py'}:source@{text}")
    run, out = tmp_path / "run", tmp_path / "out"
    with pytest.raises(UserError, match=r"experiment.json does not exist; give the workdir of a run"):
        average_run(run, out, last=2)
    models = [build.make(experiment.model, key=jax.random.key(i)) for i in range(3)]
    with Checkpoints(run / "checkpoints", keep=3) as checkpoints:
        for step, model in enumerate(models):
            checkpoints.save(step, model, {}, data={}, meta={})
    (run / "experiment.json").write_text(json.dumps(experiments.dump(experiment)))
    assert average_run(run, out, last=2) == [1, 2]
    assert average_run(run, tmp_path / "newest", last=1) == [2]
    made = open_model(out)
    assert made.config == experiment.model
    assert made.tokenizer["kind"] == "bytes"
    assert made.provenance["average_of_steps"] == [1, 2]
    table = [np.asarray(model.embedder.table[...]) for model in models]
    np.testing.assert_array_equal(made.leaves["embedder.table", None].read(), (table[1] + table[2]) / np.float32(2))
    with pytest.raises(UserError, match=r"cannot average 4 checkpoints of .* steps 0, 1, 2; average 1 to 3"):
        average_run(run, tmp_path / "other", last=4)
