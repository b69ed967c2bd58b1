"""Files and folders are complete or absent: several writers, a failure, a kill; locks; the folder of caches."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from t5g2 import cli
from t5g2.core import files
from t5g2.core.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_and_fail(path, text):
    path.write_text(text)
    raise KeyError(text)


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    target = tmp_path / "new" / "file"
    with files.replacing(target) as one, files.replacing(target) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    # the last one to end is the file: blocks end from the inside
    assert target.read_text() == "one"
    assert names(target.parent) == ["file"]


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    files.write_text(target, "old")
    with pytest.raises(KeyError, match="new"), files.replacing(target) as part:
        write_and_fail(part, "new")
    assert target.read_text() == "old"
    with pytest.raises(UnicodeEncodeError):
        files.write_text(target, "half \ud800")
    with pytest.raises(TypeError):
        files.write_json(target, {"set": {1}})
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_file_that_is_named_when_it_is_complete(tmp_path):
    with files.replacing(tmp_path / "new" / "any", named=lambda: "its name") as part:
        part.write_text("text")
    with pytest.raises(KeyError), files.replacing(tmp_path / "new" / "any", named=lambda: "other") as part:
        write_and_fail(part, "half")
    assert names(tmp_path / "new") == ["its name"]


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    code = (
        "import os, signal, sys; from pathlib import Path; from t5g2.core import files\n"
        "with files.replacing(Path(sys.argv[1])) as part:\n"
        "    part.write_text('new'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    # its rest is known by its name
    rest = [name for name in names(tmp_path) if name != "file"]
    assert len(rest) == 1
    assert rest[0].startswith(".file.")
    assert rest[0].endswith(files.PART)


def test_a_folder_is_complete_or_absent(tmp_path):
    target = tmp_path / "folder"
    with pytest.raises(KeyError, match="half"), files.new_folder(target) as part:
        write_and_fail(part / "file", "half")
    assert names(tmp_path) == []
    # of a process that was killed
    (tmp_path / ".folder.tmp").mkdir()
    (tmp_path / ".folder.tmp" / "stale").write_text("")
    with files.new_folder(target) as part:
        (part / "file").write_text("")
        assert not target.exists()
    assert names(tmp_path) == ["folder"]
    assert names(target) == ["file"]
    with pytest.raises(UserError, match="folder exists already and is not overwritten; give another one, or remove it"):
        files.refuse_existing(target)


def test_a_lock_that_is_held_is_refused_or_waited_for(tmp_path):
    held, waits, order = threading.Event(), threading.Event(), []

    def wait():
        assert held.wait(60)
        with files.locked(tmp_path / "lock", on_wait=waits.set):
            order.append("second")

    thread = threading.Thread(target=wait)
    thread.start()
    with files.locked(tmp_path / "lock", on_wait=lambda: order.append("no wait for a free lock")):
        with (
            pytest.raises(UserError, match=r"^another run is at work$"),
            files.locked(tmp_path / "lock", busy="another run is at work"),
        ):
            order.append("never")
        held.set()
        assert waits.wait(60)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    # a folder is locked itself: no file is made in it
    (tmp_path / "folder").mkdir()
    with files.locked(tmp_path / "folder", busy="never"):
        assert names(tmp_path / "folder") == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b"[NaN]", "NaN is not JSON"),
        (b"[1e999]", "'1e999' is too large a number"),
        (b"[" * 10**5, "nested too deeply"),
        (b"[" * 101 + b"1" + b"]" * 101, "nested too deeply, over 100 levels"),
        (b'{"a": ["\\uDc00"]}', "is not text"),
        (b"[1,\n2", "at line 2, column 2"),
        (b"", "Expecting value at column 1"),
        (b"\xff", "can't decode byte 0xff"),
        (b'{"\\ud800": 1}', "is not text"),
    ],
)
def test_json_that_is_not_accepted(tmp_path, text, problem):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(UserError, match=rf"x\.json is not JSON \(.*{problem}.*; write it again"):
        files.read_json(tmp_path / "x.json", fix="write it again")


def test_json_is_bounded_in_depth_and_size_but_not_in_breadth(tmp_path, monkeypatch):
    broad = "[" + ",".join(["[[1]]"] * 200) + "]"
    (tmp_path / "x.json").write_text(broad)
    assert files.read_json(tmp_path / "x.json", fix="") == [[[1]]] * 200
    deepest = "[" * 100 + "1" + "]" * 100
    assert files.parse_json(deepest.encode()) == files.parse_record(deepest)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", len(broad) - 1)
    with pytest.raises(UserError, match=r"x\.json is not JSON \(larger than 0 MiB\); get it again"):
        files.read_json(tmp_path / "x.json", fix="get it again")
    with pytest.raises(UserError, match=r"is a folder, not a JSON file; get it again"):
        files.read_json(tmp_path, fix="get it again")


def test_a_record_of_someone_elses_data_is_read_as_python_reads_json():
    """NaN in a column that nobody reads, or a name twice, leaves the record as good as it was."""
    assert files.parse_record('{"text": "a", "score": Infinity, "text": "b"}')["text"] == "b"
    for text in ("[" * 10**5, '{"a":' * 101 + "1" + "}" * 101):
        with pytest.raises(ValueError, match="nested too deeply, over 100 levels"):
            files.parse_record(text)


def test_json_comes_back(tmp_path):
    value = {"ü": [1, -0.5, None, True, "\u2028"]}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json_object(tmp_path / "x.json", fix="") == value
    files.write_json(tmp_path / "x.json", [1])
    with pytest.raises(UserError, match=r"x\.json holds list, not an object; remove it"):
        files.read_json_object(tmp_path / "x.json", fix="remove it")


def test_there_is_one_folder_of_caches(tmp_path, monkeypatch):
    """For compiled programs too: `t5g2` sets the folder that JAX reads, unless the environment has one."""
    for name in ("T5G2_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "t5g2"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder() == tmp_path / "xdg" / "t5g2"
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "own"))
    assert files.cache_folder() == tmp_path / "own"
    monkeypatch.setenv("T5G2_CACHE", "~/own")
    assert files.cache_folder() == tmp_path / "own"
    monkeypatch.setenv("T5G2_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/xdg")
    assert files.cache_folder() == tmp_path / "xdg" / "t5g2"


def test_a_user_without_a_home_gets_the_name_of_the_variable(monkeypatch):
    for name in ("T5G2_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match="no home for caches; set T5G2_CACHE to a folder"):
        files.cache_folder()


def test_a_path_among_the_caches_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("T5G2_CACHE", "other/../caches")
    assert "set T5G2_CACHE" in files.cache_hint(tmp_path / "caches" / "gguf" / "a")
    assert not files.cache_hint(tmp_path / "caches" / ".." / "a")
    assert not files.cache_hint("/")


@pytest.mark.parametrize("chosen", [None, "elsewhere"])
def test_every_command_keeps_compiled_programs_there(tmp_path, chosen):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"T5G2_CACHE": str(tmp_path)}
    if chosen:
        environment["JAX_COMPILATION_CACHE_DIR"] = chosen
    code = (
        "from t5g2 import cli; from t5g2.commands import report; import os\n"
        "report.run = lambda flags: print(os.environ['JAX_COMPILATION_CACHE_DIR'])\n"
        "cli.main(['report', '--workdir=x'])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout == f"{chosen or tmp_path / 'jax'}\n"


@pytest.mark.parametrize("write", [files.replacing, files.new_folder])
def test_a_path_where_nothing_can_be_written_is_named(tmp_path, write):
    """Before the work, and by the writer itself."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, name in ((tmp_path / "file" / "a" / "b", "file"), (tmp_path / "link" / "a", "link")):
        message = f"cannot be made: {tmp_path}/{name} is in the way, and is no folder; give another path"
        with pytest.raises(UserError, match=message):
            files.refuse_existing(path)
        with pytest.raises(UserError, match=message), write(path):
            raise AssertionError
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "link"]


def test_every_command_names_a_path_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for out, part in ((tmp_path / "file" / "x", "is in the way, and is no folder"), ("x" * 300, "give a shorter path")):
        for name, flag in (("export", "--model=x"), ("import", "--source=x"), ("average", "--workdir=x")):
            assert cli.main([name, flag, f"--out={out}"]) == 2
            assert part in capsys.readouterr().err
