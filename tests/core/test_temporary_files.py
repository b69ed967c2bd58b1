"""Temporary names: of one process on one machine alone; what is left under them is removed once nobody writes to it."""

import multiprocessing
import os
import time

import pytest

from t5g2.core import files
from t5g2.core.errors import UserError
from t5g2.data.shards import array_record

HERE, ELSEWHERE = files._boot(), "0123abcd"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def age(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_no_two_temporary_names_are_alike(tmp_path):
    target = tmp_path / "a.json"
    parts = {files.temporary(target, files.PART) for _ in range(1000)}
    assert len(parts) == 1000
    assert {match[1] for part in parts if (match := files.TEMPORARY.search(part.name))} == {HERE}


def test_two_processes_write_one_folder_and_the_loser_gets_an_error(tmp_path):
    """Neither removes what the other is writing, and the one that ends first has the name."""
    target = tmp_path / "model"
    one, two = files.new_folder(target), files.new_folder(target)
    parts = [writer.__enter__() for writer in (one, two)]
    for part, text in zip(parts, ("of one", "of two"), strict=True):
        (part / "weights").write_text(text)
    one.__exit__(None, None, None)
    with pytest.raises(UserError, match="model exists already and is not overwritten"):
        two.__exit__(None, None, None)
    assert (target / "weights").read_text() == "of one"
    assert names(tmp_path) == ["model"]


def write_and_die(target):
    with files.new_folder(target) as part:
        (part / "half").write_text("")
        os._exit(9)


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    killed = multiprocessing.get_context("spawn").Process(target=write_and_die, args=(tmp_path / "model",))
    killed.start()
    killed.join()
    [left] = names(tmp_path)
    assert left.startswith(f".model.{HERE}-")
    assert left.endswith(".tmp")
    (tmp_path / ".model.tmp").mkdir()  # as earlier versions left it
    with files.new_folder(tmp_path / "model"):
        pass
    assert names(tmp_path) == ["model"]


def test_what_another_machine_writes_stays_for_a_day(tmp_path):
    """It cannot be asked, and its locks may not be seen here."""
    for name in ("young.part", "old.part", "young.tmp", "old.tmp"):
        path = tmp_path / f".x.{ELSEWHERE}-{'0' * 16}{os.path.splitext(name)[1]}"
        path = path.with_name(path.name.replace("x", name[:3], 1))
        path.mkdir() if name.endswith("tmp") else path.write_text("")
        age(path, 3600 if name.startswith("young") else 25 * 3600)
    for ending in (files.PART, files.PART_OF_FOLDER):
        files.remove_abandoned(tmp_path, f".*{ending}")
    assert names(tmp_path) == [f".you.{ELSEWHERE}-{'0' * 16}.part", f".you.{ELSEWHERE}-{'0' * 16}.tmp"]


@pytest.mark.parametrize("name", ["a.json", "a[1].json"])
def test_a_part_is_removed_when_its_writer_is_gone_and_not_before(tmp_path, name):
    """By the next writer of the same target, or of anything in a folder of shards, whoever else writes there."""
    target, other = tmp_path / name, tmp_path / "b.json"
    (tmp_path / f".{name}.{HERE}-{'0' * 16}.part").write_text("left by a killed process")
    with files.replacing(target) as part, files.replacing(other) as others_part:
        assert names(tmp_path) == sorted([part.name, others_part.name])
        for path in (part, others_part):
            path.write_text("half")
        files.remove_abandoned(tmp_path, f".*{files.PART}")
        with files.replacing(target) as second:
            second.write_text("second")
        assert names(tmp_path) == sorted([part.name, others_part.name, name])
        part.write_text("first")
        others_part.write_text("whole")
    assert (target.read_text(), other.read_text()) == ("first", "whole")
    assert names(tmp_path) == sorted([name, "b.json"])


def test_shards_are_locked_while_they_are_written(tmp_path):
    """The writer of the library opens the file by its name, and leaves it the file that is locked."""

    def records():
        yield b"one"
        files.remove_abandoned(tmp_path, f".*{files.PART}")
        yield b"two"

    with files.replacing(tmp_path / "a.array_record") as part:
        array_record.write_records(part, records())
    assert names(tmp_path) == ["a.array_record"]
    assert array_record.open_reader(tmp_path / "a.array_record").num_records() == 2


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, caplog):
    def refuse(handle, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with files.locked(tmp_path / ".lock", busy="busy"):
        pass
    assert "is on a file system without locks" in caplog.text
    with files.new_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model").is_dir()


def test_json_with_a_byte_order_mark():
    assert files.parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
