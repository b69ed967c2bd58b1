"""Export: files as transformers writes them, the same bits after an import, dtypes, copied files."""

import dataclasses
import hashlib
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.checkpoint.export_folder import export_model
from t5g2.checkpoint.folder import open_model
from t5g2.checkpoint.import_folder import import_model, open_foreign
from tests import tiny, weights
from tests.checkpoint.foreign_folders import (
    FAMILIES,
    bits,
    rewrite,
    save,
    stored,
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_there_and_back_and_there(tmp_path, family, dtype):
    config = FAMILIES[family]
    ours = open_model(save(tmp_path / "ours", config, dtype))
    export_model(ours.path, tmp_path / "theirs", shard_bytes=20_000)
    back = import_model(tmp_path / "theirs", tmp_path / "back")
    assert back.config == config
    assert bits(back) == bits(ours)
    export_model(tmp_path / "back", tmp_path / "again")
    assert stored(tmp_path / "again").keys() == stored(tmp_path / "theirs").keys()
    for name, array in stored(tmp_path / "theirs").items():
        assert array.tobytes() == stored(tmp_path / "again")[name].tobytes(), name


def test_files_are_as_transformers_writes_them(tmp_path):
    save(tmp_path / "ours", tiny.GEMMA3, jnp.bfloat16)
    export_model(tmp_path / "ours", tmp_path / "one")
    assert sorted(os.listdir(tmp_path / "one")) == ["config.json", "generation_config.json", "model.safetensors"]
    export_model(tmp_path / "ours", tmp_path / "many", shard_bytes=20_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 1
    for file in [tmp_path / "one" / "model.safetensors", *(tmp_path / "many" / file for file in files)]:
        header = file.read_bytes()
        assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"format": "pt"}
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["Gemma3ForCausalLM"], "bfloat16")
    generation = json.loads((tmp_path / "one" / "generation_config.json").read_text())
    assert generation == {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def test_files_are_carried_along(tmp_path, hugging_face):
    hf_folder = hugging_face(tiny.GEMMA3)
    generation = {"eos_token_id": [1, 106], "top_k": 64}
    contents = {"tokenizer.json": "{}", "tokenizer.model": "x", "chat_template.jinja": "y"}
    contents |= {"generation_config.json": json.dumps(generation), "preprocessor_config.json": "z"}
    for name, text in contents.items():
        (hf_folder / name).write_text(text)
    (hf_folder / "README.md").write_text("not of the model")
    back = import_model(hf_folder, tmp_path / "back")
    hashed = hashlib.sha256(b"{}").hexdigest()
    assert back.tokenizer == {"kind": "huggingface", "file": "tokenizer.json", "sha256": hashed}
    # the ids that only config.json has are added, because a model folder does not keep that file
    generation |= {"bos_token_id": 2, "pad_token_id": 0}
    carried = {file.name: file.read_text() for file in back.extra_files}
    assert json.loads(carried.pop("generation_config.json")) == generation
    assert carried.items() < contents.items()
    assert not (tmp_path / "back" / "README.md").exists()
    export_model(tmp_path / "back", tmp_path / "again")
    again = {name: (tmp_path / "again" / name).read_text() for name in contents}
    assert json.loads(again.pop("generation_config.json")) == generation
    assert again.items() < contents.items()
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == ([1, 106], 2)
    (hf_folder / "tokenizer.json").unlink()
    assert open_foreign(hf_folder).tokenizer == {
        "kind": "sentencepiece",
        "file": "tokenizer.model",
        "sha256": hashlib.sha256(b"x").hexdigest(),
    }


def test_a_dtype_that_is_asked_for(tmp_path, hugging_face):
    hf_folder = hugging_face(tiny.GEMMA3)
    cast = import_model(hf_folder, tmp_path / "half", dtype=jnp.bfloat16)
    assert {str(leaf.dtype) for leaf in cast.leaves.values()} == {"bfloat16"}
    for key, array in weights.weights(tiny.GEMMA3).items():
        np.testing.assert_array_equal(cast.leaves[key].read(), array.astype(jnp.bfloat16))
    export_model(tmp_path / "ours", tmp_path / "out", dtype="bfloat16")
    assert bits(open_foreign(tmp_path / "out")) == bits(cast)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_dtypes_that_differ_stay(tmp_path, hugging_face):
    hf_folder = hugging_face(tiny.GEMMA3)
    tensors = stored(hf_folder)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(jnp.bfloat16)
    rewrite(hf_folder, tensors)
    back = import_model(hf_folder, tmp_path / "back")
    assert str(back.leaves["final_norm.scale", None].dtype) == "bfloat16"
    assert str(back.leaves["embedder.table", None].dtype) == "float32"
    export_model(tmp_path / "back", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "float32"
    assert stored(tmp_path / "again")["model.norm.weight"].dtype == jnp.bfloat16


def test_what_transformers_computes_otherwise_is_noted(tmp_path):
    assert export_model(save(tmp_path / "a", tiny.GEMMA3), tmp_path / "b") == []
    [notes] = export_model(save(tmp_path / "c", tiny.T5GEMMA), tmp_path / "d")
    assert notes.startswith("inputs longer than 3 tokens: the encoder's window was trained with 2 tokens on each side")
    narrow = dataclasses.replace(tiny.GEMMA3_IMAGES, window=2)
    [notes] = export_model(save(tmp_path / "e", narrow), tmp_path / "f")
    assert notes.startswith("an image of 4 tokens, which is bounded by the window of 2 here")
