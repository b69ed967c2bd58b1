"""Import: folders of every kind are opened, or refused with a reason; nothing is left half written."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from t5g2.checkpoint import folder, safetensors_io, source_folder
from t5g2.checkpoint.export_folder import export_model
from t5g2.checkpoint.folder import open_model
from t5g2.checkpoint.import_folder import import_model, open_any, open_foreign
from t5g2.core.errors import UserError
from t5g2.models.position_embeddings import resample_positions
from tests import tiny, weights
from tests.checkpoint.foreign_folders import (
    FAMILIES,
    bits,
    nested,
    reconfigure,
    save,
    save_flax,
)


def test_what_was_imported_is_noted(tmp_path, hugging_face):
    back = import_model(hugging_face(tiny.GEMMA3), tmp_path / "back")
    assert back.provenance == {
        "kind": "import",
        "source": str(tmp_path / "theirs"),
        "layout": "Hugging Face Gemma",
        "tensors": 41,
        "parameters": sum(array.size for array in weights.weights(tiny.GEMMA3).values()),
        "notes": [],
    }


def test_any_folder_opens(tmp_path, hugging_face):
    hf_folder = hugging_face(tiny.T5GEMMA2)
    assert bits(open_any(hf_folder)) == bits(open_any(tmp_path / "ours")) == bits(open_model(tmp_path / "ours"))
    model = folder.load_model(open_any(hf_folder))
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(weights.model(tiny.T5GEMMA2)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_config_is_given(tmp_path, hugging_face):
    hf_folder = hugging_face(tiny.GEMMA3)
    (hf_folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has safetensors but no config.json, so its architecture is unknown; put the"):
        open_foreign(hf_folder)
    assert bits(open_foreign(hf_folder, tiny.GEMMA3)) == bits(open_foreign(hf_folder, tmp_path / "ours" / "model.json"))
    with pytest.raises(UserError, match=r"according to the chosen config, are not those of Hugging Face Gemma"):
        open_foreign(hf_folder, "gemma3:270m")
    with pytest.raises(UserError, match=r"unknown size 'gemma3:270'; did you mean 'gemma3:270m'"):
        open_foreign(hf_folder, "gemma3:270")
    with pytest.raises(
        UserError, match=r"nowhere.json does not exist; give a size's name, such as gemma3:1b, or a file"
    ):
        open_foreign(hf_folder, tmp_path / "nowhere.json")


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(
        UserError,
        match=r"nowhere does not exist; give a Hugging Face folder, .* a GGUF file, or a model of the hub: hf://OWNER/NAME",
    ):
        open_any(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no known model: neither config.json and safetensors"):
        open_any(tmp_path)
    (tmp_path / "experiment.json").write_text("{}")
    with pytest.raises(UserError, match=rf"is the workdir of a run: .* Its model folder is {tmp_path / 'model'}"):
        open_any(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_none(hugging_face, text):
    hf_folder = hugging_face(tiny.GEMMA3)
    (hf_folder / "config.json").write_text(text, "latin1")
    with pytest.raises(UserError, match=r"config.json (is not JSON|holds list, not an object).*download it again"):
        open_foreign(hf_folder)


def test_a_path_in_the_users_home(tmp_path, hugging_face, monkeypatch):
    model = import_model(hugging_face(tiny.GEMMA3), tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_any("~/model").path == model.path
    assert source_folder.exists("~/model")
    assert not source_folder.exists("~/nowhere")
    with pytest.raises(UserError, match="~/model is a model folder already"):
        import_model("~/model", tmp_path / "again")


def test_nothing_is_overwritten_and_nothing_half_is_left(tmp_path, hugging_face, monkeypatch):
    hf_folder = hugging_face(tiny.GEMMA3)
    for write in (import_model, export_model):
        with pytest.raises(UserError, match="exists already and is not overwritten"):
            write(hf_folder if write is import_model else tmp_path / "ours", hf_folder)
    with pytest.raises(UserError, match=r"ours is a model folder already: it has a model.json. Use it as it is"):
        import_model(tmp_path / "ours", tmp_path / "out")
    before = sorted(os.listdir(tmp_path))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_io, "_blocks", interrupted)  # with a file half written
    for write, source in [(import_model, hf_folder), (export_model, tmp_path / "ours")]:
        with pytest.raises(KeyboardInterrupt):
            write(source, tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == before


def test_one_tensor_is_read_once_and_held_one_at_a_time(tmp_path, hugging_face, monkeypatch):
    """Also where one holds several leaves, as the packed queries, keys and values of SigLIP's pooling do."""
    hf_folder = hugging_face(tiny.SIGLIP)
    reads = []
    lazy = safetensors_io.read(hf_folder)
    counted = {
        name: dataclasses.replace(tensor, read=lambda n=name, t=tensor: (reads.append(n), t.read())[1])
        for name, tensor in lazy.items()
    }
    monkeypatch.setattr(safetensors_io, "read", lambda *_, **__: counted)
    opened = open_foreign(hf_folder)
    assert reads == []
    for leaf in opened.leaves.values():
        leaf.read()
    assert sorted(reads) == sorted(lazy)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma3 with images", "t5gemma"])
def test_official_trees(tmp_path, family):
    config = FAMILIES[family]
    (tmp_path / "kaggle").mkdir()
    save_flax(tmp_path / "kaggle" / "tiny", nested(config))
    (tmp_path / "kaggle" / "tokenizer.model").write_bytes(b"pieces")
    back = import_model(tmp_path / "kaggle", tmp_path / "back", config=config)
    assert bits(back) == bits(open_model(save(tmp_path / "ours", config)))
    assert back.tokenizer["kind"] == "sentencepiece"
    assert back.provenance["layout"].startswith("official Flax")


