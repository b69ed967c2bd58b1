"""Folders that the cache keeps of GGUF files: whole or made anew, of the content that is there, not for ever."""

import contextlib
import json
import os
import shutil
import time

import pytest

from t5g2.checkpoint import gguf_file, gguf_folder, gguf_state
from t5g2.checkpoint.import_folder import open_any
from t5g2.core import files
from t5g2.core.errors import UserError
from tests.checkpoint.gguf_files import PIECES, arrays, write

LONG_AGO = (time.time() - gguf_folder.UNUSED_SECS - 60,) * 2
WEEKS_AGO = (time.time() - gguf_folder.UNUSED_SECS + 24 * 3600,) * 2
A_DAY_AGO = (time.time() - files.ABANDONED_SECS - 60,) * 2
CHAT_TEMPLATE = {"tokenizer.chat_template": "{{ messages }}"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "model.gguf", "Q8_0", fields=CHAT_TEMPLATE)
    return tmp_path / "model.gguf"


def opened(file, at):
    """The folder of a file as it is at a time."""
    os.utime(file, (at, at))
    return gguf_folder.folder_of(file)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def unused(folder):
    os.utime(folder / "gguf.json", LONG_AGO)
    return folder


NAMES = ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "gguf.json"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_one_of_its_files_is_made_anew(file, name):
    folder = gguf_folder.folder_of(file)
    whole = contents(folder)
    assert set(whole) == set(NAMES)
    (folder / name).unlink()
    assert contents(gguf_folder.folder_of(file)) == whole
    # cut short, as on a full disk
    (folder / name).write_bytes(whole[name][:10])
    assert contents(gguf_folder.folder_of(file)) == whole
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"file": 3}', '{"checksum": "0a1b", "file": 3}'])
def test_a_damaged_index_is_made_anew(file, text):
    folder = gguf_folder.folder_of(file)
    whole = contents(folder)
    (folder / "gguf.json").write_text(text)
    with pytest.raises(UserError, match=r"gguf\.json .*; remove .*, and give the GGUF file again"):
        open_any(folder)
    assert contents(gguf_folder.folder_of(file)) == whole


