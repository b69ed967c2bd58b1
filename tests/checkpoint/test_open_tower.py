"""The image tower of a folder: the same bits whatever folder it lies in, with all else that the folder holds."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util

from t5g2.checkpoint import flax_names, names, safetensors_io
from t5g2.checkpoint.export_folder import export_model
from t5g2.checkpoint.folder import save_model
from t5g2.checkpoint.import_folder import open_foreign, open_tower
from t5g2.checkpoint.tensor import Tensor
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.models import build
from t5g2.models.siglip import VisionTower
from t5g2.models.sizes import SIZES
from tests import tiny, weights

VISION = tiny.SIGLIP.vision
FAMILIES = {
    "gemma3": (tiny.GEMMA3_IMAGES, tiny.IMAGES.vision),
    "t5gemma2": (tiny.T5GEMMA2_IMAGES, tiny.IMAGES.vision),
    "siglip": (tiny.SIGLIP, VISION),
}


def bits(leaves):
    return {key: (leaf.shape, str(leaf.dtype), np.asarray(leaf.read()).tobytes()) for key, leaf in leaves.items()}


def expected(config, dtype=jnp.float32):
    """Every leaf of the tests' model, as bytes."""
    model = jax.tree.map(lambda x: x.astype(dtype), weights.on_host(config))
    return bits(tree.leaves(model))


def tower_of(config):
    return {key: leaf for key, leaf in expected(config).items() if key[0].startswith("vision.")}


@pytest.fixture
def alone(tmp_path):
    """A tower alone as transformers saves it, taken out of an exported SigLIP; (folder, tensors)."""
    save_model(tmp_path / "ours", weights.on_host(tiny.SIGLIP))
    export_model(tmp_path / "ours", tmp_path / "both")
    found = {name: tensor.read() for name, tensor in safetensors_io.read(tmp_path / "both").items()}
    tensors = {name: array for name, array in found.items() if name.startswith("vision_model.")}
    data = json.loads((tmp_path / "both" / "config.json").read_text())["vision_config"]
    return write(tmp_path / "alone", tensors, data | {"model_type": "siglip_vision_model"}), tensors