def test_queries_keys_and_values_in_one_tensor(tmp_path):
    """So they are where there are as many key/value heads as query heads, but for cross-attention."""
    side = dataclasses.replace(tiny.GEMMA2, kv_heads=4)
    config = dataclasses.replace(tiny.T5GEMMA, encoder=dataclasses.replace(side, width=24), decoder=side)
    tensors = nested(config)
    for name in [name for name in tensors if name.endswith("/attn/q_einsum/w")]:
        stem = name.removesuffix("q_einsum/w")
        together = [tensors.pop(name)[None], tensors.pop(f"{stem}kv_einsum/w")]
        tensors[f"{stem}qkv_einsum/w"] = np.concatenate(together)
    back = open_foreign(save_flax(tmp_path / "tree", tensors), config)
    assert bits(back) == bits(open_model(save(tmp_path / "ours", config)))


def test_rows_for_the_hardware_are_cut(tmp_path):
    """256128 rows of 256000 that count."""
    config = dataclasses.replace(tiny.GEMMA2, vocab_size=256_000, width=8, heads=2, layers=1, mlp_width=4)
    tensors = nested(config)
    table = tensors["embedder/input_embedding"]
    tensors["embedder/input_embedding"] = np.concatenate([table, np.full((128, 8), 7, np.float32)])
    opened = open_foreign(save_flax(tmp_path / "tree", tensors), config)
    np.testing.assert_array_equal(opened.leaves["embedder.table", None].read(), table)
    assert opened.provenance["notes"] == [
        "embedder/input_embedding has 256128 rows, of which the first 256000 are the vocabulary; the others were cut"
    ]
    tensors["embedder/input_embedding"] = table  # as others have cut it before
    assert open_foreign(save_flax(tmp_path / "cut", tensors), config).provenance["notes"] == []


def test_a_file_that_was_cut_short(tmp_path, hugging_face):
    hf_folder = hugging_face(tiny.GEMMA3)
    opened = open_foreign(hf_folder)
    os.truncate(hf_folder / "model.safetensors", (hf_folder / "model.safetensors").stat().st_size - 8)
    with pytest.raises(UserError, match="was cut short while it was in use"):
        [leaf.read() for leaf in opened.leaves.values()]


def test_an_architecture_of_another_kind_is_an_error(tmp_path):
    """Of an official tree, which does not say its own."""
    save_flax(tmp_path / "flax", nested(tiny.GEMMA3_IMAGES))
    others = [tiny.T5GEMMA2, tiny.SIGLIP, dataclasses.replace(tiny.GEMMA3_IMAGES, tied_head=False)]
    for config in others:
        with pytest.raises(UserError, match=r"official Flax Gemma has no tensor for \d+ weights of this architecture"):
            open_foreign(tmp_path / "flax", config)


def test_a_config_that_overrules_the_folders_own_is_noted(hugging_face):
    given = dataclasses.replace(tiny.GEMMA3, window=100)
    notes = open_foreign(hugging_face(tiny.GEMMA3), given).provenance["notes"]
    assert notes == ["the chosen config overrules config.json: changed  window: 4 -> 100"]


def test_pickles_alone_and_files_are_errors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"?")
    with pytest.raises(UserError, match=r"only as pickles \(pytorch_model.bin\), which can run code"):
        open_any(tmp_path)
    with pytest.raises(UserError, match=r"pytorch_model.bin is a file; give the folder that it is in"):
        open_any(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("config", [tiny.GEMMA3_IMAGES, tiny.T5GEMMA2_IMAGES, tiny.SIGLIP])
def test_images_of_another_size(tmp_path, hugging_face, config):
    """Only the position embeddings change, and they are those of the function."""
    source = hugging_face(config)
    opened = open_foreign(source)
    imported = import_model(source, tmp_path / "larger", image_size=32)
    for key, leaf in imported.leaves.items():
        if key == ("vision.positions", None):
            expected = resample_positions(opened.leaves[key].read(), 8)
            np.testing.assert_array_equal(leaf.read(), expected)
        else:
            np.testing.assert_array_equal(leaf.read(), opened.leaves[key].read())
    with pytest.raises(UserError, match="image_size = 30 is not a multiple of the tower's patch_size, 4"):
        import_model(source, tmp_path / "odd", image_size=30)
    assert not (tmp_path / "odd").exists()


def test_images_of_another_size_need_a_tower(tmp_path, hugging_face):
    with pytest.raises(UserError, match=r"image_size = 32, and .* has no image tower"):
        import_model(hugging_face(tiny.GEMMA3), tmp_path / "out", image_size=32)


@pytest.mark.parametrize("field", ["tie_word_embeddings"])
def test_true_and_false_are_no_texts(hugging_face, field):
    folder = hugging_face(tiny.GEMMA3)
    reconfigure(folder, **{field: "false"})
    with pytest.raises(UserError, match=rf"{field} = 'false'; .*true or false"):
        open_foreign(folder)


def test_an_unknown_dtype_is_an_error(tmp_path, hugging_face):
    source = hugging_face(tiny.GEMMA3)
    for use in (import_model, export_model):
        with pytest.raises(UserError, match="unknown dtype 'bfloat' of weights; did you mean 'bfloat16'"):
            use(source, tmp_path / "out", dtype="bfloat")
