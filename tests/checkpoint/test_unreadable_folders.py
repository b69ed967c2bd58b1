"""Folders as users come by them that hold no model to read: each is recognised and told what to do."""

import json
import re

import pytest

from t5g2.checkpoint.import_folder import open_any, open_tower
from t5g2.core.errors import UserError
from tests import hub_cache, tiny

ADDRESS = f"hf://owner/tiny@{hub_cache.COMMIT}"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 536223056\n"


def refused(folder, message):
    with pytest.raises(UserError, match=message):
        open_any(folder)
    with pytest.raises(UserError, match=message):
        open_tower(folder)


def test_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"?")
    refused(tmp_path, r"is an adapter \(peft\), changes to .*; merge the two and give the result: .*merge_and_unload")


def test_an_adapter_beside_the_weights_is_no_part_of_them(hugging_face):
    hf_folder = hugging_face(tiny.GEMMA3)
    (hf_folder / "adapter_config.json").write_text("{}")
    assert "the adapter (peft) in the folder was left out: these" in str(open_any(hf_folder).provenance["notes"])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"])
def test_a_pointer_of_git_lfs(hugging_face, name):
    hf_folder = hugging_face(tiny.GEMMA3)
    (hf_folder / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS, without the content; run `git lfs pull` in"):
        open_any(hf_folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_whose_file_is_gone(hugging_face, name):
    hf_folder = hugging_face(tiny.GEMMA3)
    (hf_folder / name).unlink(missing_ok=True)
    (hf_folder / name).symlink_to("../../blobs/abc")
    with pytest.raises(UserError, match=rf"{name} is a link to ../../blobs/abc, which does not exist; download the"):
        open_any(hf_folder)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "chat_template.jinja"])