def write(path, tensors, config):
    path.mkdir(exist_ok=True)
    lazy = {name: Tensor(x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()}
    safetensors_io.write(path, lazy, single_file=safetensors_io.SINGLE)
    (path / "config.json").write_text(json.dumps(config))
    return path


def reconfigure(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_model_folders_and_those_of_hugging_face(tmp_path, family, dtype):
    """Everything in the folder comes along, not the tower alone."""
    config, vision = FAMILIES[family]
    save_model(tmp_path / "ours", jax.tree.map(lambda x: x.astype(dtype), weights.on_host(config)))
    export_model(tmp_path / "ours", tmp_path / "theirs")
    for name in ("ours", "theirs"):
        tower = open_tower(tmp_path / name)
        assert (tower.path, tower.config) == (tmp_path / name, vision)
        assert bits(tower.leaves) == expected(config, dtype)
    assert ("vision.positions", None) in tower.leaves


def test_an_official_tree(tmp_path, monkeypatch):
    config = tiny.GEMMA3_IMAGES
    monkeypatch.setitem(SIZES, "gemma3:tiny", config)
    arrays = weights.weights(config)
    matches = names.match_tensors(flax_names.GEMMA, tree.leaves(build.abstract(config)))
    nested = {match.name: match.axes.to_tensor([arrays[key] for key in match.keys]) for match in matches}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "flax", traverse_util.unflatten_dict(nested, sep="/"))
    tower = open_tower(tmp_path / "flax")
    assert tower.config == tiny.IMAGES.vision
    assert bits(tower.leaves) == expected(config)


def test_a_tower_alone(alone):
    path, tensors = alone
    tower = open_tower(path)
    assert (tower.path, tower.config) == (path, VISION)
    assert bits(tower.leaves) == tower_of(tiny.SIGLIP)
    # as transformers 5 spells it
    write(path, {name.removeprefix("vision_model."): x for name, x in tensors.items()}, read(path))
    assert bits(open_tower(path).leaves) == tower_of(tiny.SIGLIP)


def read(path):
    return json.loads((path / "config.json").read_text())


def test_a_tower_alone_without_its_pooling_head(alone):
    path, tensors = alone
    write(path, {name: x for name, x in tensors.items() if ".head." not in name}, read(path))
    reconfigure(path, vision_use_head=False)
    tower = open_tower(path)
    assert tower.config == dataclasses.replace(VISION, pool=False)
    assert bits(tower.leaves) == {at: of for at, of in tower_of(tiny.SIGLIP).items() if ".pool." not in at[0]}


@pytest.mark.parametrize("pool", [True, False])
def test_a_tower_that_transformers_saved(tmp_path, pool):
    pytest.importorskip("torch")
    from tests.parity import siglip_reference

    config = dataclasses.replace(VISION, pool=pool)
    model = VisionTower(config, key=jax.random.key(0))
    siglip_reference.tower(model).save_pretrained(tmp_path)
    tower = open_tower(tmp_path)
    assert tower.config == config
    assert bits(tower.leaves) == bits(tree.leaves({"vision": model}))


def test_no_weight_is_read_before_it_is_asked_for(alone, monkeypatch):
    def refused(*_):
        raise AssertionError

    path, _ = alone
    monkeypatch.setattr(safetensors_io, "_lazy_tensor", lambda file, entry, _: Tensor(*entry[2:0:-1], refused))
    leaves = open_tower(path).leaves
    with pytest.raises(AssertionError):
        leaves["vision.positions", None].read()


def test_a_folder_without_a_tower(tmp_path):
    kinds = (
        r"Gemma 3 with images \(4b and larger\), MedGemma, T5Gemma 2 with images, SigLIP, MedSigLIP, or a tower alone"
    )
    for name in ("GEMMA3", "T5GEMMA2", "T5GEMMA"):
        save_model(tmp_path / name, weights.on_host(getattr(tiny, name)))
        export_model(tmp_path / name, tmp_path / f"{name}_HF")
        for folder in (name, f"{name}_HF"):
            with pytest.raises(UserError, match=rf"{folder} is a language model without an image tower.*{kinds}"):
                open_tower(tmp_path / folder)
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        open_tower(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no known model"):
        open_tower(tmp_path / "empty")


def test_a_damaged_tower(alone):
    path, tensors = alone
    less = {name: x for name, x in tensors.items() if name != "vision_model.post_layernorm.bias"}
    write(path, less | {"vision_model.other": np.zeros(2, np.float32)}, read(path))
    with pytest.raises(UserError) as error:
        open_tower(path)
    assert f"the tensors in {path}, according to config.json, are not those of Hugging Face SigLIP vision tower" in str(
        error.value
    )
    assert "missing  vision_model.post_layernorm.bias: [16]" in str(error.value)
    assert "surplus  vision_model.other: [2]" in str(error.value)
    write(path, tensors, read(path))
    reconfigure(path, hidden_size=64)
    with pytest.raises(UserError, match=r"changed  vision_model.embeddings.patch_embedding.bias: \[64\] -> \[16\]"):
        open_tower(path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model.safetensors is truncated or damaged"):
        open_tower(path)
    file.unlink()
    with pytest.raises(UserError, match=r"alone holds no weights"):
        open_tower(path)
    (path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        open_tower(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "gelu", r"alone: config.json: hidden_act = 'gelu'; supported: 'gelu_pytorch_tanh'"),
        ("num_channels", 1, r"alone: config.json: num_channels = 1; supported: 3"),
        (
            "quantization_config",
            {"bits": 4},
            r"alone: config.json: quantization_config = {'bits': 4}; weights in whole",
        ),
        ("num_attention_heads", 5, r"alone: .*heads"),
        ("num_hidden_layers", 10**9, r"alone: .*layers"),
    ],
)
def test_a_tower_of_another_architecture(alone, field, value, message):
    path, _ = alone
    reconfigure(path, **{field: value})
    with pytest.raises(UserError, match=message):
        open_tower(path)


def test_a_tower_alone_is_no_model(alone):
    path, _ = alone
    with pytest.raises(UserError, match=r"(?s)one tower of a model; supported are whole ones.*t5g2 adapt --vision=DIR"):
        open_foreign(path)
