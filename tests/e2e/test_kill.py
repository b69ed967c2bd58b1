"""Commands that are killed at random instants; by hand, many more of them: tests/e2e/kill.py."""

import pytest

from tests.e2e import kill


@pytest.mark.long
def test_nothing_is_lost_or_half_written_whenever_a_command_is_killed(tmp_path, monkeypatch):
    """Run after run ends in the bits of the undisturbed one, without a temporary file, whatever the instants are."""
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))
    done = [*kill.trials(tmp_path / "trials", instants=6, seed=4, commands=("train", "average", "tokenize"))]
    instants = [instant for chain in done for instant in chain]
    assert {(instant.job, *instant.faults) for instant in instants} == {("train",), ("average",), ("tokenize",)}
    assert all(instant.is_identical for instant in instants)


@pytest.mark.long
def test_a_worker_that_is_killed_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))
    options = {"commands": ("tokenize",), "signals": ("worker",)}
    [first, *_] = [i for chain in kill.trials(tmp_path / "trials", instants=2, seed=0, **options) for i in chain]
    assert first.faults == []