def test_a_copied_file_that_is_a_link_out_of_the_folder(hugging_face, tmp_path, name):
    """The file of an untrusted folder could be any file of this machine."""
    hf_folder = hugging_face(tiny.GEMMA3)
    (tmp_path / "secret").write_text("{}")
    (hf_folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(
        UserError, match=rf"{name} is a link to {tmp_path}/secret, outside of the folder, and is copied"
    ):
        open_any(hf_folder)
    (hf_folder / name).unlink()
    (hf_folder / "real.json").write_text("{}")
    (hf_folder / name).symlink_to("real.json")
    assert hf_folder / name in open_any(hf_folder).extra_files
    # the layout of the hub's cache
    cache = tmp_path / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    snapshot = hf_folder.rename(cache / "snapshots" / "abc")
    (snapshot / name).unlink()
    (cache / "blobs" / "0a1b").write_text("{}")
    (snapshot / name).symlink_to("../../blobs/0a1b")
    assert snapshot / name in open_any(snapshot).extra_files
    (tmp_path / "link").symlink_to(snapshot)
    assert tmp_path / "link" / name in open_any(tmp_path / "link").extra_files


def test_a_link_to_a_folder_that_is_gone(tmp_path):
    (tmp_path / "model").symlink_to(tmp_path / "gone")
    refused(tmp_path / "model", rf"is a link to {tmp_path}/gone, which does not exist; give another folder")


def test_the_cache_of_the_hub(hugging_face, tmp_path):
    model = tmp_path / "hub" / "models--google--gemma-3-270m"
    (model / "snapshots").mkdir(parents=True)
    refused(model, "none has been downloaded, so download the model again")
    (model / "snapshots" / "aaa").mkdir()
    hugging_face(tiny.GEMMA3).rename(model / "snapshots" / "bbb")
    (model / "refs").mkdir()
    refused(model, "is a model's folder in the hub's cache, .*; give .*/snapshots/aaa$")
    (model / "refs" / "main").write_text("bbb\n")
    refused(model, "each version has a folder of its own; give .*/snapshots/bbb$")
    refused(tmp_path / "hub", "is the hub's cache, with models--google--gemma-3-270m; give the folder MODEL/snapshots/")
    open_any(model / "snapshots" / "bbb")


@pytest.mark.parametrize("name", ["open_clip_config.json", "open_clip_model.safetensors"])
def test_open_clip(tmp_path, name):
    (tmp_path / name).write_text("{}")
    refused(tmp_path, "is a folder of open_clip, whose tensors have other names; give the same model as transformers")


def test_an_id_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("google/gemma-3-270m", "is a model of Hugging Face's hub, give hf://google/gemma-3-270m, and it is")
    (tmp_path / "google").mkdir()
    refused("google/gemma-3-270m", r"google/gemma-3-270m does not exist; give a Hugging Face folder")
    refused("../a/b", r"does not exist; give a Hugging Face folder")


def test_a_folder_in_the_home_of_the_user(hugging_face, monkeypatch):
    hf_folder = hugging_face(tiny.GEMMA3)
    monkeypatch.setenv("HOME", str(hf_folder.parent))
    assert open_any(f"~/{hf_folder.name}").path == hf_folder
    refused("~/none", re.escape(f"{hf_folder.parent}/none does not exist; give a Hugging Face folder"))


def test_an_adapter_beside_the_whole_model_is_no_harm(hugging_face):
    hf_folder = hugging_face(tiny.GEMMA3)
    (hf_folder / "adapter_config.json").write_text(json.dumps({}))
    (hf_folder / "model.gguf").write_bytes(b"GGUF")
    open_any(hf_folder)


@pytest.mark.parametrize(
    "address", ["https://huggingface.co/google/gemma-3-4b-pt", "http://hf.co/google/gemma-3-4b-pt/tree/main"]
)
def test_an_address_of_the_hub(address):
    refused(address, r"is a page of Hugging Face's hub; .*, give hf://google/gemma-3-4b-pt$")


def test_the_folder_of_all_snapshots(tmp_path):
    snapshots = tmp_path / "models--google--gemma" / "snapshots"
    (snapshots / "abc").mkdir(parents=True)
    refused(snapshots, rf"each version has a folder of its own; give {snapshots}/abc")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("README.md", "holds no known model"),
        ("pytorch_model.bin", "holds its weights only as pickles"),
        ("adapter_config.json", "is an adapter"),
        ("open_clip_config.json", "is a folder of open_clip"),
        ("experiment.json", f"is the workdir of a run: .* Its model folder is {ADDRESS}/model"),
    ],
)
def test_a_folder_of_the_hub_is_named_by_its_address(tmp_path, name, message):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / name).write_text("{}")
    refused(hub_cache.add(tmp_path / "hub", "owner/tiny", tmp_path / "files"), f"^{ADDRESS} {message}")


@pytest.mark.parametrize(
    ("name", "message"),
    [("config.json", "has safetensors but no config.json"), ("model.safetensors", "holds no weights: neither ")],
)
def test_a_folder_of_the_hub_that_lacks_a_file_is_named_by_its_address(hugging_face, tmp_path, name, message):
    folder = hugging_face(tiny.GEMMA3)
    (folder / name).unlink()
    refused(hub_cache.add(tmp_path / "hub", "owner/tiny", folder), f"^{ADDRESS} {message}")


def test_a_folder_of_the_hub_without_a_tower_is_named_by_its_address(hugging_face, tmp_path):
    folder = hub_cache.add(tmp_path / "hub", "owner/tiny", hugging_face(tiny.GEMMA3))
    with pytest.raises(UserError, match=f"^{ADDRESS} is a language model without an image tower"):
        open_tower(folder)
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text('{"model_type": "siglip_vision_model", "hidden_act": "relu"}')
    with pytest.raises(UserError, match=rf"^hf://owner/tower@{hub_cache.COMMIT}: .*relu"):
        open_tower(hub_cache.add(tmp_path / "hub", "owner/tower", tmp_path / "tower"))
    (tmp_path / "tower" / "config.json").write_text('{"model_type": "siglip_vision_model"}')
    with pytest.raises(UserError, match=rf"^hf://owner/weightless@{hub_cache.COMMIT} holds no weights"):
        open_tower(hub_cache.add(tmp_path / "hub", "owner/weightless", tmp_path / "tower"))
