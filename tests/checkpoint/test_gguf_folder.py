"""The folders of the cache that stand for GGUF files."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from t5g2.checkpoint import gguf_folder, gguf_state
from t5g2.checkpoint.import_folder import open_any, open_foreign, read_tokenizer
from t5g2.core.errors import UserError
from tests.checkpoint.gguf_files import arrays, write


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(path, message):
    with pytest.raises(UserError, match=message):
        open_any(path)


@pytest.mark.parametrize("name", ["MODEL.GGUF", "sha256-0a1b", "model"])
def test_files_of_other_names(tmp_path, name):
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / name, "Q8_0")
    assert open_any(tmp_path / "files" / name).provenance["source"] == str(tmp_path / "files" / name)
    (tmp_path / "text").write_text("GGU")
    refused(tmp_path / "text", "is a file; give the folder that it is in")


def test_a_folder_with_one_file(tmp_path):
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "A.GGUF", "Q8_0")
    assert open_any(tmp_path / "files").provenance["source"] == str(tmp_path / "files" / "A.GGUF")
    shutil.copy(tmp_path / "files" / "A.GGUF", tmp_path / "files" / "b.gguf")
    refused(tmp_path / "files", r"holds 2 GGUF files \(A\.GGUF, b\.gguf\); give one of them")


def test_what_counts_as_a_file_of_a_folder(tmp_path):
    """No folder of that name, no hidden file, and no link to nothing."""
    folder = tmp_path / "files"
    (folder / "x.gguf").mkdir(parents=True)
    (folder / "._model.gguf").write_bytes(b"\0\5\x16\7")
    (folder / "y.gguf").symlink_to(folder / "none")
    assert gguf_folder.file_of(folder) is None
    write(folder / "model.gguf", "Q8_0")
    assert gguf_folder.file_of(folder) == folder / "model.gguf"
    for name in "bcd":
        shutil.copy(folder / "model.gguf", folder / f"{name}.gguf")
    refused(folder, r"holds 4 GGUF files \(b\.gguf, c\.gguf, d\.gguf, model\.gguf\); give one of them")
    shutil.copy(folder / "model.gguf", folder / "e.gguf")
    refused(folder, r"holds 5 GGUF files \(b\.gguf, c\.gguf, d\.gguf, e\.gguf, …\); give one of them")


def test_a_folder_that_may_be_another_model(tmp_path):
    (tmp_path / "files").mkdir()
    file = tmp_path / "files" / "model.gguf"
    write(file, "Q8_0")
    (tmp_path / "files" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused(tmp_path / "files", rf"holds model\.gguf, .*, and a config\.json, .*; give the file itself: {file}$")
    assert open_any(file).config.layers == 2
    # other weights are what the folder is
    for name in ("model.safetensors", "_METADATA"):
        (tmp_path / "files" / name).write_text("{}")
        assert gguf_folder.folder_of(tmp_path / "files") == tmp_path / "files"
        (tmp_path / "files" / name).unlink()


def test_a_file_that_is_gone(tmp_path):
    write(tmp_path / "model.gguf", "Q8_0")
    folder = open_any(tmp_path / "model.gguf").path
    (tmp_path / "model.gguf").unlink()
    refused(folder, r"model\.gguf is gone or has changed since")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gemma3_text"


def test_a_file_that_is_written_again(tmp_path, cache):
    """In as many bytes: its folder is another one."""
    file = tmp_path / "model.gguf"
    write(file)
    first = open_any(file)
    before = file.stat()
    changed = arrays() | {"token_embd": arrays()["token_embd"] + 1}
    write(file, tensors=changed)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    refused(first.path, r"model\.gguf is gone or has changed since")
    second = open_any(file)
    np.testing.assert_array_equal(second.leaves["embedder.table", None].read(), changed["token_embd"])
    assert {path.parent for path in cache.rglob("gguf.json")} == {first.path, second.path}


@pytest.mark.parametrize("how", ["renamed", "overwritten", "removed"])
def test_a_file_that_changes_while_its_weights_are_read(tmp_path, how):
    """Weights of two models are no model: nothing of the new file is read as the old one's, of the same size and time.

    As files of an archive are, all of one time.
    """
    file, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    write(file)
    write(other, tensors=arrays() | {"token_embd": arrays()["token_embd"] + 1})
    for path in (file, other):
        os.utime(path, (1, 1))
    assert file.stat().st_size == other.stat().st_size
    leaf = open_any(file).leaves["embedder.table", None]
    np.testing.assert_array_equal(leaf.read(), arrays()["token_embd"])
    if how == "renamed":
        other.rename(file)
    elif how == "overwritten":
        file.write_bytes(other.read_bytes())
        os.utime(file, (1, 1))
    else:
        file.unlink()
    with pytest.raises(UserError, match=r"model\.gguf is gone or has changed since it was opened; give the file again"):
        leaf.read()


@pytest.mark.parametrize("how", ["rights", "link", "number"])
def test_a_file_that_stays_the_same_while_its_weights_are_read(tmp_path, monkeypatch, how):
    """Its rights change, a backup links it, or a network mount numbers it anew: it is looked at once more."""
    file = tmp_path / "model.gguf"
    write(file)
    leaf = open_any(file).leaves["embedder.table", None]
    before = file.stat()
    if how == "rights":
        file.chmod(0o444)
    elif how == "link":
        (tmp_path / "backup.gguf").hardlink_to(file)
    else:
        shutil.copy2(file, tmp_path / "copy.gguf")
        (tmp_path / "copy.gguf").rename(file)
    assert gguf_state.identity(file.stat()) != gguf_state.identity(before)
    looks, real = [], gguf_state._content
    monkeypatch.setattr(gguf_state, "_content", lambda *args: looks.append(args) or real(*args))
    for _ in range(2):
        np.testing.assert_array_equal(leaf.read(), arrays()["token_embd"])
    assert len(looks) == 1


@pytest.mark.parametrize("read", [open_any, read_tokenizer])
def test_a_folder_that_goes_while_it_is_opened(tmp_path, monkeypatch, read):
    """As where somebody empties the cache."""
    write(tmp_path / "model.gguf", "Q8_0")

    def folder_of(path):
        folder = real(path)
        shutil.rmtree(folder)
        return folder

    real = gguf_folder.folder_of
    monkeypatch.setattr(gguf_folder, "folder_of", folder_of)
    with pytest.raises(UserError, match=r"model\.gguf, was removed from the cache meanwhile; give the file again"):
        read(tmp_path / "model.gguf")


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    write(tmp_path / "model.gguf", "Q8_0")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        monkeypatch.setenv("T5G2_CACHE", str(folder))
        refused(
            tmp_path / "model.gguf", r"cannot be made: .*; give another path\. .*: set T5G2_CACHE to one that can be"
        )


def test_without_the_library(tmp_path, monkeypatch):
    write(tmp_path / "model.gguf", "Q8_0")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    refused(tmp_path / "model.gguf", r"gguf is not installed; run `pip install 't5g2\[gguf\]'`")


def test_a_chosen_config_overrules_the_metadata(tmp_path):
    write(tmp_path / "model.gguf", "Q8_0")
    config = replace(open_any(tmp_path / "model.gguf").config, window=8)
    notes = open_foreign(tmp_path / "model.gguf", config).notes
    assert any(note.startswith("the chosen config overrules the metadata: ") for note in notes)


def test_two_links_to_one_file(tmp_path, cache):
    """As commits at the hub have them: the folder serves both, and stays when one of them goes."""
    (tmp_path / "blob").mkdir()
    write(tmp_path / "blob" / "0a1b", "Q8_0")
    for name in ("first.gguf", "second.gguf"):
        (tmp_path / name).symlink_to(tmp_path / "blob" / "0a1b")
    first = open_any(tmp_path / "first.gguf")
    (tmp_path / "first.gguf").unlink()
    second = open_any(tmp_path / "second.gguf")
    assert (second.path, second.origin) == (first.path, str(tmp_path / "second.gguf"))
    assert len(list(cache.rglob("gguf.json"))) == 1
