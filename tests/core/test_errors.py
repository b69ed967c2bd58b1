"""Errors of the operating system: found behind those of libraries, reported with the file, the room and the remedy."""

import errno
import os

import pytest

from t5g2 import cli
from t5g2.core import files
from t5g2.core.errors import MachineError, free_bytes, os_error_message, storage_problem


def test_the_error_of_the_system_is_found_behind_others():
    cause = OSError(errno.EDQUOT, "Disk quota exceeded", "/disk/x")
    outer = ValueError("Orbax says something long")
    outer.__cause__ = RuntimeError("and more")
    outer.__cause__.__context__ = cause
    assert storage_problem(outer) is cause
    problem = storage_problem(ValueError("local file \"/disk/a b.json\": write failed [os_error_code='28']"))
    assert (problem.errno, problem.filename) == (errno.ENOSPC, "/disk/a b.json")
    assert storage_problem(ValueError("wrong shape")) is None
    assert storage_problem(OSError("no number")) is None


def test_a_message_has_file_room_and_remedy(tmp_path):
    message = os_error_message(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "not" / "there")))
    free = free_bytes(tmp_path) / 2**20
    assert message.startswith(f"{tmp_path}/not/there: No space left on device (")
    assert message.endswith(" MiB free); make room, or give a path on another disk")
    assert float(message.split("(")[1].split()[0]) == pytest.approx(free, rel=0.05)
    assert os_error_message(OSError(errno.EIO, "Input/output error", "/d")) == (
        "/d: Input/output error; the disk or the network behind it has failed: check it, or give another path"
    )


@pytest.mark.parametrize("write", [files.replacing, files.new_folder])
def test_a_full_disk_names_the_target_and_leaves_nothing(tmp_path, write):
    def fill():
        with write(tmp_path / "target") as part:
            (part / "file" if write is files.new_folder else part).write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as error:
        fill()
    assert error.value.filename == str(tmp_path / "target")
    assert not list(tmp_path.iterdir())


def test_a_command_that_meets_a_full_disk_ends_with_status_2(monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x")

    monkeypatch.setattr(cli, "run_command", full)
    assert cli.main(["train"]) == 2
    assert "t5g2 train: /tmp/x: No space left on device (" in capsys.readouterr().err


def test_a_failure_of_the_machine_is_told_and_may_be_retried(capsys, monkeypatch):
    def fail(name, argv):
        raise MachineError(f"a worker of {name} was killed; run the same command again")

    monkeypatch.setattr(cli, "run_command", fail)
    assert cli.main(["tokenize"]) == 1
    assert capsys.readouterr().err == "t5g2 tokenize: a worker of tokenize was killed; run the same command again\n"
