"""Model folders: what comes back is what was saved, and what is wrong with a folder is an error."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from t5g2.checkpoint import folder, safetensors_io
from t5g2.checkpoint.folder import load_model, open_model, save_model
from t5g2.core import sharding as meshes
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.models import build
from t5g2.models.config import text_only
from tests import tiny

TOKENIZER = {"kind": "bytes", "sentinels": 5}
PROVENANCE = {"rows": []}


def make(config, dtype=jnp.float32):
    return build.make(config, key=jax.random.key(0), param_dtype=dtype)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("folder") / "model"
    save_model(directory, make(tiny.T5GEMMA2), tokenizer=TOKENIZER, provenance=PROVENANCE, shard_bytes=20_000)
    return directory


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy that a test may damage."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in saved.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("config", [tiny.GEMMA3, tiny.T5GEMMA2], ids=["gemma3", "t5gemma2"])
def test_there_and_back(tmp_path, config, dtype):
    model = make(config, dtype)
    save_model(tmp_path / "a" / "model", model)
    opened = open_model(tmp_path / "a" / "model")
    assert (opened.config, opened.tokenizer, opened.provenance) == (config, None, None)
    assert_equal(load_model(opened), model)
    assert_equal(
        load_model(tmp_path / "a" / "model", param_dtype=jnp.float32),
        jax.tree.map(lambda x: x.astype(jnp.float32), model),
    )
    assert os.listdir(tmp_path / "a") == ["model"]


def test_loads_onto_a_mesh(saved, devices):
    mesh = meshes.make(meshes.MeshShape(data=2, fsdp=2, tensor=2))
    model = load_model(saved, mesh=mesh)
    assert_equal(model, make(tiny.T5GEMMA2))
    placed = [x.sharding for x in jax.tree.leaves(model)]
    assert placed == jax.tree.leaves(meshes.shardings(model, mesh))
    assert any(not sharding.is_fully_replicated for sharding in placed)


def test_anything_can_read_it(saved):
    opened = open_model(saved)
    assert (opened.tokenizer, opened.provenance) == (TOKENIZER, PROVENANCE)
    assert json.loads((saved / "model.json").read_text())["kind"] == "t5gemma"
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    held = {name: x for shard in shards for name, x in safetensors.numpy.load_file(saved / shard).items()}
    expected = {tree.name(key): np.asarray(leaf.read()) for key, leaf in tree.leaves(make(tiny.T5GEMMA2)).items()}
    assert held.keys() == expected.keys() == index["weight_map"].keys()
    assert "decoder.layers.attention.q.2" in held
    for name, x in expected.items():
        np.testing.assert_array_equal(held[name], x)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in expected.values())


def test_nothing_is_read_before_it_is_asked_for(saved, monkeypatch):
    opened = open_model(saved)
    leaf = opened.leaves["decoder.layers.attention.q", 2]
    assert (leaf.shape, leaf.dtype, leaf.axes) == ((32, 4, 8), np.float32, ("embed", "heads", "head_size"))
    read = []
    monkeypatch.setattr(np, "asarray", lambda *a, **k: read.append(a))
    assert not read
    assert leaf.read().shape == (32, 4, 8)


def test_nothing_is_overwritten_and_nothing_half_is_left(saved, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="exists already and is not overwritten; give another one, or remove it"):
        save_model(saved, make(tiny.GEMMA3))

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(safetensors_io, "write", full)
    with pytest.raises(OSError, match="no space left"):
        save_model(tmp_path / "model", make(tiny.GEMMA3))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; give a model folder"):
        open_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is not a model folder: it has no model.json"):
        open_model(tmp_path)


def test_no_weights(damaged):
    (damaged / "model.safetensors.index.json").unlink()
    with pytest.raises(
        UserError, match=r"holds no weights: neither model.safetensors.index.json nor model.safetensors"
    ):
        open_model(damaged)


def shard(path, number=1):
    return sorted(path.glob("model-*"))[number]


@pytest.mark.parametrize("keep", [0, 5, 60, -3])
def test_a_truncated_file(damaged, keep):
    file = shard(damaged)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"{file.name} is truncated or damaged .* write or download it again"):
        open_model(damaged)


def test_a_missing_file(damaged):
    shard(damaged).unlink()
    with pytest.raises(UserError, match=rf"{shard(damaged).name[:7]}.* is missing; write or download the folder again"):
        open_model(damaged)


def test_a_file_that_is_not_what_the_index_says(damaged):
    file = shard(damaged)
    held = safetensors.numpy.load_file(file)
    gone = sorted(held)[0]
    held["other"] = held.pop(gone)
    safetensors.numpy.save_file(held, file)
    with pytest.raises(UserError, match=rf"does not hold what .*index.json lists; missing: {gone}; surplus: other\."):
        open_model(damaged)


@pytest.mark.parametrize("name", ["model.json", "t5g2_tokenizer.json", "model.safetensors.index.json"])
def test_broken_json(damaged, name):
    (damaged / name).write_text("{")
    with pytest.raises(UserError, match=rf"{name} is (not JSON|damaged)"):
        open_model(damaged)


def test_weights_of_another_model(damaged):
    """Two layers instead of three, a wider MLP, no vector for the end of an image: all of it is in one message."""
    other = dataclasses.replace(tiny.GEMMA3, layers=2, mlp_width=40)
    config = dataclasses.replace(tiny.T5GEMMA2, encoder=other, eoi_id=None)
    (damaged / "model.json").write_text(json.dumps(folder.to_dict(config)))
    with pytest.raises(UserError) as caught:
        open_model(damaged)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("are not those that its model.json describes (described -> stored):")
    assert "surplus  embedder.eoi: [32]" in lines
    assert "surplus  encoder.layers.attention.q.2: [32, 4, 8]" in lines
    assert "changed  encoder.layers.mlp.up.1: [32, 40] -> [32, 48]" in lines
    assert not [line for line in lines if "decoder" in line]
    (damaged / "model.json").write_text(json.dumps(folder.to_dict(config) | {"eoid": 3}))
    with pytest.raises(UserError, match=r"(?s)eoid.*did you mean 'eoi_id'"):
        open_model(damaged)


def test_several_dtypes_need_a_choice(saved):
    opened = open_model(saved)
    key = "embedder.table", None
    half = dataclasses.replace(opened.leaves[key], dtype=np.dtype(jnp.bfloat16))
    mixed = dataclasses.replace(opened, leaves={**opened.leaves, key: half})
    with pytest.raises(UserError, match="several dtypes: bfloat16, float32; choose one"):
        load_model(mixed)
    assert {x.dtype for x in jax.tree.leaves(load_model(mixed, param_dtype=jnp.float32))} == {jnp.dtype("float32")}


def test_files_are_carried_along(saved, tmp_path):
    for name in ("tokenizer.json", "chat_template.jinja", "config.json"):
        (tmp_path / name).write_text(name)
    carry = folder.extra_files(tmp_path)
    assert [file.name for file in carry] == ["chat_template.jinja", "tokenizer.json"]
    save_model(tmp_path / "model", make(tiny.GEMMA3), extra_files=carry)
    opened = open_model(tmp_path / "model")
    assert [file.read_text() for file in opened.extra_files] == ["chat_template.jinja", "tokenizer.json"]
    assert open_model(saved).extra_files == ()


@pytest.mark.parametrize("config", [tiny.GEMMA3_IMAGES, tiny.T5GEMMA2_IMAGES], ids=["gemma3", "t5gemma2"])
def test_without_images_the_tower_is_not_read(tmp_path, config):
    """Nor can it be: its bytes are gone."""
    model = make(config)
    save_model(tmp_path / "model", model)
    opened = folder.without_images(open_model(tmp_path / "model"))
    assert opened.config == text_only(config)
    assert not [path for path, _ in opened.leaves if path.startswith(("vision", "projector"))]
    file = shard(tmp_path / "model", 0)
    tower = [key for key in open_model(tmp_path / "model").leaves if key[0].startswith(("vision", "projector"))]
    cut = min(begin_of(file, tree.name(key)) for key in tower)
    assert all(begin_of(file, tree.name(key)) < cut for key in opened.leaves)
    os.truncate(file, cut)
    text = load_model(opened)
    for key, leaf in tree.leaves(text).items():
        np.testing.assert_array_equal(leaf.read(), tree.leaves(model)[key].read())
    with pytest.raises(UserError, match="truncated or damaged"):
        open_model(tmp_path / "model")


@pytest.mark.parametrize("config", [tiny.GEMMA3, tiny.T5GEMMA2, tiny.SIGLIP], ids=["gemma3", "t5gemma2", "siglip"])
def test_without_images_where_there_are_none(tmp_path, config):
    save_model(tmp_path / "model", make(config))
    opened = open_model(tmp_path / "model")
    assert folder.without_images(opened) is opened


def begin_of(file, name):
    """Returns the offset of the bytes of a tensor in a safetensors file."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