@pytest.mark.parametrize("text", ["", '{"tensors": 3}'])
def test_an_index_in_a_folder_that_is_not_the_caches(tmp_path, text):
    """Nobody is told to remove a folder with files of theirs."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "gguf.json").write_text(text)
    with pytest.raises(UserError, match=r"mine/gguf\.json .*; move gguf\.json out of the folder$"):
        open_any(tmp_path / "mine")


def test_an_index_of_another_content_is_made_anew(file):
    first, second = opened(file, 1), opened(file, 2)
    whole = contents(second)
    shutil.copy(first / "gguf.json", second / "gguf.json")
    assert contents(opened(file, 2)) == whole


def test_a_cache_that_nobody_may_write(file, monkeypatch):
    folder = gguf_folder.folder_of(file)

    def refuse(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(gguf_file, "describe", None)
    assert gguf_folder.folder_of(file) == folder
    assert gguf_folder.source_of(folder).file == file


def test_a_file_that_changes_while_it_is_described(file, cache, monkeypatch):
    """Nothing is kept of it: the folder would be named after one content and hold another."""
    real = gguf_file.describe

    def describe(path):
        os.utime(path, (7, 7))
        return real(path)

    monkeypatch.setattr(gguf_file, "describe", describe)
    with pytest.raises(UserError, match=r"model\.gguf has changed while it was read; give the file again when it is"):
        opened(file, 5)
    monkeypatch.setattr(gguf_file, "describe", lambda path: path.unlink())
    with pytest.raises(UserError, match=r"model\.gguf is gone; give the file again"):
        opened(file, 5)
    assert not list(cache.rglob("*.json"))


def test_a_file_that_changes_while_it_is_looked_at(file, monkeypatch):
    real = gguf_state.hashlib.sha256

    def sha256(data):
        os.utime(file, (7, 7))
        return real(data)

    monkeypatch.setattr(gguf_state.hashlib, "sha256", sha256)
    with pytest.raises(UserError, match=r"model\.gguf changes while it is read; give the file again"):
        gguf_state.read(file)


def test_another_file_of_the_same_size_and_time(file, tmp_path):
    """As of an archive whose files all have one time: its own tokenizer is read, and its own places."""
    other = [piece.replace("cat", "tac") for piece in PIECES]
    write(tmp_path / "other.gguf", "Q8_0", fields=CHAT_TEMPLATE | {"tokenizer.ggml.tokens": other})
    assert (tmp_path / "other.gguf").stat().st_size == file.stat().st_size
    first = opened(file, 1)
    os.utime(tmp_path / "other.gguf", (1, 1))
    (tmp_path / "other.gguf").rename(file)
    second = gguf_folder.folder_of(file)
    assert "tac" in json.loads((second / "tokenizer.json").read_text())["model"]["vocab"]
    with pytest.raises(UserError, match=r"model\.gguf is gone or has changed since"):
        gguf_folder.source_of(first)


def test_other_weights_behind_the_same_head(tmp_path, monkeypatch):
    """A fine-tuned model is another content, although only the pieces behind the head tell."""
    monkeypatch.setattr(gguf_state, "HEAD_BYTES", 4 << 10)
    states = []
    for name, tensors in {"a": arrays(), "b": {name: value + 1 for name, value in arrays().items()}}.items():
        write(tmp_path / name, tensors=tensors)
        os.utime(tmp_path / name, (1, 1))
        states.append(gguf_state.read(tmp_path / name))
    heads = [(tmp_path / name).read_bytes()[: 4 << 10] for name in "ab"]
    assert heads[0] == heads[1]
    (first, second) = (state.content for state in states)
    assert (first.size, first.mtime_ns) == (second.size, second.mtime_ns)
    assert first.digest != second.digest
    shutil.copy2(tmp_path / "a", tmp_path / "copy")
    again = gguf_state.read(tmp_path / "copy")
    assert again.content == first
    assert not again.identities & states[0].identities


def test_folders_that_nobody_uses(file, tmp_path, cache):
    """Of what a file was go when it is read as something else; those that are used, and of other files, stay."""
    shutil.copy(file, tmp_path / "other.gguf")
    folders = [gguf_folder.folder_of(tmp_path / "other.gguf"), *(opened(file, at) for at in (1, 2, 3, 4))]
    for folder in folders:
        unused(folder)
    # of two machines that share the cache, each with the file, this one opens it again
    assert opened(file, 2) == folders[2]
    # one that has lost its index
    (folders[3] / "gguf.json").unlink()
    os.utime(folders[3], LONG_AGO)
    # of a run that goes on for weeks, and needs the tokenizer at its end
    os.utime(folders[4] / "gguf.json", WEEKS_AGO)
    new = opened(file, 5)
    assert {path.parent for path in cache.rglob("config.json")} == {folders[0], folders[2], folders[4], new}


def test_folders_of_files_that_are_gone(file, tmp_path, cache):
    """Go when nobody has used them for long, whatever is left of them."""
    names = ["old", "old, without an index", "old, with a damaged one", "of a run that goes on for weeks"]
    folders = []
    for name in names:
        shutil.copy(file, tmp_path / f"{name}.gguf")
        folders.append(gguf_folder.folder_of(tmp_path / f"{name}.gguf"))
        (tmp_path / f"{name}.gguf").unlink()
    (folders[1] / "gguf.json").unlink()
    os.utime(folders[1], LONG_AGO)
    (folders[2] / "gguf.json").write_text("{}")
    for folder in (folders[0], folders[2]):
        unused(folder)
    os.utime(folders[3] / "gguf.json", WEEKS_AGO)
    new = gguf_folder.folder_of(file)
    assert {path.parent for path in cache.rglob("config.json")} == {folders[3], new}
    left = {folder.parent.with_suffix(suffix) for folder in (folders[3], new) for suffix in ("", ".lock")}
    assert set((cache / "gguf").iterdir()) == left


def test_a_folder_that_another_process_fills_is_not_removed(file, tmp_path):
    """The file is back: what makes its folder has the lock, which would be no lock if it were removed."""
    of_gone = gguf_folder._kept() / "0a1b"
    of_gone.mkdir(parents=True)
    with files.locked(of_gone.with_suffix(".lock")):
        gguf_folder.folder_of(file)
        assert of_gone.exists()
        assert of_gone.with_suffix(".lock").exists()
    os.utime(file, (2, 2))
    gguf_folder.folder_of(file)
    assert not of_gone.exists()
    assert not of_gone.with_suffix(".lock").exists()


def test_a_lock_that_is_removed_while_a_process_waits_for_it(file, monkeypatch):
    """The process locks the one that others see."""
    locked, describe, removed = files.locked, gguf_file.describe, []

    @contextlib.contextmanager
    def removing(path, **options):
        with locked(path, **options) as handle:
            if path.suffix == ".lock" and not removed:
                removed.append(path)
                path.unlink()
            yield handle

    def in_lock(path):
        with pytest.raises(UserError, match="busy"), locked(removed[0], busy="busy"):
            pass
        return describe(path)

    monkeypatch.setattr(files, "locked", removing)
    monkeypatch.setattr(gguf_file, "describe", in_lock)
    assert (gguf_folder.folder_of(file) / "gguf.json").is_file()
    assert removed


class Killed(BaseException):
    pass


def test_a_removal_that_is_cut_short(file, monkeypatch):
    """Leaves nothing under the name of a folder, and what it leaves goes later."""
    old = unused(opened(file, 1))
    real = shutil.rmtree

    def rmtree(path, **options):
        if path.exists():
            (path / "tokenizer.json").unlink()
            raise Killed

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(Killed):
        opened(file, 2)
    monkeypatch.setattr(shutil, "rmtree", real)
    assert not old.exists()
    (left,) = old.parent.glob(".*")
    assert files.TEMPORARY.search(left.name)
    unused(left)
    assert "tokenizer.json" in contents(opened(file, 1))
    assert not left.exists()


def test_a_folder_that_is_used_while_it_is_removed_is_put_back(file, monkeypatch):
    """Another process has marked it between the look at its time and the rename."""
    old = unused(opened(file, 1))
    whole = contents(old)
    real = gguf_folder._put_aside

    def put_aside(folder):
        os.utime(folder / "gguf.json")
        return real(folder)

    monkeypatch.setattr(gguf_folder, "_put_aside", put_aside)
    new = opened(file, 2)
    assert contents(old) == whole
    assert set(old.parent.iterdir()) == {old, new}


def test_what_writers_have_left(file, tmp_path):
    """Goes by the same rule, of this file and of others; what a living process writes stays, however old it is."""
    shutil.copy(file, tmp_path / "other.gguf")
    folder, other = opened(file, 1), gguf_folder.folder_of(tmp_path / "other.gguf")
    left = {}
    for name, beside in {"old": folder, "of another file": other, "new": other, "written": folder}.items():
        left[name] = files.temporary(beside, files.PART_OF_FOLDER)
        left[name].mkdir()
        (left[name] / "config.json").write_text("{}")
        if name != "new":
            os.utime(left[name], A_DAY_AGO)
    with files.locked(left["written"]):
        opened(file, 2)
    assert [name for name, path in left.items() if path.exists()] == ["new", "written"]
    assert (left["written"] / "config.json").exists()
