"""Folders in, folders out: adapt and average as the commands call them."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.checkpoint.folder import load_model, open_model, save_model
from t5g2.checkpoint.state import Checkpoints
from t5g2.core import mesh as meshes
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.data.tokenizer import Bytes, from_dict
from t5g2.models import build
from t5g2.models.config import to_dict
from t5g2.train import experiment as experiments
from t5g2.train.experiment import Adapt
from t5g2.train.start import finish
from t5g2.train.weights import adapt_folder, adapt_into, average_run
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
    save_model(tmp_path / "source", weights.model(config), tokenizer=notes, carry=tokenizer.files)
    adapt_folder(Adapt(str(tmp_path / "source")), "t5gemma2", tmp_path / "adapted")
    made = open_model(tmp_path / "adapted")
    assert made.config.eoi_id == tokenizer.id("end_of_image")
    assert from_dict(made.tokenizer, made.path).encode("a text").tolist() == tokenizer.encode("a text").tolist()

    settings = [("data.tokenizer", "{'kind': 'sentencepiece', 'file': '" + str(file) + "'}")]
    settings.append(("model.vocab_size", str(tokenizer.vocab_size)))
    experiment = experiments.load(f"{Path(__file__).parents[1] / 'e2e' / 'config.py'}:source@{tmp_path}", settings)
    (tmp_path / "run").mkdir()
    finish(experiment, tmp_path / "run", 3, build.make(experiment.model, key=jax.random.key(0)), None)
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


def test_the_average_of_a_run(tmp_path):
    """The commands' view of it: a run's folder in, a model folder out; the arithmetic is tested with checkpoint/."""
    text = tmp_path / "data"
    for split in ("train", "heldout"):
        (text / split).mkdir(parents=True)
        (text / split / "a.txt").write_text("word " * 200)
    experiment = experiments.load(f"{Path(__file__).parents[1] / 'e2e' / 'config.py'}:source@{text}")
    run, out = tmp_path / "run", tmp_path / "out"
    with pytest.raises(UserError, match=r"experiment.json does not exist; give the workdir of a run"):
        average_run(run, out, last=2)
    models = [build.make(experiment.model, key=jax.random.key(i)) for i in range(3)]
    with Checkpoints(run / "checkpoints", keep=3) as checkpoints:
        for step, model in enumerate(models):
            checkpoints.save(step, model, {}, data={}, meta={})
    (run / "experiment.json").write_text(json.dumps(experiments.dump(experiment)))
    assert average_run(run, out, last=2) == [1, 2]
    made = open_model(out)
    assert made.config == experiment.model
    assert made.tokenizer["kind"] == "bytes"
    assert made.provenance["average_of_steps"] == [1, 2]
    table = [np.asarray(model.embedder.table[...]) for model in models]
    np.testing.assert_array_equal(made.leaves["embedder.table", None].read(), (table[1] + table[2]) / np.float32(2))
    with pytest.raises(UserError, match=r"cannot average 4 checkpoints of .*: there are 3 \(0, 1, 2\)"):
        average_run(run, tmp_path / "other", last=4)
